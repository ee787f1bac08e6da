"""State of the optimizer that lies in the host's memory."""
