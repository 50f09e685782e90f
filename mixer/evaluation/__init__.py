"""Evaluators of weights, with their data sets, results and tables; none imports the trainer."""
