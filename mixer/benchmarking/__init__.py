"""The parts of `python -m mixer.tools.benchmark`: contestants, their contest, and its tables."""
