"""Evidence: perplexity, loss on a fixed tail, passkey retrieval, comparison of mechanisms."""
