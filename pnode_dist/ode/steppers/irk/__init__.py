"""Fully implicit Runge-Kutta methods: all stages of a step are one system of equations."""
