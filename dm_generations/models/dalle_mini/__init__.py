"""DALL-E mini and mega."""
