"""Implementations of window attention; none imports another."""
