"""Independent answers to compare with: plain torch, numpy and arithmetic, nothing of the package or of PETSc."""
