"""The command that measures a GPU runs on a CPU too, with small models."""

import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT, first_of

PROGRAM = ROOT / "benchmarks" / "gpu.py"
PARTS = ("limits", "decoding", "scoring", "start", "correctness", "mini", "files")  # the others are "mini" once more


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, PROGRAM, "--tiny", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)


@pytest.mark.e2e
@pytest.mark.parametrize("part", first_of(PARTS, count=4))
def test_each_part_stores_its_figures_once(part, tmp_path):
    done = run("--out", tmp_path, "--parts", part)
    assert done.returncode == 0, done.stdout + done.stderr
    stored = (tmp_path / "results.json").read_bytes()
    figures = json.loads(stored)["parts"][part]["figures"]
    assert figures and all(figure["value"] >= 0 for figure in figures)
    for figure in figures:
        assert figure["what"] in (tmp_path / "results.md").read_text()
    assert run("--out", tmp_path, "--parts", part).returncode == 0
    assert (tmp_path / "results.json").read_bytes() == stored


def test_a_part_for_which_no_time_is_left_is_told(tmp_path):
    done = run("--out", tmp_path, "--minutes", 0, "--parts", "limits", "start")
    assert done.returncode == 1 and "limits" in done.stdout and "start" in done.stdout
    assert not (tmp_path / "results.json").exists()


def test_checks_that_fail_set_the_status(tmp_path):
    figure = {"what": "an error", "value": 2.0, "unit": "", "torch": None, "note": "", "ok": False}
    part = {"date": "2026-01-01", "seconds": 1.0, "versions": "", "figures": [figure]}
    (tmp_path / "results.json").write_text(json.dumps({"machine": {}, "parts": {"limits": part}}))
    done = run("--out", tmp_path, "--parts", "limits")
    assert done.returncode == 1 and "an error" in done.stdout
