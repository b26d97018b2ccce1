"""ldlm: the command-line toolkit for latent diffusion language models (arXiv 2605.07933)."""

__version__ = "0.1.0"
