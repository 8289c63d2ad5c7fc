"""Implementations of stick-breaking attention; they do not import each other."""
