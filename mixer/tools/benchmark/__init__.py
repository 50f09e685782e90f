"""Measures training and inference beside plain Flax and timm."""
