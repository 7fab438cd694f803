"""Semilinear equations on a periodic line: Kuramoto-Sivashinsky and Burgers."""
