"""Pure tensor functions of the diffusion objective. Imports torch alone."""
