"""Calls into PETSc that petsc4py lacks, PETSc's log, its Vecs as tensors, and the destruction of its objects."""

# The PETSc of a binary wheel finds the MPI library only where mpi4py has loaded it.
import mpi4py.MPI  # noqa: F401
