"""Every example in a docstring of the package, run as it stands there, in the root of the checkout."""

import doctest
import importlib

import pytest
from helpers import ROOT

EXAMPLES = [path for path in sorted((ROOT / "dm_generations").rglob("*.py")) if ">>> " in path.read_text("utf-8")]
WITH_MODELS = {"api", "compat", "inference"}  # their examples load models


def marks(path):
    return [pytest.mark.e2e] if path.relative_to(ROOT / "dm_generations").parts[0] in WITH_MODELS else []


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=marks(path), id=path.relative_to(ROOT).as_posix()) for path in EXAMPLES],
)
def test_examples_run(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    parts = path.relative_to(ROOT).with_suffix("").parts
    module = importlib.import_module(".".join(part for part in parts if part != "__init__"))
    examples = [test for test in doctest.DocTestFinder(exclude_empty=True).find(module) if test.examples]
    assert examples
    for test in examples:
        report = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test)
        assert report.failed == 0, test.name
