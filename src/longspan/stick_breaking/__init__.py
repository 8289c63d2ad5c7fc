"""Stick-breaking attention (arXiv 2410.17980)."""
