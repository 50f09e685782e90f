"""Where examples come from: prepared TFDS sets, folders, digits, synthetic images."""
