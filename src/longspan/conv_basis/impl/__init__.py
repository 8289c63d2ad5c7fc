"""How Conv-Basis attention is computed."""
