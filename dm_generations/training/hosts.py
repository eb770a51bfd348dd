"""Several processes that train together, each with its own devices: on several hosts, or on one.

All of them are started with the same command and make the same batches, of which each puts its part on its devices. The
first one alone writes files. Every function here is called by all processes in the same order, or they wait for one
another; with one process they are what they seem.
"""

import contextlib
import hashlib
import json
import logging
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any, Final

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from dm_generations.errors import UserError, one_line

WAIT: Final = 300  # seconds for all processes to meet
_GRACE: Final = 2  # seconds in which the others end after an error: without the first process they would crash
_MESSAGE_BYTES: Final = 2000

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def join(coordinator: str | None, process_count: int | None, process: int | None) -> Iterator[None]:
    """Meet the other processes before a block that trains, and leave them after it. No device was used before it.

    Args:
        coordinator: HOST:PORT of the first process. None for all three: the cluster tells them, as Slurm does.
        process_count: How many there are.
        process: Number of this one, from 0.

    Raises:
        UserError: They did not meet, or another process was lost.
    """
    if coordinator is not None:
        logger.info("waiting for %s processes at %s", process_count, coordinator)
        if process:
            _wait_for(coordinator)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # accelerators have their own
    try:
        jax.distributed.initialize(coordinator, process_count, process, initialization_timeout=WAIT)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"cannot meet the other processes: {one_line(error)}") from error
    if not is_first():
        logging.getLogger("dm_generations").setLevel(logging.ERROR)
    try:
        yield
    except UserError:
        if is_first():
            time.sleep(_GRACE)
        raise
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if jax.process_count() == 1:
            raise
        what = one_line(error)
        raise UserError(f"{what}; if another process was lost, start all again, to go on from a checkpoint") from error
    jax.distributed.shutdown()


def _wait_for(address: str) -> None:
    """Wait for the first process: JAX would end this one without a word of its own. Raises UserError if it is late."""
    host, _, port = address.rpartition(":")
    until = time.monotonic() + WAIT
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except (OSError, OverflowError) as error:
            if time.monotonic() > until:
                raise UserError(f"no process 0 at --coordinator {address}: {one_line(error)}") from error
        time.sleep(0.5)


def is_first() -> bool:
    """Whether this is the process that writes files."""
    return jax.process_index() == 0


def put(array: Any, sharding: NamedSharding) -> jax.Array:
    """Put an array, which every process has, on the devices; each process puts its part."""
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def fetch(tree: Any) -> Any:
    """Copy a tree of arrays to every host, whole."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    # One at a time, so that no device holds all of them.
    return jax.tree.map(_fetch_array, tree)


def _fetch_array(array: jax.Array) -> np.ndarray:
    if array.is_fully_replicated:
        return jax.device_get(array.addressable_data(0))
    return multihost_utils.process_allgather(array, tiled=True)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Run a block that fails in all processes if it fails in one, so that none waits for it. No other call is in it.

    Raises:
        UserError: It failed in another process.
    """
    if jax.process_count() == 1:
        yield
        return
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    messages = _gather(one_line(failure) if failure else "")
    if failure:
        raise failure
    for process, message in enumerate(messages):
        if message:
            raise UserError(f"process {process} stopped: {message}")


def check_same(values: Mapping[str, Any]) -> None:
    """Check that all processes were given the same.

    Args:
        values: JSON data.

    Raises:
        UserError: They were not; one that differs from the first process is named.
    """
    if jax.process_count() == 1:
        return
    digests = [hashlib.sha256(json.dumps([name, value]).encode()).hexdigest()[:16] for name, value in values.items()]
    gathered = [message.split() for message in _gather(" ".join(digests))]
    for process, found in enumerate(gathered):
        for name, one, other in zip(values, gathered[0], found, strict=False):
            if one != other:
                raise UserError(f"process {process} was started with another {name} than process 0; use the same")


def share_number(number: int) -> int:
    """Return the number that the first process has."""
    return int(_gather(str(number))[0]) if jax.process_count() > 1 else number


def _gather(message: str) -> list[str]:
    """Return the messages of all processes, cut to _MESSAGE_BYTES."""
    padded = message.encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES, b"\0")
    rows = multihost_utils.process_allgather(np.frombuffer(padded, np.uint8))
    return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in np.asarray(rows)]
