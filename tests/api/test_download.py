"""Archives from an address and from the hub."""

import http.server
import sqlite3
import sys
import threading
import types

import pytest
from archive_kit import fill, new_image

from dm_generations import Archive
from dm_generations.errors import UserError


class Handler(http.server.BaseHTTPRequestHandler):
    """Gives out `content` for every path that does not begin with /missing."""

    content = b""
    missing_bytes = 0
    requests: list[str]

    def do_GET(self):
        self.requests.append(self.path)
        self.send_response(404 if self.path.startswith("/missing") else 200)
        self.send_header("Content-Length", str(len(self.content) + self.missing_bytes))
        self.end_headers()
        self.wfile.write(self.content)

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
    handler = type("ThisHandler", (Handler,), {"content": archive_file.read_bytes(), "requests": []})
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


@pytest.mark.parametrize("source", ["{}/missing.db", "ftp://host/a.db", "file:///etc/passwd", "http://[", "hf://x"])
def test_other_addresses_are_errors_of_one_line(server, tmp_path, source):
    with pytest.raises(UserError) as error:
        Archive.load(source.format(server[0]), tmp_path)
    assert "\n" not in str(error.value)


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

    def download(repository, file, *, repo_type, revision):
        asked.append((repository, file, repo_type, revision))
        return str(archive_file)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(hf_hub_download=download))
    with Archive.load(source) as archive:
        assert archive.count() == 2
    assert asked == [expected]


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
