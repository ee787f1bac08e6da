"""Processes: the torch-free launcher, and what the workers say to each other."""
