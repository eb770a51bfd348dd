"""Shared by all tests; see helpers.py."""

import os
import tempfile

from helpers import golden, golden_dirs

__all__ = ["golden", "golden_dirs"]


def pytest_configure(config):
    """Compiled programs go into a cache of this run's own, never into the user's."""
    folder = tempfile.TemporaryDirectory(prefix="dm-generations-tests-")
    config.add_cleanup(folder.cleanup)
    os.environ["XDG_CACHE_HOME"] = folder.name
