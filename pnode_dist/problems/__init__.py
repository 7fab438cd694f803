"""The built-in problems, a folder each."""
