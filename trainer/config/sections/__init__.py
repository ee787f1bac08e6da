"""Sections of the configuration that `schema.py` puts together, documented as those there are."""
