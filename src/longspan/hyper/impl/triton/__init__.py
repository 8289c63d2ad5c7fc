"""Triton kernels of HyperAttention."""
