"""Janus and Janus-Pro: images of prompts."""
