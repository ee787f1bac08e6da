"""What watches over a run's numbers: steps that are skipped, data that is left out, workers whose weights differ."""
