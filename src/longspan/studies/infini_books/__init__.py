"""Language modelling on books at length: compressive memory against windows of the same keys."""
