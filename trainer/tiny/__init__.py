"""A tiny SDXL with the real topology, and real photographs to train it on; nothing is downloaded."""
