"""Triton kernels of stick-breaking attention."""
