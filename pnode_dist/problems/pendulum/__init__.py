"""A pendulum with friction."""
