"""`browse`: the page of an archive, with images that are decoded when they are looked at."""

import argparse
import contextlib
import logging
import os
import secrets
import socket
import sys
import threading
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING

from dm_generations.archive import Archive
from dm_generations.cli.common import (
    add_archives,
    archive_paths,
    given_archives,
    prepare_device,
    print_line,
)
from dm_generations.cli.decoder_options import add_decoder_options, load_diffusion
from dm_generations.errors import UserError, one_line
from dm_generations.paths import shipped

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from dm_generations.inference.diffusion import Diffusion
    from dm_generations.models.loading import Checkpoint

    Decoders = tuple[Checkpoint, Diffusion | None]

HELP = "look at an archive in a browser, and judge its images"
DESCRIPTION = """\
Serve the page of an archive, or of several side by side, to a browser on this machine. Images are decoded when they are
looked at, and what you say of them is stored in their archive. Images that are added meanwhile appear. Ctrl-C stops it.
"""
EPILOG = """\
example:
  python -m dm_generations browse --db mine.db
  python -m dm_generations browse before.db after.db
"""
_PORT = 8765
_LOOPBACK = "127.0.0.1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    add = parser.add_argument
    add_archives(parser, "archive to look at")
    add("--codec", metavar="PATH", help="codec that the images were made with (default: the embedded one)")
    add("--port", type=_port, default=_PORT, metavar="N", help=f"port to listen on, 0 for any (default: {_PORT})")
    add(
        "--host",
        metavar="ADDRESS",
        help="address to listen on, 0.0.0.0 for all; others can then look at the archive and judge, if they have "
        "the token in the printed address (default: only this machine)",
    )
    add("--no-open", action="store_true", help="do not open a browser")
    add("--cpu-only", action="store_true", help="do not use accelerators")
    add_decoder_options(parser, guides=False)


def run(args: argparse.Namespace) -> int:
    """Run the command until Ctrl-C."""
    try:
        import uvicorn
    except ImportError as error:
        raise UserError("browse needs a web server: pip install 'dm-generations[browse]'") from error
    paths = archive_paths(args)
    archives = {path: isinstance(given, Path) for path, given in zip(paths, given_archives(args), strict=True)}
    for path in paths:
        Archive.open(path).close()  # before anything takes time
    with contextlib.closing(_listen(args.host or _LOOPBACK, args.port)) as listener:
        is_named = args.codec is not None or args.decoder is not None
        decoders = _load(args) if is_named else None  # a wrong one is an error before all else
        token = secrets.token_urlsafe(24)
        address = _address(args.host, listener, token)
        print_line(f"Serving {', '.join(map(str, paths))} at {address} (Ctrl-C stops)")
        sys.stdout.flush()
        if not args.no_open and _has_browser():
            # Its request waits in the socket's queue while the rest is loaded.
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        config = uvicorn.Config(
            _make_app(archives, decoders or _load(args), token, args.host),
            loop="asyncio",
            http="h11",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=1,
            h11_max_incomplete_event_size=1 << 18,
        )
        logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # of bad requests it would print a line each
        # It stops at Ctrl-C, and then raises the signal again, for the command line to report.
        uvicorn.Server(config).run(sockets=[listener])
    return 0


def _load(args: argparse.Namespace) -> "Decoders":
    prepare_device(args.cpu_only)
    from dm_generations.models.loading import load_checkpoint

    return load_checkpoint(args.codec, "codec"), load_diffusion(args)


def _make_app(archives: dict[Path, bool], decoders: "Decoders", token: str, host: str | None) -> "Starlette":
    """Make the server of archives; with each is whether judgements may be stored in it."""
    from dm_generations.server.app import PageServer
    from dm_generations.server.archives import ServedArchives
    from dm_generations.server.data import ServedArchive
    from dm_generations.server.images import ImageCache, ImageService, hash_of

    codec, diffusion = decoders
    served = [ServedArchive(path, codec, diffusion, is_writable) for path, is_writable in archives.items()]
    archive = ServedArchives(served) if len(served) > 1 else served[0]
    cache = ImageCache(hash_of(codec, diffusion))
    images = ImageService(codec, lambda md5s: archive.call(archive.load_tokens, md5s), cache, diffusion)
    page = shipped("samplebrowser.html").read_text(encoding="utf-8")
    return PageServer(archive, images, page, token, needs_token=host is not None).make_app(host)


def _listen(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Raises:
        UserError: The port is taken, or the host is not this machine's.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host {host!r:.100}: {one_line(error)}; give an address of this machine") from error
    try:
        if os.name == "posix":  # elsewhere it would let two programs listen on one port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise UserError(f"{host}, port {port}: {one_line(error)}; choose another --port, or 0 for any") from error
    return listener


def _address(host: str | None, listener: socket.socket, token: str) -> str:
    name, port = listener.getsockname()[:2]
    if name in ("0.0.0.0", "::"):
        name = socket.gethostname()
    elif ":" in name:
        name = f"[{name}]"
    return f"http://{name}:{port}/" + ("" if host is None else f"?token={token}")


def _has_browser() -> bool:
    """Return whether there is a screen; without one, `webbrowser` would start a browser in this terminal."""
    is_linux = sys.platform.startswith("linux")
    return not is_linux or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"))


def _port(text: str) -> int:
    number = int(text)
    if not 0 <= number <= 65535:
        raise argparse.ArgumentTypeError(f"{number} is not between 0 and 65535")
    return number


_port.__name__ = "whole number"  # argparse names the type when int() fails
