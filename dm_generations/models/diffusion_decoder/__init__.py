"""The diffusion decoder of DALL-3."""
