"""Sources of examples: TFDS data sets, folders, label files, digits, synthetic images."""
