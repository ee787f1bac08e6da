"""Loading SDXL's parts and turning captions and sizes into the UNet's conditioning."""
