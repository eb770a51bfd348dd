"""Shared by all tests; see helpers.py."""

import os
import tempfile

import jax
import pytest
from helpers import golden, golden_dirs
from tiny import TinyModels, tiny_models

__all__ = ["golden", "golden_dirs"]


def pytest_configure(config):
    """Compiled programs go into a cache of this run's own, never into the user's."""
    if not hasattr(config, "workerinput"):
        folder = tempfile.TemporaryDirectory(prefix="dm-generations-tests-")
        config.add_cleanup(folder.cleanup)
        os.environ["XDG_CACHE_HOME"] = folder.name
    jax.config.update("jax_compilation_cache_dir", f"{os.environ['XDG_CACHE_HOME']}/jax-{os.getpid()}")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> TinyModels:
    """A text-to-image model, a codec and a CLIP, which tests share so that each program is compiled once."""
    return tiny_models(tmp_path_factory.mktemp("models"))
