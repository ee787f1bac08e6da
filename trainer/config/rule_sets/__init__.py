"""Rules of single sections, a drawer of `rules.py`."""
