"""Implementations of Infini-attention."""
