"""From sources to the store: scan, catalogue, encode, commit; and what is told about the result."""
