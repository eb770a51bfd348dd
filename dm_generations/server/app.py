"""The routes of the page's server, and who may use them.

The page's own script is the only client that is wanted. Other web sites, open in the same browser, may try to read or
write here: their requests have another Origin and no token, or, by DNS rebinding, a Host that is not this machine.
"""

import asyncio
import contextlib
import hmac
import ipaddress
import json
import logging
import math
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dm_generations.archive.browse import MAX_IMAGES, Query
from dm_generations.errors import UserError, one_line
from dm_generations.export.writers import Zip
from dm_generations.server.archives import ServedArchives
from dm_generations.server.data import BadRequestError, ServedArchive
from dm_generations.server.images import ImageService, UndecodableError, UnknownImageError, draw_notice

MAX_BODY_BYTES: Final = 4 << 20
MAX_PROMPTS: Final = 2000  # of one answer
MAX_GROUPS: Final = 2000
MAX_WORDS: Final = 1000  # characters of a search
MAX_ZIPPED: Final = 2000  # images
ZIP_PROBLEMS: Final = "not-decoded.txt"  # in a zip: which images are missing, and why
TOKEN_META: Final = '<meta name="live" content="">'
_MAX_ID: Final = 2**63 - 1
_ZIP_CHUNK: Final = 64  # images that are waited for at a time
_ZIP_MEMORY_BYTES: Final = 16 << 20  # a larger zip is made on disk
_HEADERS: Final = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
]
_logger = logging.getLogger(__name__)

Endpoint = Callable[[Request], Awaitable[Response]]


