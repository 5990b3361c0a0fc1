"""Training loop and recipes of the networks."""
