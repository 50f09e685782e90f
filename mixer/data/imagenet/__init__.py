"""ImageNet's own matters: class names, ReaL labels, the preparation of ImageNet-21k."""
