"""What makes a recomputed step the same as the first: what f reads, and the comparison of both."""
