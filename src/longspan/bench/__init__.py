"""Measuring: timing, memory, where it ran, a benchmark over the registry and its reports."""
