"""Known files of tar archives, some of which mean harm."""

import io
import os
import subprocess
import sys
import tarfile
import tempfile
import tracemalloc
from pathlib import Path

import pytest
from helpers import ROOT

from dm_generations.errors import UserError
from dm_generations.weights.tar import extract

WANTED = {"config.yaml": "config.yaml", "vocab.json": "tokenizer/vocab.json"}


def pack(path, *members, **options):
    """Write pairs of name (or header) and content."""
    with tarfile.open(path, "w:gz" if path.suffix != ".tar" else "w", **options) as archive:
        for header, content in members:
            info = header if isinstance(header, tarfile.TarInfo) else tarfile.TarInfo(header)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def header(name, kind, **fields):
    info = tarfile.TarInfo(name)
    info.type = kind
    for field, value in fields.items():
        setattr(info, field, value)
    return info


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz"])
def test_wanted_files_alone_are_extracted_once(tmp_path, name):
    path = pack(tmp_path / name, ("x/config.yaml", b"a: 1"), ("x/y/vocab.json", b"{}"), ("x/other", b"more"))
    folder = extract(path, WANTED)
    found = {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert found == {"config.yaml": b"a: 1", "tokenizer/vocab.json": b"{}"}
    assert extract(path, WANTED) == folder and name in folder.name
    pack(path, ("config.yaml", b"another text"))
    assert (extract(path, WANTED) / "config.yaml").read_bytes() == b"another text"


@pytest.mark.parametrize("name", ["../config.yaml", "/config.yaml", "a/../../config.yaml"])
def test_no_name_leads_out_of_the_folder(tmp_path, name):
    folder = extract(pack(tmp_path / "a.tar", (name, b"a: 1")), WANTED)
    assert [file.name for file in folder.rglob("*")] == ["config.yaml"]
    assert [file.name for file in tmp_path.iterdir()] == ["a.tar"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE])
def test_what_is_not_a_plain_file_is_left(tmp_path, kind):
    path = pack(tmp_path / "a.tar", (header("config.yaml", kind, linkname="/etc/passwd"), b""))
    assert list(extract(path, WANTED).iterdir()) == []


@pytest.mark.parametrize(
    "kind", [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE], ids=str
)
def test_a_header_of_any_length_takes_no_memory(tmp_path, kind):
    path = pack(tmp_path / "a.tar.gz", (header("name", kind), bytes(200 << 20)), ("config.yaml", b"a: 1"))
    tracemalloc.start()
    with pytest.raises(UserError, match=r"a\.tar\.gz is damaged"):
        extract(path, WANTED)
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()


def test_a_map_of_a_sparse_file_is_a_header_too(tmp_path):
    names = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "config.yaml"}
    member = header("config.yaml", tarfile.REGTYPE, pax_headers=names | {"GNU.sparse.realsize": "1"})
    numbers = b"9999999\n" + b"0\n" * (2 << 20)
    path = pack(tmp_path / "a.tar.gz", (member, numbers + bytes(-len(numbers) % 512)), format=tarfile.PAX_FORMAT)
    with pytest.raises(UserError, match=r"a\.tar\.gz is damaged"):
        extract(path, WANTED)


def test_a_sparse_file_said_to_be_large_allows_no_longer_headers(tmp_path):
    names = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "a"}
    member = header("a", tarfile.REGTYPE, pax_headers=names | {"GNU.sparse.realsize": str(1 << 40)})
    sparse = member, b"1\n0\n0\n".ljust(512, b"\0")
    long_header = header("name", tarfile.XHDTYPE), bytes(4 << 20)
    path = pack(tmp_path / "a.tar", sparse, long_header, ("config.yaml", b"a: 1"), format=tarfile.PAX_FORMAT)
    with pytest.raises(UserError, match=r"a\.tar is damaged"):
        extract(path, WANTED)


@pytest.mark.skipif(sys.platform == "win32", reason="there the user's temporary folders are the system's to clean")
def test_folders_of_killed_processes_are_removed_and_those_in_use_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    path = pack(tmp_path / "a.tar", ("config.yaml", b"a: 1"))
    program = [sys.executable, ROOT / "tests" / "programs" / "extract_and_wait.py", path]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "temporary")}
    with subprocess.Popen(program, env=environment, stdout=subprocess.PIPE, text=True) as process:
        theirs = Path(process.stdout.readline().strip())
        os.utime(theirs, (0, 0))
        own = extract(path, WANTED)
        assert sorted(theirs.parent.iterdir()) == sorted([own, theirs])
        process.kill()
        process.wait()
        assert theirs.exists()
        pack(path, ("config.yaml", b"another"))
        later = extract(path, WANTED)
        assert sorted(theirs.parent.iterdir()) == sorted([own, later])


def test_large_files_are_refused_before_they_are_written(tmp_path):
    path = pack(tmp_path / "a.tar.gz", ("config.yaml", bytes(2000)))
    with pytest.raises(UserError, match=r"config\.yaml takes 2,000 bytes"):
        extract(path, WANTED, max_bytes=1999)
    assert extract(path, WANTED, max_bytes=2000)


def test_an_archive_that_ends_early_is_damaged(tmp_path):
    path = pack(tmp_path / "a.tar", ("config.yaml", bytes(5000)))
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UserError, match=r"a\.tar is damaged"):
        extract(path, WANTED)
