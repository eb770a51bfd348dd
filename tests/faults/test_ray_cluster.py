"""Commands on a real Ray cluster whose workers and drivers are killed: the same files and rows as of one process."""

import os
import signal
import subprocess

import pytest
from decode_kit import all_files
from faults_kit import bytes_under, without_progress
from helpers import ROOT
from ray_kit import wait_for

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="finds processes in /proc"),
]


@pytest.fixture
def run(command, ray_cluster):
    """Starts the decode of 1,500 images on the cluster."""
    running = []

    def run(out, *flags):
        line = command.line(out, "--ray", ray_cluster.address, *flags)
        running.append(subprocess.Popen(line, cwd=ROOT, stderr=subprocess.PIPE, text=True))
        return running[-1]

    yield run
    for process in running:
        process.kill()
        process.communicate()


def test_a_decode_goes_on_when_its_worker_is_killed(run, ray_cluster, whole, tmp_path):
    process = run(tmp_path / "out")
    wait_for(lambda: bytes_under(tmp_path / "out") or process.poll() is not None)
    for worker in ray_cluster.workers():
        os.kill(worker, signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "lost" in without_progress(errors)
    assert all_files(tmp_path / "out") == whole


@pytest.mark.slow
def test_a_decode_whose_driver_was_killed_is_continued(run, whole, tmp_path):
    process = run(tmp_path / "out")
    wait_for(lambda: bytes_under(tmp_path / "out") or process.poll() is not None)
    process.kill()
    process.communicate()
    assert 0 < len(all_files(tmp_path / "out")) < len(whole)
    process = run(tmp_path / "out")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert all_files(tmp_path / "out") == whole
