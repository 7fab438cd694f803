"""Both experiments of the PNODE paper with every method they compare."""
