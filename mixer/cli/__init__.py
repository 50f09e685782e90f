"""Flags and the start of a process."""
