"""From the catalogue to the store: plan, encode, commit, verify."""
