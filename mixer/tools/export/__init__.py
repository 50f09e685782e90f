"""Exports a model as a StableHLO program or an ONNX file."""
