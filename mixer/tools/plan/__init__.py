"""Plans a run for hardware that need not be available: memory, FLOPs, communication, time."""
