"""Calls into PETSc that petsc4py lacks, PETSc's log, its Vecs as tensors, and the destruction of its objects."""
