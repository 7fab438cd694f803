"""Solves that are made of several: between events, jumps and inputs."""
