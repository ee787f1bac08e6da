"""The networks and what of them trains: denoiser, text encoders, VAE, freezing, recomputation, compilation."""
