"""Draws what a model has learnt as one HTML page."""
