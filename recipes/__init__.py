"""Recipes that train models from nothing, run from a checkout."""
