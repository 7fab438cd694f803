"""Diffusion on an irregular mesh."""
