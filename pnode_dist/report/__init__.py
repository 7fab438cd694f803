"""What a run leaves for people: its forecast as a file, its report as a picture."""
