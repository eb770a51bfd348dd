"""Prompts x settings x seeds to rows of an archive."""
