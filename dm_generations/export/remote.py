"""Files that are decoded and encoded by a pool of processes, with the functions of one; the driver writes them."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby, tee
from typing import Any

from dm_generations.export.output_file import EncodeContext, Encoded, Item, TokenDecoder, encode_items
from dm_generations.runtime.device import core_count
from dm_generations.runtime.ray_pool import RayPool

ITEMS = 128  # to decode at a time in a process, or as many as a file has
_Content = Any  # bytes of a file, its members in a shard, or the error of encoding it


def encode_remotely(
    pool: RayPool,
    make_decoder: Callable[[], TokenDecoder],
    thread_count: int | None,
    items: Iterator[Item],
    context: EncodeContext,
) -> Iterator[Encoded]:
    """Do as `encode_items` does, in a pool.

    Args:
        pool: The processes.
        make_decoder: Makes the decoder of a process.
        thread_count: Threads of a process that encode; None is one for each core.
        items: As there.
        context: As there.
    """
    batches, sent = tee(_batches(items))
    make = partial(_make_encoder, make_decoder, thread_count, context)
    for contents, batch in zip(pool.map(make, sent), batches, strict=False):
        files = dict.fromkeys(file for file, *_ in batch)
        for file, content in zip(files, contents, strict=True):
            yield file, partial(_get, content)


def _batches(items: Iterator[Item]) -> Iterator[list[Item]]:
    """Yield items in lists, with those of a file together."""
    batch: list[Item] = []
    for _, of_file in groupby(items, lambda item: item[0]):
        batch += of_file
        if len(batch) >= ITEMS:
            yield batch
            batch = []
    if batch:
        yield batch


def _make_encoder(
    make_decoder: Callable[[], TokenDecoder], thread_count: int | None, context: EncodeContext
) -> Callable[[list[Item]], list[_Content]]:
    """Return what makes a list of items the contents of their files."""
    decoder, threads = make_decoder(), ThreadPoolExecutor(thread_count or core_count())

    def encode(batch: list[Item]) -> list[_Content]:
        futures = [threads.submit(content) for _, content in encode_items(decoder, iter(batch), context)]
        return [future.exception() or future.result() for future in futures]

    return encode


def _get(content: _Content) -> Any:
    if isinstance(content, Exception):
        raise content
    return content
