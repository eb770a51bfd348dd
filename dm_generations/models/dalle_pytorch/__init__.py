"""DALLE-pytorch, and the DALL-3 fork of it."""
