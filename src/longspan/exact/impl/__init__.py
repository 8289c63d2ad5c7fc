"""Implementations of exact attention."""
