"""Triton kernel of Conv-Basis attention: the search for segment borders."""
