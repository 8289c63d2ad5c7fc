"""Speed: timing, memory, environment, and a small benchmark over the registry."""
