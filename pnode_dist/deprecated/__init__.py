"""Modules under the names that they had, for one release: `pnode_dist` looks for its submodules here as well."""
