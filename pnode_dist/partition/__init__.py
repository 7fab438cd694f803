"""Partitions: the distribution of a state over the ranks of one replica, and its PETSc Vecs."""

from pnode_dist.system.compatibility import check_mpi

# Without a mesh this is the first import of PETSc: check the MPI library here, to report a mismatch in one line.
check_mpi()
