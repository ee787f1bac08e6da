"""How a run goes and what it costs: steps and images in numbers, time by phase, records, progress."""
