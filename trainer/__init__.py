"""sdxl-train: fine-tune all of Stable Diffusion XL on consumer cards, from one YAML file."""

__version__ = "0.1.0"
