"""Judging weights: validation loss at fixed noise, sample grids, charts."""
