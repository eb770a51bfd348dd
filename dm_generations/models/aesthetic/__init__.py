"""Aesthetic heads: one number of a CLIP's image vector."""
