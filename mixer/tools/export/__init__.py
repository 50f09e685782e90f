"""Writes a model as a StableHLO program."""
