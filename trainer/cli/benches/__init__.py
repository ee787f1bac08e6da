"""What `sdxl-train bench` does: ways to train, each measured in workers of its own."""
