"""Networks, and what follows from their shape: parameter names, FLOPs, resizing."""
