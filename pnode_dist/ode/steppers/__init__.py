"""One step of each family of methods, and its adjoint."""
