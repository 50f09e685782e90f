"""Architectures: the networks, and what follows from their shape (names, FLOPs, resizing)."""
