"""CLIP, which scores images against prompts."""
