"""Devices and processes: the mesh, and how processes join, agree, fail and stop together."""
