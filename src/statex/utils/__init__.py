"""What the other parts build on: atomic writes and locks, time and memory, device, commit and versions."""
