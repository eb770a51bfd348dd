"""Progress lines."""

from types import SimpleNamespace

from dm_generations import progress as progress_module
from dm_generations.progress import Progress


def test_the_time_left_does_not_count_the_start(monkeypatch, capsys):
    """Which may take a minute, to load and compile, before the first image."""
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(progress_module, "time", clock)
    with Progress(100) as progress:
        for clock.now, images in ((1.0, 0), (60.0, 10), (65.0, 10), (75.0, 10), (80.0, 70)):
            progress.advance(images)
    # 20 images in the 15 seconds since the first ones; then nothing for 10 seconds, and nothing at the end.
    assert capsys.readouterr().err == "30 of 100 images, 1.3 images/s, 52 s left\n"
