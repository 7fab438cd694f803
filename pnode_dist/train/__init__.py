"""A training run: its configuration, its directory, its loop and its metrics."""
