"""Files of a run: directory, lock, heartbeat, status, snapshots, metrics and event files."""
