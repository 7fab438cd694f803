"""Modules under their former names, for one release: this folder is on `pnode_dist.__path__`."""
