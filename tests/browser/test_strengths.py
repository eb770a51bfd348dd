"""The page's strengths and intervals are those of `ratings --rank`."""

import functools
import http.server
import threading

import numpy as np
import pytest
from helpers import ROOT

from dm_generations.pipelines.rank import fit_bradley_terry

pytestmark = pytest.mark.browser

ESTIMATE = """
async (pairs) => {
  const {strengths} = await import("/scores.js");
  return [...strengths(pairs)].map(([item, {strength, error}]) => [item, strength, error]);
}"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def estimate(page):
    handler = functools.partial(Quiet, directory=ROOT / "browser")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page.goto(f"http://127.0.0.1:{server.server_port}/page.html")
        page.set_content("")  # without its policy
        yield lambda pairs: page.evaluate(ESTIMATE, pairs)
        server.shutdown()


@pytest.mark.parametrize("kind", ["random", "two components", "one wins all", "chain"])
def test_strengths_and_errors_are_those_of_rank(estimate, kind):
    random = np.random.default_rng(5)
    pairs = random.integers(7, size=(2, 60))
    if kind == "two components":
        pairs = np.concatenate([random.integers(3, size=(2, 20)), random.integers(3, 8, size=(2, 30))], axis=1)
    if kind == "chain":
        pairs = np.array([range(20), range(1, 21)])
    pairs = pairs[:, pairs[0] != pairs[1]]
    wins = random.choice([0.0, 0.5, 1.0], size=pairs.shape[1])
    if kind == "one wins all":
        wins = (pairs[0] < pairs[1]).astype(float)
    weighted = []
    for (first, second), win in zip(pairs.T.tolist(), wins, strict=True):
        halves = [[first, second, win], [second, first, 1 - win]]
        weighted += [half for half in halves if half[2]]
    found = sorted(estimate(weighted))
    names, pairs = np.unique(pairs, return_inverse=True)
    strengths, errors = fit_bradley_terry(len(names), pairs.reshape(2, -1), wins)
    assert [item for item, _, _ in found] == names.tolist()
    np.testing.assert_allclose([one[1:] for one in found], np.stack([strengths, errors], 1), atol=1e-6)


def test_no_pairs_have_no_strengths(estimate):
    assert estimate([]) == []
