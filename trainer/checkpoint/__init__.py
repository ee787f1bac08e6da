"""The run directory, and checkpoints in it: written beside, flushed, renamed; listed, verified, dropped."""
