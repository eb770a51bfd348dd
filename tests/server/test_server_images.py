"""Decoding on demand: what arrives together is decoded together, what nobody waits for is not, files are kept."""

import asyncio
import io
import os

import numpy as np
import pytest
from PIL import Image

from dm_generations.errors import UserError
from dm_generations.inference.decoder import Decoder
from dm_generations.server.images import ImageCache, ImageService

from .conftest import sharing, tokens_of


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def tokens(number: int) -> np.ndarray:
    return np.frombuffer(tokens_of(number), "<u2").astype(np.uint16)


class Loader:
    """Tokens by a name that is a number; it keeps what it was asked for, and waits for `gate`."""

    def __init__(self):
        self.asked: list[list[str]] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, names):
        self.asked.append(list(names))
        await self.gate.wait()
        return {name: UserError("no tokens") if name == "bad" else (tokens(int(name)), (0, 0)) for name in names}


def serve(codec, decoders, work, cache=None):
    """Run `work(service, loader)` while a service runs."""

    async def main():
        loader = Loader()
        service = ImageService(codec, loader, cache or ImageCache(codec.sha256))
        running = asyncio.create_task(service.run())
        try:
            return await asyncio.wait_for(work(service, loader), 120)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    with sharing(decoders):
        return asyncio.run(main())


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def test_requests_that_arrive_together_are_one_batch(codec, decoders):
    async def work(service, loader):
        return await asyncio.gather(*(service.get(str(number % 6)) for number in range(12))), loader.asked, service

    found, asked, service = serve(codec, decoders, work)
    assert [sorted(batch) for batch in asked] == [["0", "1", "2", "3", "4", "5"]] and service.decoded_count == 6
    expected = Decoder.from_checkpoint(codec, 6).decode(np.stack([tokens(number) for number in range(6)]))
    for number, data in enumerate(found):
        np.testing.assert_array_equal(pixels(data), expected[number % 6])


class NoCache:
    """Keeps nothing; it knows who has asked for what."""

    def __init__(self):
        self.asked: list[str] = []

    def read(self, md5):
        self.asked.append(md5)

    def write(self, md5, data):
        pass


def test_what_nobody_waits_for_is_dropped(codec, decoders):
    cache = NoCache()

    async def work(service, loader):
        await service.get("0")
        loader.gate.clear()
        first = asyncio.create_task(service.get("1"))
        while len(loader.asked) < 2:
            await asyncio.sleep(0.01)
        waiting = [asyncio.create_task(service.get(name)) for name in ("2", "3", "3")]
        while len(cache.asked) < 5:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)  # now they wait for their turn
        waiting[0].cancel()
        waiting[1].cancel()
        await asyncio.sleep(0.05)
        loader.gate.set()
        await asyncio.gather(first, waiting[2])
        return loader.asked, service.decoded_count

    assert serve(codec, decoders, work, cache) == ([["0"], ["1"], ["3"]], 3)


def test_one_that_fails_leaves_the_others(codec, decoders):
    async def work(service, loader):
        found = await asyncio.gather(service.get("bad"), service.get("1"), return_exceptions=True)
        return found, await asyncio.gather(service.get("bad"), return_exceptions=True)

    (first, good), (again,) = serve(codec, decoders, work)
    assert isinstance(first, UserError) and isinstance(again, UserError) and pixels(good).ndim == 3


def test_tokens_outside_the_codebook_fail(codec, decoders):
    async def work(service, loader):
        async def wrong(names):
            return {name: np.full(codec.config.grid**2, 60000, np.uint16) for name in names}

        service.load_tokens = wrong
        failed = await asyncio.gather(service.get("1"), return_exceptions=True)
        service.load_tokens = loader
        return failed[0], await service.get("1")

    failed, good = serve(codec, decoders, work)
    assert isinstance(failed, UserError) and pixels(good).ndim == 3


def test_files_are_kept_for_the_next_start(codec, decoders):
    async def work(service, loader):
        return await service.get("1"), len(loader.asked)

    first, again = serve(codec, decoders, work), serve(codec, decoders, work)
    assert first[0] == again[0] and (first[1], again[1]) == (1, 0)


def cached_files(tmp_path) -> list:
    return sorted(tmp_path.rglob("*.webp"), key=lambda path: path.name)


def whole_file(size: int) -> bytes:
    return b"RIFF" + (size - 8).to_bytes(4, "little") + b"x" * (size - 8)


def test_the_least_recently_used_files_are_deleted(tmp_path):
    cache = ImageCache("a" * 64, max_bytes=16_000)
    for number in range(10):
        cache.write(str(number), whole_file(1000))
        os.utime(cached_files(tmp_path)[-1], (number, number))
    assert cache.read("0") is not None  # and so it is the last that was used
    for number in range(10, 20):
        cache.write(f"{number}", whole_file(1000))
    assert cache.read("0") is not None and cache.read("1") is None
    assert sum(path.stat().st_size for path in cached_files(tmp_path)) <= 17_000
    ImageCache("b" * 64, max_bytes=3_000)
    assert len(cached_files(tmp_path)) <= 3


def test_a_truncated_file_is_not_served(tmp_path):
    cache = ImageCache("a" * 64)
    cache.write("1", whole_file(1000))
    assert cache.read("1") == whole_file(1000)
    for content in (whole_file(1000)[:500], b"", b"RIFF", whole_file(1000) + b"x"):
        cached_files(tmp_path)[0].write_bytes(content)
        assert cache.read("1") is None


def test_without_a_cache_folder_images_are_decoded(codec, decoders, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))

    async def work(service, loader):
        return await service.get("1"), await service.get("1"), len(loader.asked)

    first, second, asked = serve(codec, decoders, work)
    assert first == second and asked == 2
