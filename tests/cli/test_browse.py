"""`browse` as a process: what it prints, serves, and how it ends."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import httpx2
import pytest
from archive_kit import fill, new_image
from helpers import ROOT

from dm_generations.archive import Archive
from dm_generations.cli import main
from dm_generations.errors import INTERRUPTED, INTERRUPTED_LINE


@contextlib.contextmanager
def start(*arguments: object) -> Iterator[subprocess.Popen]:
    """Start a server, which does not outlive the block."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # also where tests run in a shell's background
    try:
        command = [sys.executable, "-m", "dm_generations", "browse", "--no-open", "--cpu-only", *map(str, arguments)]
        pipe = subprocess.PIPE
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    with process:
        try:
            yield process
        finally:
            process.kill()


def end(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (INTERRUPTED, f"{INTERRUPTED_LINE}\n")


def address_of(process: subprocess.Popen) -> str:
    match = re.search(r"http://\S+", process.stdout.readline())
    assert match, process.communicate(timeout=60)
    return match[0]


@pytest.mark.e2e
@pytest.mark.skipif(os.name != "posix", reason="needs SIGINT for one process")
def test_a_server_from_start_to_end(tmp_path):
    path = shutil.copy(ROOT / "archive" / "emoji.db", tmp_path / "e.db")
    with start("--db", path, "--port", 0) as process, httpx2.Client(timeout=120) as client:
        address = address_of(process)
        assert address.startswith("http://127.0.0.1:") and "token" not in address
        page = client.get(address)
        assert page.status_code == 200 and "<html" in page.text
        summary = client.get(f"{address}api/summary").json()
        group = client.get(f"{address}api/groups", params={"prompt": summary["first"]["prompt"]}).json()["groups"][0][0]
        answer = client.get(f"{address}api/images", params={"group": group}).json()["groups"][group]
        for image in answer["images"]:
            found = client.get(f"{address}image/{image[9]}/{image[7]}")
            assert found.status_code == 200 and found.content.startswith(b"RIFF")
        with Archive.open(path, "w") as archive:
            fill(archive, new_image(1))
        changes = client.get(f"{address}api/changes").json()
        assert changes["revision"] > summary["revision"]
        assert client.get(f"{address}api/summary").json()["images"] == summary["images"] + 1
        large = client.post(f"{address}api/judgements", content=b" " * 50_000_000, headers={"X-Token": "wrong"})
        assert large.status_code in (403, 413)
        port = int(address.rstrip("/").rpartition(":")[2])
        assert main(["browse", "--db", str(path), "--port", str(port), "--no-open"]) == 1
        end(process)
    with pytest.raises(httpx2.TransportError):
        httpx2.get(address)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["e.db"]


@pytest.mark.e2e
@pytest.mark.skipif(os.name != "posix", reason="needs SIGINT for one process")
def test_with_a_host_the_address_has_a_token():
    with start("--port", 0, "--host", "127.0.0.1") as process, httpx2.Client(timeout=120) as client:
        address = address_of(process)
        assert client.get(address.partition("?")[0]).status_code == 403
        assert client.get(address, follow_redirects=True).status_code == 200
        end(process)


@pytest.mark.parametrize(
    "flags",
    [
        ["--db", "missing.db"],
        ["--db", "text.db"],
        ["--db", "."],
        ["--host", "no such host.invalid"],
        ["--host", "203.0.113.7"],
        ["--host", "a" * 300],
        ["--codec", "missing"],
    ],
    ids=lambda flags: flags[1][:20],
)
def test_what_cannot_be_served_is_one_line(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.db").write_text("no archive")
    assert main(["browse", "--port", "0", "--no-open", "--cpu-only", *flags]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1 and captured.err.startswith("error: ")


def test_a_port_that_is_taken_is_one_line(capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["browse", "--port", str(port), "--no-open", "--cpu-only"]) == 1
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1 and str(port) in captured.err


@pytest.mark.parametrize("port", ["-1", "65536", "x"])
def test_a_port_that_is_none_is_refused(port):
    with pytest.raises(SystemExit) as ended:
        main(["browse", "--port", port])
    assert ended.value.code == 2
