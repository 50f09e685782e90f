"""ImageNet: class names, ReaL labels, and the preparation of ImageNet-21k."""
