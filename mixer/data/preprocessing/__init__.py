"""The preprocessing ops, on the host (tf.data) and on the device (JAX)."""
