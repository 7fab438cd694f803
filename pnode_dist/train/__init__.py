"""Training runs: the loop, the optimiser, callbacks, preemption and progress."""
