"""Compiled programs that a later run finds again."""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_kit import random_tokens
from jax.experimental.compilation_cache import compilation_cache
from tiny import CODEBOOK_SIZE, GRID, tiny_clip, tiny_dalle_bart, tiny_vqgan

from dm_generations import compile_cache, programs
from dm_generations.decode.codec import Codec
from dm_generations.models.loading import load_checkpoint
from dm_generations.programs import Kept, remembered
from dm_generations.score import Scorer
from dm_generations.text import PromptTokenizer

ROOT = Path(__file__).resolve().parent.parent
X = np.arange(6, dtype=np.float32)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's cache. The tests' own, which is JAX's, rests meanwhile."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    monkeypatch.setattr(compile_cache, "_folder", tmp_path)
    another_run(monkeypatch)
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


def another_run(monkeypatch) -> None:
    """What this process has loaded is forgotten."""
    monkeypatch.setattr(programs, "_programs", {})
    programs._version.cache_clear()


class Traced:
    """A function to keep, and how often JAX has traced it."""

    def __init__(self):
        self.count = 0

        @functools.partial(jax.jit, static_argnums=0)
        def times(factor, arrays):
            self.count += 1
            return {"product": arrays["x"] * factor}

        self.times = times

    def product(self, factor=3, x=X, closed_over=()):
        return np.asarray(Kept(self.times, factor, closed_over=closed_over)({"x": jnp.asarray(x)})["product"])


def test_a_later_run_does_not_trace(folder, monkeypatch):
    first, later = Traced(), Traced()
    np.testing.assert_array_equal(first.product(), 3 * X)
    another_run(monkeypatch)
    np.testing.assert_array_equal(later.product(), 3 * X)
    assert (first.count, later.count) == (1, 0)


@pytest.mark.parametrize(
    "different", [{"factor": 4}, {"x": X[:4]}, {"x": X.astype(np.int32)}, {"closed_over": ("another",)}]
)
def test_another_program_is_told_apart(folder, different):
    traced = Traced()
    traced.product()
    expected = different.get("x", X) * different.get("factor", 3)
    np.testing.assert_array_equal(traced.product(**different), expected)
    assert len(list(folder.glob("*-program"))) == 2


def test_another_version_or_setting_is_told_apart(folder, monkeypatch, tmp_path_factory):
    package = tmp_path_factory.mktemp("package")
    (package / "sampling.py").write_text("K = 1")
    monkeypatch.setattr(programs, "PACKAGE", package)
    another_run(monkeypatch)
    names = set()
    for change in (
        lambda: None,
        lambda: (package / "sampling.py").write_text("K = 2"),
        lambda: monkeypatch.setattr(jax, "__version__", "99.0"),
        lambda: monkeypatch.setenv("XLA_FLAGS", "--xla_another=1"),
    ):
        change()
        another_run(monkeypatch)
        names.add(programs._name("what"))
    jax.config.update("jax_numpy_rank_promotion", "raise")
    try:
        names.add(programs._name("what"))
    finally:
        jax.config.update("jax_numpy_rank_promotion", "allow")
    assert len(names) == 5


def turned_over(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: data[: len(data) // 2], lambda data: b"\x80" * 99, turned_over]
)
def test_a_damaged_file_is_replaced(folder, monkeypatch, damage):
    Traced().product()
    (path,) = folder.glob("*-program")
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    another_run(monkeypatch)
    traced = Traced()
    np.testing.assert_array_equal(traced.product(), 3 * X)
    assert traced.count == 1
    another_run(monkeypatch)
    np.testing.assert_array_equal(traced.product(), 3 * X)  # from the new file
    assert traced.count == 1


def test_a_folder_that_cannot_be_written_costs_time_alone(folder, monkeypatch, capsys):
    monkeypatch.setattr(compile_cache, "_folder", folder / "gone")
    np.testing.assert_array_equal(Traced().product(), 3 * X)
    assert remembered(lambda: 7, "what") == 7
    assert capsys.readouterr().err == (
        f"warning: compiled programs are not kept: {folder / 'gone'}: No such file or directory\n"
    )


def test_a_program_that_jax_cannot_write_is_run_and_said_once(folder, monkeypatch, capsys):
    def refuse(program):
        raise ValueError("Compilation does not support serialization")

    monkeypatch.setattr(programs.serialize_executable, "serialize", refuse)
    compile_cache.warn.cache_clear()
    for _ in range(2):
        another_run(monkeypatch)
        np.testing.assert_array_equal(Traced().product(), 3 * X)
    assert capsys.readouterr().err == (
        "warning: compiled programs are not kept: Compilation does not support serialization\n"
    )
    assert not list(folder.glob("*-program"))


def test_decoders_of_one_network_are_told_apart(folder):
    """Sheets of 2 x 3 and 3 x 2 pictures take arrays of one shape; 16-bit activations those of float32's."""
    checkpoint = load_checkpoint(tiny_vqgan(folder / "vqgan"), "codec")
    tokens = random_tokens(6, GRID**2, CODEBOOK_SIZE)[None]
    codecs = [Codec.from_checkpoint(checkpoint, 6, dtype) for dtype in ("float32", "bfloat16")]
    sheets = [codec.tiled(rows, cols) for codec in codecs for rows, cols in ((2, 3), (3, 2), (6, 1))]
    kept = [sheet.decode(tokens) for sheet in sheets]
    compile_cache._folder = None
    for sheet, pictures in zip(sheets, kept, strict=True):
        np.testing.assert_array_equal(pictures, sheet.decode(tokens))
    assert len(list(folder.glob("*-program"))) == len(sheets)


def test_preprocessing_is_told_apart(folder):
    """Two CLIPs of one configuration, of which one resizes and normalises otherwise."""
    path = tiny_clip(folder / "clip")
    images = np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3), np.uint8)
    found = []
    for values in ({}, {"image_mean": [0.1, 0.2, 0.3]}, {"resample": 2}):
        (path / "preprocessor_config.json").write_text(json.dumps(values))
        checkpoint = load_checkpoint(path, "clip")
        found.append(Scorer(checkpoint, PromptTokenizer(checkpoint.folder)).image_features(images))
    assert len({features.tobytes() for features in found}) == 3


