"""What Triton kernels of all mechanisms share. Importing this package does not import Triton."""
