"""Data, batches, references, solvers and files that several problems share."""
