"""The process and its machine: abort, versions, memory, files, clocks and lines of JSON."""
