"""Weights and the optimizer's state that lie in the host's memory."""
