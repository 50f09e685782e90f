"""Measures the speed of training and inference, compared with plain Flax and timm."""
