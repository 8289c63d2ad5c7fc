"""Triton kernels of Infini-attention."""
