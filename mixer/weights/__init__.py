"""Arrays on disk: checkpoints, released files of every format, and how they are loaded."""
