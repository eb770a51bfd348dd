"""Ctrl-C among threads: it waits until no lock of theirs is half taken."""

import signal
import threading

import pytest

from dm_generations.errors import defer_sigint
from dm_generations.export.writers import FileWriter, Shard, ShardWriter


@pytest.fixture(autouse=True)
def python_hears_of_it(monkeypatch):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # whatever came
    signal.signal(signal.SIGINT, before)


def test_it_comes_at_the_end():
    passed = []
    with pytest.raises(KeyboardInterrupt), defer_sigint():
        signal.raise_signal(signal.SIGINT)
        passed.append(True)
    assert passed
    with defer_sigint():
        passed.append(True)
    assert passed == [True, True]


def test_it_is_nothing_to_other_threads():
    seen = []

    @defer_sigint()
    def look():
        seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]


def test_a_pool_is_never_left_in_the_middle(tmp_path):
    """What the writers call in this thread stands for all that they do there."""
    done = []

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        done.append(arguments)

    with pytest.raises(KeyboardInterrupt), FileWriter(1) as files:
        files.submit(tmp_path / "a", lambda: b"a", interrupted)
    assert done == [(None,)] and (tmp_path / "a").read_bytes() == b"a"

    shard = Shard("a.zip", "a.incomplete.zip")
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, "zip", 1, interrupted, interrupted) as shards:
        shards.submit(shard, lambda: [("a", b"a")])
    assert len(done) == 3 and (tmp_path / "a.zip").exists()
