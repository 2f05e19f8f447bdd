"""Quantization methods as one family: each says how it transforms a layer and rounds it, one engine measures them."""
