"""Checkpoints of the forward pass for its adjoint: budgets, schedules, plans, storage and replay."""
