"""The memory plan: what a step holds, traced without weights; the way of training that fits; what is told of it."""
