"""Sections of the configuration that are not in `schema.py`."""
