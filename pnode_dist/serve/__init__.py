"""The resident service: a trained model on all ranks, which answers requests of UM-Bridge's clients over HTTP."""
