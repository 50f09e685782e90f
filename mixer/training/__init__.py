"""The update of a training step: state, optimizer, losses; no files and no flags."""
