"""``resq quantize``: calibrate -> bases -> rotate -> quantize -> pack, one decoder layer in memory at a time."""
