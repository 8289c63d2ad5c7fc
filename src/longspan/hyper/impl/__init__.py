"""Implementations of HyperAttention; none imports another."""
