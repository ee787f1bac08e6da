"""Frozen weights that are held in fewer bits than the passes compute with."""
