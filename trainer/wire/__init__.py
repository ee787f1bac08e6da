"""Gradients on the wire between workers that hold the whole model: in fewer bytes, and what that leaves to be kept."""