def test_without_a_folder_nothing_is_kept(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(compile_cache, "_folder", None)
    monkeypatch.chdir(tmp_path)
    traced = Traced()
    np.testing.assert_array_equal(traced.product(), 3 * X)
    assert remembered(lambda: 7, "what") == 7
    assert traced.count == 1 and list(tmp_path.iterdir()) == []


def test_beside_the_cache_of_jax_nothing_is_kept(folder):
    """A program that JAX has loaded from there cannot be written again."""
    jax.config.update("jax_compilation_cache_dir", str(folder / "jax"))
    np.testing.assert_array_equal(Traced().product(), 3 * X)
    assert not list(folder.glob("*-program"))


def test_a_number_is_remembered(folder):
    assert remembered(lambda: 7, "what", (1, 2)) == 7
    assert remembered(lambda: pytest.fail("found again"), "what", (1, 2)) == 7
    assert remembered(lambda: 8, "what", (2, 1)) == 8


def test_what_is_given_up_is_used_again(folder, monkeypatch):
    """A buffer that is donated, as the caches of the sampling loop are."""

    def kept():
        return Kept(jax.jit(lambda state: state + 1, donate_argnums=0))

    for _ in range(2):
        another_run(monkeypatch)
        state = jnp.asarray(X)
        np.testing.assert_array_equal(kept()(state), X + 1)
        assert state.is_deleted()


DRAW = """
import hashlib
import sys
import numpy as np
from dm_generations import Generator, RowSettings
from dm_generations.threefry import row_key
keys = np.array([row_key(0, i) for i in range(3)])
generator = Generator.load(sys.argv[1], batch_size=2)
drawn = generator.draw(["a rocket"] * 3, RowSettings(cond_scale=[1, 3, 10]), keys)
print(hashlib.md5(drawn.tokens.tobytes()).hexdigest(), drawn.log_probs.tobytes().hex())
print(generator.replay(["a rocket"] * 3, RowSettings(cond_scale=[1, 3, 10]), keys, drawn.tokens).max())
"""


@pytest.mark.parametrize("device_count", [1, 4])
def test_a_later_run_draws_the_same_without_compiling(tmp_path, device_count):
    model = tiny_dalle_bart(tmp_path / "model")
    environment = os.environ | {
        "XDG_CACHE_HOME": str(tmp_path),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={device_count}",
        "JAX_LOG_COMPILES": "1",
    }
    told = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", DRAW, model], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        compiled = set(re.findall(r"Finished XLA compilation of jit\((\w+)\)", done.stderr))
        told.append((done.stdout, compiled & {"begin", "advance", "replay"}))
    assert [compiled for _, compiled in told] == [{"begin", "advance", "replay"}, set()]
    assert told[0][0] == told[1][0]


JAX_KEEPS = """
import sys
from pathlib import Path
import jax
from dm_generations import compile_cache
compile_cache._let_jax_keep_in(Path(sys.argv[1]))
assert jax.jit(lambda x: x + 1)(1) == 2
"""


def test_an_entry_of_jax_that_was_cut_off_is_compiled_again(tmp_path):
    """What a run that is killed while JAX keeps its program, on an accelerator, leaves would trouble each later run."""

    def run():
        done = subprocess.run([sys.executable, "-c", JAX_KEEPS, tmp_path], cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        return {path: path.read_bytes() for path in tmp_path.glob("*-cache")}

    kept = run()
    assert kept
    for path, data in kept.items():
        path.write_bytes(data[: len(data) // 2])
    again = run()
    assert again.keys() == kept.keys()
    assert all(len(data) > len(kept[path]) * 0.9 for path, data in again.items())
