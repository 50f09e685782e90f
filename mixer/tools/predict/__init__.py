"""Classifies images with given weights."""
