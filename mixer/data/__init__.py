"""Images and labels: the only home of TensorFlow and TFDS."""
