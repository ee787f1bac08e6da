"""Where images and latents come from: one module per kind of source."""
