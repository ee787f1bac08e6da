"""The optimizer's step: AdamW and other kinds, 8-bit moments, rounding, learning rate, loss scale."""
