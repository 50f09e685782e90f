"""Evaluators: each receives a prediction function and data; none knows the trainer."""
