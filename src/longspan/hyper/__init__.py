"""HyperAttention."""
