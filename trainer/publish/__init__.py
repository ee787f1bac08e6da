"""Files for other programs: exports and merges, by a command or beside a run's checkpoints."""
