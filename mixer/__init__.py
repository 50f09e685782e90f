"""MLP-Mixer in JAX/Flax: train, fine-tune, evaluate and use."""