class Guard:
    """ASGI middleware: answers only requests to this machine's own names, and adds headers to every answer."""

    def __init__(self, app: ASGIApp, host: str | None):
        """Take the host that the server was told to listen on; None for the loopback."""
        self._app = app
        self._names = {"localhost"}
        if host is not None:
            self._names |= {name.lower() for name in (host, socket.gethostname(), socket.getfqdn())}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *_HEADERS]
            await send(message)

        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        app = (
            self._app
            if len(hosts) == 1 and self._is_own(hosts[0])
            else _answer_error(403, "this name is not this server's; use the address that it printed")
        )
        await app(scope, receive, send_with_headers)

    def _is_own(self, host: str) -> bool:
        """Return whether a Host header names this machine: a site that rebinds its DNS name cannot send an address."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
            if name in self._names:
                return True
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


class PageServer:
    """The page of one archive.

    Attributes:
        token: Needed to write, and with `needs_token` to see anything.
        needs_token: Whether the page itself asks for it; its cookie is for the rest.
    """

    def __init__(
        self, archive: ServedArchive | ServedArchives, images: ImageService, page: str, token: str, needs_token: bool
    ):
        """Take what is served.

        Args:
            archive: The archive, or several.
            images: Its images.
            page: The HTML page, with TOKEN_META.
            token: A secret.
            needs_token: Whether the token has to be in the address.
        """
        self.token = token
        self.needs_token = needs_token
        self._archive, self._images = archive, images
        self._page = page.replace(TOKEN_META, TOKEN_META.replace('""', f'"{token}"'), 1)

    def make_app(self, host: str | None) -> Starlette:
        """Return the ASGI application; `host` is what the server listens on, None for the loopback."""
        routes = [
            Route("/", _guarded(self.page)),
            Route("/api/summary", self._for_page(self.summary)),
            Route("/api/values", self._for_page(self.values)),
            Route("/api/prompts", self._for_page(self.prompts)),
            Route("/api/groups", self._for_page(self.groups)),
            Route("/api/images", self._for_page(self.images)),
            Route("/api/statistics", self._for_page(self.statistics)),
            Route("/api/changes", self._for_page(self.changes)),
            Route("/api/judgements", self._for_page(self.judgements), methods=["GET"]),
            Route("/api/judgements", self._for_page(self.judge), methods=["POST"]),
            Route("/api/zip", self._for_page(self.zip), methods=["POST"]),
            Route("/image/{codec}/{md5}", self._for_page(self.image)),
        ]
        handlers: Any = {HTTPException: _handle_http_error}
        guard = [Middleware(Guard, host=host)]
        return Starlette(routes=routes, middleware=guard, exception_handlers=handlers, lifespan=self._lifespan)

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        decoding = asyncio.create_task(self._images.run())
        try:
            yield
        finally:
            decoding.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await decoding
            self._archive.close()

    def _for_page(self, endpoint: Endpoint) -> Endpoint:
        """Answer an endpoint only to those who have the page's cookie."""

        async def check(request: Request) -> Response:
            if not _is_equal(request.cookies.get(_cookie_name(request), ""), self.token):
                raise HTTPException(403, "open the page first, by the address that the server printed")
            return await endpoint(request)

        return _guarded(check)

    async def page(self, request: Request) -> Response:
        """Answer the page, and give its cookie."""
        given = request.query_params.get("token")
        has_cookie = _is_equal(request.cookies.get(_cookie_name(request), ""), self.token)
        if given is not None and not _is_equal(given, self.token):
            raise HTTPException(403, "this token is wrong; use the address that the server printed")
        if self.needs_token and given is None and not has_cookie:
            raise HTTPException(403, "the address lacks its token; use the one that the server printed")
        response: Response
        if given is not None:  # so that it is in no history, bookmark or copied link
            response = RedirectResponse("/", 303)
        else:
            response = HTMLResponse(self._page, headers={"Cache-Control": "no-store"})
        # Not "strict": then a link to the page, clicked in another one, would not send it.
        response.set_cookie(_cookie_name(request), self.token, httponly=True, samesite="lax")
        return response

    async def summary(self, request: Request) -> Response:
        """Answer what the page asks first."""
        return _json(await self._archive.call(self._archive.summary))

    async def values(self, request: Request) -> Response:
        """Answer all values of each axis."""
        return _json(await self._archive.call(self._archive.values))

    async def changes(self, request: Request) -> Response:
        """Answer the revision."""
        return _json(await self._archive.call(self._archive.changes))

    async def prompts(self, request: Request) -> Response:
        """Answer prompts."""
        ids = _whole_numbers(request, "id", MAX_PROMPTS)
        limit = _whole_number(request, "limit", 100, MAX_PROMPTS)
        search = request.query_params.get("search", "")[:MAX_WORDS]
        offset = _whole_number(request, "offset", 0)
        return _json(await self._archive.call(self._archive.prompts, search, offset, limit, ids))

    async def groups(self, request: Request) -> Response:
        """Answer the groups of prompts."""
        ids = _whole_numbers(request, "prompt", MAX_PROMPTS)
        return _json(await self._archive.call(self._archive.groups, ids))

    async def images(self, request: Request) -> Response:
        """Answer images of groups."""
        groups = request.query_params.getlist("group")
        if len(groups) > MAX_GROUPS:
            raise HTTPException(400, f"{len(groups)} groups are asked for, more than {MAX_GROUPS}")
        sort = request.query_params.get("sort", "score")
        if sort not in ("score", "seed", "time"):
            raise HTTPException(400, f"sort is {sort!r:.40}, not score, seed or time")
        query = Query(
            sort,
            _whole_number(request, "descending", 1, 1) == 1,
            _number(request, "min"),
            _number(request, "max"),
            _key(request),
            _whole_number(request, "limit", MAX_IMAGES, MAX_IMAGES),
            _whole_number(request, "offset", 0),
        )
        return _json(await self._archive.call(self._archive.images, groups, query))

    async def statistics(self, request: Request) -> Response:
        """Answer the scores by the values of an axis."""
        names = {
            **dict.fromkeys(("top_k", "top_p", "temperature", "cond_scale"), _number),
            **dict.fromkeys(("sc_prompt", "model", "archive"), _whole_number),
            "extra_settings": lambda request, name: request.query_params[name],
        }
        fixed = {name: read(request, name) for name, read in names.items() if name in request.query_params}
        prompt = _whole_number(request, "prompt") if "prompt" in request.query_params else None
        axis = request.query_params.get("axis", "")
        return _json(await self._archive.call(self._archive.statistics, axis, prompt, fixed))

    async def judgements(self, request: Request) -> Response:
        """Answer the judgements."""
        return _json(await self._archive.call(self._archive.judgements))

    async def judge(self, request: Request) -> Response:
        """Store judgements that the page sends."""
        return _json(await self._archive.call(self._archive.add_judgements, await self._read_own(request)))

    async def zip(self, request: Request) -> Response:
        """Answer images as a zip; the body lists the MD5s of their tokens."""
        md5s = await self._read_own(request)
        if not isinstance(md5s, list) or not all(isinstance(md5, str) and _is_hex(md5, 32) for md5 in md5s):
            raise HTTPException(400, "the body is not a list of MD5s")
        if not 0 < len(md5s) <= MAX_ZIPPED:
            raise HTTPException(400, f"{len(md5s)} images are asked for; a zip has 1 to {MAX_ZIPPED:,}")
        names = await self._archive.call(self._archive.file_names, list(dict.fromkeys(md5s)))
        file = tempfile.SpooledTemporaryFile(_ZIP_MEMORY_BYTES)  # noqa: SIM115  # closed after the answer
        try:
            await self._write_zip(Zip(file), names, [md5 for md5 in md5s if md5 not in names])
        except BaseException:
            file.close()
            raise
        size = file.tell()
        file.seek(0)
        headers = {"Content-Disposition": 'attachment; filename="images.zip"', "Content-Length": str(size)}
        headers["Cache-Control"] = "no-store"
        chunks = iter(lambda: file.read(1 << 16), b"")
        return StreamingResponse(
            chunks, media_type="application/zip", headers=headers, background=BackgroundTask(file.close)
        )

    async def _write_zip(self, archive: Zip, names: dict[str, str], unknown: list[str]) -> None:
        problems = [f"{md5}: there is no such image" for md5 in unknown]
        for first in range(0, len(names), _ZIP_CHUNK):
            part = list(names.items())[first : first + _ZIP_CHUNK]
            images = await asyncio.gather(*(self._images.get(md5) for md5, _ in part), return_exceptions=True)
            for (md5, name), image in zip(part, images, strict=True):
                if isinstance(image, bytes):
                    archive.add(name, image)
                elif isinstance(image, UserError):
                    problems.append(f"{md5}: {one_line(image)}")
                else:
                    raise image
        if problems:
            archive.add(ZIP_PROBLEMS, "".join(f"{line}\n" for line in problems).encode())
        archive.close()

    async def _read_own(self, request: Request) -> Any:
        """Return the JSON that the page itself sends; another site, or one without the token, is refused."""
        origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site", "same-origin")
        own = f"{request.url.scheme}://{request.headers['host']}"
        if (origin is not None and origin.lower() != own.lower()) or site not in ("same-origin", "none"):
            raise HTTPException(403, "another site may not write here")
        if not _is_equal(request.headers.get("x-token", ""), self.token):
            raise HTTPException(403, "the token is missing or wrong; load the page again")
        body = await _read_body(request)
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            raise HTTPException(400, f"the body is not JSON: {one_line(error)}") from error

    async def image(self, request: Request) -> Response:
        """Answer an image; it is not waited for when the client has gone."""
        codec, md5 = request.path_params["codec"], request.path_params["md5"]
        if not _is_hex(md5, 32):
            raise HTTPException(404, "there is no such image")
        if codec != self._images.codec_hash:
            raise HTTPException(404, f"this server decodes with codec {self._images.codec_hash}, not {codec!r:.40}")
        image = asyncio.ensure_future(self._images.get(md5))
        gone = asyncio.ensure_future(_wait_until_gone(request))
        try:
            await asyncio.wait({image, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not image.done():
                return Response(status_code=499)  # nobody reads it
            headers = {"Cache-Control": "private, max-age=31536000, immutable"}
            try:
                return Response(image.result(), media_type="image/webp", headers=headers)
            except UnknownImageError as error:
                raise HTTPException(404, str(error)) from error
            except UndecodableError as error:
                notice = draw_notice(str(error))
                return Response(notice, 422, {"Cache-Control": "no-store"}, "image/webp")
        finally:
            image.cancel()
            gone.cancel()


def _guarded(endpoint: Endpoint) -> Endpoint:
    """Turn exceptions into an answer of one line."""

    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except HTTPException:
            raise
        except BadRequestError as error:
            raise HTTPException(400, str(error)) from error
        except UserError as error:
            raise HTTPException(503, str(error)) from error
        except Exception as error:
            _logger.warning("%s: %s: %s", request.url.path, type(error).__name__, one_line(error))
            raise HTTPException(500, f"this is an error of the server: {one_line(error)}") from error

    return answer


async def _handle_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _json({"error": " ".join(error.detail.split())}, error.status_code, error.headers)


def _answer_error(status: int, text: str) -> ASGIApp:
    return _json({"error": text}, status)


def _json(content: Any, status: int = 200, headers: Any = None) -> Response:
    body = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return Response(body, status, {"Cache-Control": "no-store", **(headers or {})}, "application/json")


def _cookie_name(request: Request) -> str:
    """Return the name of the page's cookie; browsers share cookies among all ports of a host."""
    return f"dm-generations-{request.scope['server'][1]}"


def _is_equal(given: str, secret: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "replace"), secret.encode())


def _is_hex(text: str, length: int) -> bool:
    return len(text) == length and not text.strip("0123456789abcdef")


def _whole_number(request: Request, name: str, default: int = 0, most: int = _MAX_ID) -> int:
    text = request.query_params.get(name, "")
    if not text:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) <= most):
        raise HTTPException(400, f"{name} is {text!r:.40}, not a whole number up to {most:,}")
    return int(text)


