"""Classifies images with a trained model."""
