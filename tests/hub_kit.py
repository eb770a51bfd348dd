"""A server on 127.0.0.1 that gives folders out as the Hugging Face hub does, for its own library."""

import hashlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

COMMIT = "a" * 40


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers what huggingface_hub asks for when it downloads; `root` holds the repositories, owner/name."""

    protocol_version = "HTTP/1.1"
    root = Path()

    def log_message(self, *_):
        pass

    def answer(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        parts = urllib.parse.unquote(self.path.split("?")[0]).strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        repository = "/".join(parts[2:4] if is_api else parts[:2])
        folder = self.root / repository
        if not folder.is_dir():
            self.answer(b"{}", 404)
        elif is_api:
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            names = {path.relative_to(folder).as_posix(): path for path in files}
            tree = [{"type": "file", "path": n, "size": p.stat().st_size, "oid": _digest(p)} for n, p in names.items()]
            about = {"id": repository, "modelId": repository, "sha": COMMIT, "private": False, "tags": []}
            about |= {"siblings": [{"rfilename": name} for name in names]}
            self.answer(json.dumps(tree if "tree" in parts[4:5] else about).encode(), Content_Type="application/json")
        else:
            file = folder.joinpath(*parts[4:])
            headers = {"ETag": f'"{_digest(file)}"', "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
            self.answer(file.read_bytes(), **headers)


def _digest(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextmanager
def serve(root: Path) -> Iterator[str]:
    """Serve the repositories in `root`; gives the address."""
    handler = type("Handler", (Handler,), {"root": root})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
