"""Indices over keys: which keys are alike."""
