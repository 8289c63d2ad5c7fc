"""Infini-attention and the passkey: trained at 5,000 tokens, asked at a million, with controls."""
