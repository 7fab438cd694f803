"""Recomputing a step as it was first computed: the values that f reads, and the comparison of both results."""
