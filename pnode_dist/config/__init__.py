"""The configuration of a run: its tables, reading the file, and one line for each mistake."""
