"""Archives from an address and from the hub."""

import contextlib
import hashlib
import http.server
import sqlite3
import sys
import threading
import types

import pytest
from archive_kit import fill, new_image

from dm_generations import Archive
from dm_generations.atomic_io import lock_file
from dm_generations.cli import main
from dm_generations.cli.decode import find_out_dir
from dm_generations.errors import UserError


class Handler(http.server.BaseHTTPRequestHandler):
    """Gives out `content` for every path that does not begin with /missing, or at most `cut` bytes of it at a time.

    It names a version of the file if it has a `tag`, and then gives ranges if `has_ranges`; its size if `has_size`.
    """

    content = b""
    missing_bytes = 0
    cut: int | None = None
    tag: str | None = None
    has_ranges = False
    has_size = True
    requests: list[str]
    sent: list[int]

    def do_GET(self):
        self.requests.append(self.path)
        size, start = len(self.content) + self.missing_bytes, 0
        wanted = self.headers.get("Range", "")
        if self.has_ranges and wanted and self.headers.get("If-Range") == self.tag:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        self.send_response(404 if self.path.startswith("/missing") else 206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        if self.tag is not None:
            self.send_header("ETag", self.tag)
        if self.has_size:
            self.send_header("Content-Length", str(size - start))
        self.end_headers()
        rest = self.content[start:] if self.cut is None else self.content[start : start + self.cut]
        self.sent.append(len(rest))
        with contextlib.suppress(ConnectionError):  # of who has asked
            self.wfile.write(rest)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def archive_file(tmp_path):
    path = tmp_path / "there.db"
    with Archive.create(path) as archive:
        fill(archive, new_image(0), new_image(1))
    return path


@pytest.fixture
def server(archive_file):
    handler = type("ThisHandler", (Handler,), {"content": archive_file.read_bytes(), "requests": [], "sent": []})
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as served:
        thread = threading.Thread(target=served.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{served.server_port}", handler
        served.shutdown()
        thread.join()


def test_the_archive_that_ships_and_a_path(archive_file):
    with Archive.load() as archive:
        assert archive.count() > 0
    for source in (archive_file, str(archive_file)):
        with Archive.load(source) as archive:
            assert archive.count() == 2
    with pytest.raises(UserError, match="nothing"):
        Archive.load("nothing.db")


@pytest.mark.parametrize("path", ["a/mine.db", "..%2f..%2fmine.db", "download?file=1", "", "%00%0a.db"])
def test_an_address_is_stored_in_the_folder_once(server, tmp_path, path):
    address, handler = server
    folder = tmp_path / "new" / "folder"
    for _ in range(2):
        with Archive.load(f"{address}/{path}", folder) as archive:
            assert archive.count() == 2 and archive.path.parent == folder
    assert len(handler.requests) == 1 == len(list(folder.iterdir()))
    assert {each.name for each in tmp_path.iterdir()} == {"there.db", "new"}


@pytest.mark.parametrize(("content", "missing_bytes"), [(b"<html>not found</html>", 0), (None, 100), (b"", 0)])
def test_what_is_no_archive_or_ends_early_leaves_nothing(server, tmp_path, content, missing_bytes):
    address, handler = server
    handler.content, handler.missing_bytes = handler.content if content is None else content, missing_bytes
    with pytest.raises(UserError, match="mine"):
        Archive.load(f"{address}/mine.db", tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("has_ranges", [True, False])
def test_a_download_that_ended_early_goes_on(has_ranges, server, tmp_path):
    address, handler = server
    handler.tag, handler.has_ranges, handler.cut = '"1"', has_ranges, len(handler.content) - 5000
    with pytest.raises(UserError, match="early"):
        Archive.load(f"{address}/mine.db", tmp_path / "new")
    (part,) = (tmp_path / "new").iterdir()
    assert part.suffix != ".db" and part.stat().st_size == handler.cut
    handler.cut, handler.sent = None, []
    with Archive.load(f"{address}/mine.db", tmp_path / "new") as archive:
        assert archive.count() == 2 and archive.path.read_bytes() == handler.content
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["mine.db"]
    assert handler.sent[-1] == (5000 if has_ranges else len(handler.content))


def test_a_file_that_has_changed_is_not_put_together_of_two(server, tmp_path):
    address, handler = server
    handler.tag, handler.has_ranges, handler.cut = '"1"', True, 9000
    with pytest.raises(UserError, match="early"):
        Archive.load(f"{address}/mine.db", tmp_path / "new")
    handler.tag, handler.cut = '"2"', None
    handler.content = handler.content[:100] + bytes(100) + handler.content[200:]
    with pytest.raises(UserError):  # it is damaged, but whole
        Archive.load(f"{address}/mine.db", tmp_path / "new")
    assert (tmp_path / "new" / "mine.db").read_bytes() == handler.content


@pytest.mark.parametrize("tag", ['W/"1"', None])
def test_nothing_is_kept_of_a_file_without_a_version(tag, server, tmp_path):
    address, handler = server
    handler.tag, handler.has_ranges, handler.cut = tag, True, 9000
    with pytest.raises(UserError, match="early"):
        Archive.load(f"{address}/mine.db", tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_half_a_file_is_noticed_without_its_size(server, tmp_path):
    address, handler = server
    handler.has_size, handler.cut = False, 4096
    with pytest.raises(UserError, match="early"):
        Archive.load(f"{address}/mine.db", tmp_path / "new")
    handler.cut = None
    with Archive.load(f"{address}/mine.db", tmp_path / "new") as archive:
        assert archive.count() == 2


def test_a_hash_is_checked_when_it_is_downloaded_and_later(server, tmp_path):
    address, handler = server
    digest = hashlib.sha256(handler.content).hexdigest()
    for wrong in ("0" * 64, "1", "md5=1"):
        with pytest.raises(UserError):
            Archive.load(f"{address}/mine.db#sha256={wrong}", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["there.db"]
    for _ in range(2):
        Archive.load(f"{address}/mine.db#sha256={digest.upper()}", tmp_path).close()
    assert len(handler.requests) == 2
    with pytest.raises(UserError, match="0000"):
        Archive.load(f"{address}/mine.db#sha256={'0' * 64}", tmp_path)
    assert (tmp_path / "mine.db").read_bytes() == handler.content


def test_two_downloads_of_one_file_do_not_mix(server, tmp_path, monkeypatch):
    address, handler = server
    handler.tag, handler.cut = '"1"', 9000
    with pytest.raises(UserError, match="early"):
        Archive.load(f"{address}/mine.db", tmp_path / "new")
    (part,) = (tmp_path / "new").iterdir()
    with open(part, "rb+") as file:
        lock_file(file)
        with pytest.raises(UserError, match="another"):
            Archive.load(f"{address}/mine.db", tmp_path / "new")
    assert part.stat().st_size == 9000


def test_commands_take_addresses(server, tmp_path, monkeypatch, capsys):
    address, handler = server
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for command in (["info"], ["list", "--limit", "1"], ["verify"], ["export", "--to", "npy", "--out", "out.npy"]):
        assert main([*command[:1], f"{address}/there.db", *command[1:]]) == 0
    assert len(handler.requests) == 1
    assert main(["info", f"{address}/missing.db"]) == 1
    assert main(["info", "http://127.0.0.1:1/a.db"]) == 1
    assert main(["score", "--db", f"{address}/there.db"]) == 1  # it would change it
    assert all(line.startswith("error: ") for line in capsys.readouterr().err.splitlines()[-3:])


@pytest.mark.parametrize("source", ["{}/missing.db", "ftp://host/a.db", "file:///etc/passwd", "http://[", "hf://x"])
def test_other_addresses_are_errors_of_one_line(server, tmp_path, source):
    with pytest.raises(UserError) as error:
        Archive.load(source.format(server[0]), tmp_path)
    assert "\n" not in str(error.value)


def test_the_folder_of_a_decoded_address_has_its_name():
    assert str(find_out_dir("https://host/a%20b/mine.db?x=1#sha256=0")) == "mine"
    assert str(find_out_dir("hf://datasets/owner/name/folder/mine.db", "tar")) == "mine-tar"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("hf://datasets/owner/name/a.db", ("owner/name", "a.db", "dataset", None)),
        ("hf://datasets/owner/na.me@v1/folder/a.db", ("owner/na.me", "folder/a.db", "dataset", "v1")),
        ("hf://owner/name/a.db", ("owner/name", "a.db", "model", None)),
    ],
)
def test_a_file_on_the_hub(archive_file, monkeypatch, source, expected):
    asked = []

    def download(repository, file, *, repo_type, revision, local_files_only=False):
        if local_files_only and not asked:
            raise FileNotFoundError
        if not local_files_only:
            asked.append((repository, file, repo_type, revision))
        return str(archive_file)

    hub = types.SimpleNamespace(repo_info=lambda *repository, **options: None)
    stub = types.SimpleNamespace(hf_hub_download=download, HfApi=lambda: hub)
    monkeypatch.setitem(sys.modules, "huggingface_hub", stub)
    for _ in range(2):
        with Archive.load(source) as archive:
            assert archive.count() == 2
    assert asked == [expected]
    with pytest.raises(UserError, match="0000"):
        Archive.load(f"{source}#sha256={'0' * 64}")


def test_a_downloaded_file_is_still_checked(server, tmp_path):
    address, handler = server
    database = tmp_path / "other.db"
    connection = sqlite3.connect(database)
    connection.execute("CREATE TABLE pages (a)")
    connection.commit()
    connection.close()
    handler.content = database.read_bytes()
    with pytest.raises(UserError, match="other_name"):
        Archive.load(f"{address}/other_name.db", tmp_path / "new")
