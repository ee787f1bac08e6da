"""One module per command of `sdxl-train`, named as the user types it."""
