"""Data sets of images and labels; the only package that imports TensorFlow and TFDS."""
