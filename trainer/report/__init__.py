"""A run as a page to look at: records, events, samples, settings."""
