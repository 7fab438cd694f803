"""How a state lives on the ranks of one replica: which rank owns which part, and its PETSc Vecs."""
