"""How a state lives on the ranks of one replica: which rank owns which part, and its PETSc Vecs."""

from pnode_dist.system.compatibility import check_mpi

# Partitions are the first to load PETSc where no mesh was made: what does not fit is to be said in one line.
check_mpi()
