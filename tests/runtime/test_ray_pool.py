"""A pool of processes on a real Ray cluster: in order, nothing lost, nothing twice, whatever dies."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from helpers import ROOT
from ray_kit import ENVIRONMENT, wait_for

from dm_generations.errors import UserError

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="finds processes in /proc"),
]


@pytest.fixture
def start(ray_cluster, tmp_path):
    """Starts a driver that squares numbers on the cluster."""
    running = []

    def start(*flags, folder=tmp_path / "calls"):
        folder.mkdir(exist_ok=True)
        program = ROOT / "tests" / "programs" / "ray_squares.py"
        command = [sys.executable, program, ray_cluster.address, folder, *map(str, flags)]
        running.append(subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True))
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.wait()
        process.stdout.close()


def numbers(text):
    return [int(line) for line in text.splitlines()]


def squares(count):
    return [number**2 for number in range(count)]


@pytest.mark.slow
def test_a_killed_worker_loses_nothing_and_repeats_nothing(start, tmp_path):
    printed, _ = start("--count", 12, "--killed", 5).communicate(timeout=400)
    assert numbers(printed) == squares(12)
    calls = [path.name.partition("-")[0] for path in (tmp_path / "calls").iterdir()]
    assert calls.count("5") >= 2
    assert calls.count("0") == 1  # its result had come


@pytest.mark.slow
def test_an_error_of_a_worker_is_one_line(start):
    printed, _ = start("--refused", 3).communicate(timeout=400)
    lines = printed.splitlines()
    assert numbers("\n".join(lines[:-1])) == squares(3)
    assert "3 is refused" in lines[-1]


@pytest.mark.slow
def test_workers_that_die_of_the_same_work_again_and_again_are_one_line(start, tmp_path):
    printed, _ = start("--count", 5, "--killed", 2, "--always").communicate(timeout=400)
    lines = printed.splitlines()
    found = numbers("\n".join(lines[:-1]))
    assert found == squares(2)[: len(found)]  # the last one may be lost with its worker each time
    assert lines[-1].startswith("error: ")


@pytest.mark.slow
def test_a_lost_node_loses_nothing(start, ray_cluster):
    ray_cluster.add_node()
    process = start("--count", 60, "--seconds", 0.3)
    first = process.stdout.readline()
    wait_for(lambda: len(ray_cluster.workers()) == 2)
    ray_cluster.lose_node()
    printed, _ = process.communicate(timeout=400)
    assert numbers(first + printed) == squares(60)


@pytest.mark.slow
def test_workers_end_with_a_killed_driver(start, ray_cluster):
    process = start("--count", 1000, "--seconds", 0.1)
    process.stdout.readline()
    assert ray_cluster.workers()
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(lambda: not ray_cluster.workers())


@pytest.fixture
def pool():
    return pytest.importorskip("dm_generations.runtime.ray_pool").RayPool


def enter(pool, address):
    started = time.monotonic()
    with pytest.raises(UserError, match=address), pool(address):
        pass
    assert time.monotonic() - started < 30


def test_an_address_where_nobody_answers_is_one_line(pool):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    enter(pool, f"127.0.0.1:{port}")


@pytest.mark.parametrize("address", ["mine.db", "host:", ":1", "host:port", "host:-1", "ray://127.0.0.1:1"])
def test_what_is_no_address_is_one_line(pool, address):
    enter(pool, address)
