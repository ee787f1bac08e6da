"""What shows a run's records elsewhere: mirrors of `metrics.jsonl`, each in a process of its own beside it."""
