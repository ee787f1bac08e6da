"""Sections of the configuration that fill a module of their own; `schema` puts them together."""
