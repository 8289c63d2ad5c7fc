"""A RoPE model goes on training with HyperAttention, forward and backward: what the gap becomes."""
