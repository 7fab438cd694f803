"""Continuous normalising flows."""
