"""Robertson's stiff chemical reactions."""
