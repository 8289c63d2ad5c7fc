"""Implementations of stick-breaking attention."""
