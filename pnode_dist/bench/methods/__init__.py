"""Both experiments of the PNODE paper with every gradient method they compare."""
