"""The optimizer's step: AdamW in its kinds, 8-bit moments, rounding, learning rate, loss scale."""
