"""Triton kernels of window attention."""
