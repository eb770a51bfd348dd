"""Shared by all tests; see helpers.py."""

from helpers import golden, golden_dirs

__all__ = ["golden", "golden_dirs"]
