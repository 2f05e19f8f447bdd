"""Calibration: token sequences, and the second moments of the activations they cause."""
