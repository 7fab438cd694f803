"""Solving du/dt = f(t, u; theta) with PETSc's steppers, and the exact discrete adjoint of the solve."""
