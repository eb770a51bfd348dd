"""Decodes of many images: a slow disk holds the device back, memory stays flat, finished work costs nothing."""

import os
import subprocess
import threading
import time

import pytest
from decode_kit import random_tokens, read_images, write_archive_2022
from faults_kit import MODES, Command
from helpers import ROOT
from tiny import CODEBOOK_SIZE, GRID

from dm_generations.export import writers as writers_module
from dm_generations.inference.decoder import Decoder

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("mode", ["images", "gallery", "tar", "zip"])
def test_a_disk_that_stands_still_holds_the_device_back(command, tmp_path, monkeypatch, mode):
    moves, started, statuses = threading.Event(), [], []
    start = Decoder.start

    def once_it_moves(write):
        return lambda *arguments: (moves.wait(60), write(*arguments))[1]

    def counting_start(codec, tokens, keys=None):
        started.append(len(tokens))
        return start(codec, tokens, keys)

    monkeypatch.setattr(writers_module, "write_atomic", once_it_moves(writers_module.write_atomic))
    for container in writers_module.CONTAINERS.values():
        monkeypatch.setattr(container, "add", once_it_moves(container.add))
    monkeypatch.setattr(Decoder, "start", counting_start)
    run = threading.Thread(target=lambda: statuses.append(command.run(tmp_path / "out", *MODES[mode])))
    run.start()
    try:
        before = -1
        while not started or before != len(started):  # until nothing new starts any more
            before = len(started)
            time.sleep(0.5)
        # Two batches of 16, the queue of two threads, and some to spare; not 1,500.
        assert sum(started) <= 100
    finally:
        moves.set()
        run.join()
    assert statuses == [0] and sum(started) == 1500
    if mode == "images":
        assert len(read_images(tmp_path / "out")) == 1500


def test_finished_images_need_no_codec(decode, tmp_path):
    assert decode()[0] == 0
    assert decode(codec=tmp_path / "nowhere") == (0, "")


def test_what_is_there_is_not_decoded_again(decode, tmp_path, monkeypatch):
    assert decode("--n-best", "4") == (0, "")
    started, start = [], Decoder.start
    monkeypatch.setattr(
        Decoder, "start", lambda codec, tokens, keys: started.append(len(tokens)) or start(codec, tokens, keys)
    )
    (tmp_path / "out" / "0001_a boat" / "0001_k=50,p=1.0,t=1.0,c=10.0_02_None.png").write_bytes(b"")  # a power cut
    assert decode() == (0, "")
    assert sum(started) == 3 and len(read_images(tmp_path / "out")) == 6


@pytest.fixture
def large(codec, tmp_path):
    """A function: the decode of an archive of so many images, 128 of each prompt."""

    def make(image_count):
        tokens = random_tokens(128, GRID**2, CODEBOOK_SIZE)
        prompts = tuple(f"boat number {number}" for number in range(image_count // 128))
        return Command(write_archive_2022(tmp_path / f"{image_count}.db", tokens, prompts), codec)

    return make


def peak_memory(command, out) -> int:
    """Bytes that a decode in a process of its own held at most; it must succeed."""
    process = subprocess.Popen(command.line(out), cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss * 1024


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="ru_maxrss is in KB on Linux only")
@pytest.mark.parametrize(
    ("image_count", "allowed"),
    [
        pytest.param(8_192, 30e6, marks=pytest.mark.slow),
        pytest.param(71_680, 100e6, marks=[pytest.mark.slow, pytest.mark.timeout(1200)]),
    ],
)
def test_memory_is_flat(large, tmp_path, image_count, allowed):
    few = peak_memory(large(1_024), tmp_path / "few")
    more = peak_memory(large(image_count), tmp_path / "many")
    assert more - few < allowed, f"{few / 1e6:.0f} MB for 1,024 images, {more / 1e6:.0f} MB for {image_count:,}"
