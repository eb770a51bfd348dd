"""Compiled programs that a later run finds again."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT
from tiny import tiny_dalle_bart

PROGRAMS = {"init_cache", "decode_steps", "teacher_forced_margins"}


def run(program: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tests/programs" / program), *map(str, arguments)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True)


@pytest.mark.slow
@pytest.mark.parametrize("device_count", [1, 4])
def test_a_later_run_samples_the_same_without_compiling(tmp_path, device_count):
    model = tiny_dalle_bart(tmp_path / "model")
    environment = {
        "XDG_CACHE_HOME": str(tmp_path),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={device_count}",
        "JAX_LOG_COMPILES": "1",
    }
    first, later = (run("sample_rows.py", model, **environment) for _ in range(2))
    found = [set(re.findall(r"cache hit for 'jit_(\w+)'", done.stderr)) & PROGRAMS for done in (first, later)]
    assert found == [set(), PROGRAMS]
    assert first.stdout == later.stdout


@pytest.mark.e2e
def test_a_truncated_entry_is_replaced(tmp_path):
    """A run that is killed while JAX writes an entry leaves one, of which JAX would warn at every later start."""

    def entries() -> dict[Path, bytes]:
        assert run("compile_one.py", XDG_CACHE_HOME=str(tmp_path)).stderr == ""
        return {path: path.read_bytes() for path in tmp_path.rglob("*-cache")}

    complete = entries()
    assert complete
    for path, data in complete.items():
        path.write_bytes(data[: len(data) // 2])
    later = entries()
    assert later.keys() == complete.keys()
    assert all(len(data) > len(complete[path]) * 0.9 for path, data in later.items())


def test_a_folder_that_cannot_be_made_is_a_warning(tmp_path):
    (tmp_path / "dm-generations").write_text("a file where a folder should be")
    errors = run("compile_one.py", XDG_CACHE_HOME=str(tmp_path)).stderr
    assert "dm-generations" in errors and errors.count("\n") == 1


def test_a_folder_that_the_user_set_is_used_as_it_is(tmp_path):
    own = tmp_path / "own"
    settings = {"JAX_COMPILATION_CACHE_DIR": str(own), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    run("compile_one.py", XDG_CACHE_HOME=str(tmp_path / "cache"), **settings)
    assert list(own.glob("*-cache")) and not (tmp_path / "cache").exists()
