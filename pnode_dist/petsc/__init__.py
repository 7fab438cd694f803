"""Calls into PETSc that petsc4py does not offer, its log, its vectors as tensors, and its objects' destruction."""
