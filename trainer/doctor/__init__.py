"""Is this machine fit to train: facts are read or measured, judged by plain functions, and told on one page."""
