"""Studies: claims of papers, run again with controls, one command each. See `longspan study`."""
