"""``resq compare``: every method on one model, measured alike, as a table that can be resumed and repeated."""
