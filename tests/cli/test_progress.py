"""Progress lines."""

import time
from types import SimpleNamespace

from dm_generations.cli import common


def test_the_time_left_does_not_count_the_start(monkeypatch, capsys):
    """Which may take a minute, to load and compile, before the first image."""
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(common, "time", clock)
    with common.Progress() as progress:
        for clock.now, done in ((0.0, 0), (1.0, 0), (60.0, 10), (65.0, 20), (75.0, 30), (80.0, 100)):
            progress(done, 100)
    # 20 images in the 15 seconds since the first ones; then nothing for 10 seconds, and nothing at the end.
    assert capsys.readouterr().err == "30 of 100 images, 1.3 images/s, 52 s left\n"


def test_loading_and_compiling_are_named_off_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(common, "PROGRESS_LINE_S", 0.0)
    monkeypatch.setattr(common, "WATCH_S", 0.001)
    read = ""
    with common.Progress() as progress:
        for expected in ("loading", "compiling"):
            deadline = time.monotonic() + 30
            while expected not in read and time.monotonic() < deadline:
                time.sleep(0.01)
                read += capsys.readouterr().err
            progress(0, 100)
    assert "loading" in read.partition("compiling")[0] and "compiling" in read
