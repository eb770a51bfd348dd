"""Shared by all tests; see helpers.py."""

import os
import tempfile
from collections.abc import Iterator

import pytest
from helpers import golden, golden_dirs
from ray_kit import RayCluster
from tiny import TinyModels, tiny_models

from dm_generations.export.manifest import ImageEntry
from dm_generations.runtime import compile_cache

__all__ = ["golden", "golden_dirs"]


def pytest_configure(config):
    """Caches are never the user's: tests keep their compiled programs, commands that they start share a new cache."""
    if not hasattr(config, "workerinput"):
        folder = tempfile.TemporaryDirectory(prefix="dm-generations-tests-")
        config.add_cleanup(folder.cleanup)
        os.environ["XDG_CACHE_HOME"] = folder.name
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(config.cache.mkdir("home")))
        compile_cache.enable()


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> TinyModels:
    """A text-to-image model, a codec and a CLIP, which tests share so that each program is compiled once."""
    return tiny_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[RayCluster]:
    """A Ray cluster of this machine."""
    pytest.importorskip("ray")
    cluster = RayCluster()
    yield cluster
    cluster.close()


@pytest.fixture
def make_entry():
    def make_entry(file: str = "0001_rocket/a.png", **fields) -> ImageEntry:
        defaults = dict(prompt_id=1, prompt="rocket", sc_prompt_id=1, sc_prompt=None, top_k=50, top_p=0.9)
        defaults |= dict(temperature=1.0, cond_scale=3.0, rank=0, score=25.0, key0=1, key1=2)
        defaults |= dict(model="embedded/dalle_bart", sampler_version=1)
        return ImageEntry(file, **defaults | fields)

    return make_entry
