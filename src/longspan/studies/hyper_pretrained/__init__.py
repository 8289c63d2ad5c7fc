"""HyperAttention in pretrained models, untouched weights: what it costs in quality."""
