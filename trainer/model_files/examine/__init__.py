"""What a model file is and holds, read from its header and a few tensors: identify, check, inspect, compare."""
