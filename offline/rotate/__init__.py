"""Rotations into the weights: what changes a model's numbers but not its function."""
