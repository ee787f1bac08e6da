"""One module per command: each parses its arguments, calls into the library and prints."""
