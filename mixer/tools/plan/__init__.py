"""Plans a run for hardware that need not be there: memory, FLOPs, communication, time."""
