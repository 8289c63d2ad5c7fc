"""Stick-breaking beyond its training length, against RoPE, YaRN, NTK, FoX, ALiBi and NoPE."""
