"""Exports a model as a StableHLO program."""