def _whole_numbers(request: Request, name: str, most: int) -> list[int]:
    texts = request.query_params.getlist(name)
    if len(texts) > most:
        raise HTTPException(400, f"{len(texts)} values of {name} are asked for, more than {most}")
    try:
        return [int(text) for text in texts if len(text) < 20]
    except ValueError as error:
        raise HTTPException(400, f"{name} is not a whole number") from error


def _number(request: Request, name: str) -> float | None:
    text = request.query_params.get(name, "")
    if not text:
        return None
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise HTTPException(400, f"{name} is {text!r:.40}, not a number")
    return number


def _key(request: Request) -> tuple[int, int] | None:
    """Return the key that the parameter `seed` names; (-1, -1), which no image has, for one that is unknown."""
    text = request.query_params.get("seed")
    if text is None:
        return None
    words = text.split(".")
    if len(words) != 2 or not all(word.isascii() and word.isdigit() and len(word) <= 10 for word in words):
        return -1, -1
    return int(words[0]), int(words[1])


async def _read_body(request: Request) -> bytes:
    """Return the body of a request. One that is too long is read to its end, without being kept, to be answered."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size <= MAX_BODY_BYTES:
            parts.append(part)
        elif size > 32 * MAX_BODY_BYTES:
            break
    if size > MAX_BODY_BYTES:
        raise HTTPException(413, f"the body has more than {MAX_BODY_BYTES:,} bytes; send less at a time")
    return b"".join(parts)


async def _wait_until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
