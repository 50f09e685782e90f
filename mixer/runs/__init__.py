"""One run directory: its config, its record, its results."""
