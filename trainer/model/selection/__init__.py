"""What of the model trains and how fast, by the names of its weights; free of torch."""
