"""Sampling settings: their defaults and ranges."""

import dataclasses
import os
import subprocess
import sys

import pytest
from helpers import ROOT

from dm_generations import SamplingParams
from dm_generations.errors import UserError


def test_the_defaults_switch_every_setting_off():
    assert dataclasses.asdict(SamplingParams()) == {"top_k": 0, "top_p": 1.0, "temperature": 1.0, "cond_scale": 1.0}
    SamplingParams().validate()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_k", -1),
        ("top_k", 2**31),
        pytest.param("top_k", 16**5000, id="more digits than Python writes"),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", float("nan")),
        ("temperature", -0.5),
        ("temperature", float("inf")),
        ("temperature", float("nan")),
        ("cond_scale", -1.0),
        ("cond_scale", float("inf")),
        ("cond_scale", float("nan")),
    ],
)
def test_a_value_out_of_range_is_refused_in_one_line(name, value):
    with pytest.raises(UserError, match=name) as error:
        SamplingParams(**{name: value}).validate()
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


@pytest.mark.parametrize("params", [(0, 1e-30, 0.0, 0.0), (2**31 - 1, 1.0, 3e38, 3e38)])
def test_the_ends_of_the_ranges_are_accepted(params):
    SamplingParams(*params).validate()


def test_it_imports_neither_jax_nor_numpy():
    subprocess.run(
        [sys.executable, "tests/programs/import_params.py"],
        check=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
