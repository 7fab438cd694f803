"""Solve du/dt = f(t, u; theta) with PETSc's methods, and compute the exact discrete adjoint of the solve."""
