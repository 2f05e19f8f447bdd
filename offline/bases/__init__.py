"""Bases of the residual stream, the values and the keys, and the random rotations inside their subspaces."""
