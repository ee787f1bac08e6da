"""What rank 0 tells of a run to whoever is not looking at the screen: records for trackers, messages."""
