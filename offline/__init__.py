"""Offline tools: calibrate, transform, quantize, pack and evaluate checkpoints."""
