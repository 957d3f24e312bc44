"""What the other parts stand on: atomic writes and locks, time and memory, device, commit and versions."""
