"""A pool of processes on a Ray cluster that hold a model: work in, results out, in order, by Ray Data.

    driver: work ──▶ queue ──▶ reader (a Ray data set) ──▶ workers (actors, a function each) ──▶ driver: results

The driver is the process of the command. It alone reads archives and writes them and files, so a worker that is killed
leaves nothing behind. Work that was sent stays in the driver until its result has come: when a worker or a node is
lost, what has no result is sent again to those that are left. At most a few pieces of work a worker are under way.
"""

import contextlib
import itertools
import logging
import os
import pickle
import platform
import socket
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Self, TypeVar

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Datasource, ReadTask, read_datasource
from ray.data.block import BlockMetadata
from ray.exceptions import RayError
from ray.util.annotations import RayDeprecationWarning
from ray.util.queue import Queue

from dm_generations import __version__
from dm_generations.errors import UserError, one_line

LOCAL = "local"  # an address: a cluster of this machine alone, for this command
ANSWER_S = 5.0
AHEAD = 4  # pieces of work under way for each worker
MAX_LOSSES = 5  # one after the other, without a result in between

_logger = logging.getLogger(__name__)
_Work = TypeVar("_Work")
_Result = TypeVar("_Result")
_COLUMN = "pickled"
_START = b""


class _Failure(NamedTuple):
    """What a worker returns in place of a result: a line for users, or a traceback."""

    text: str
    is_user_error: bool


class RayPool:
    """Workers on a Ray cluster; a context manager that connects to it, and disconnects.

    Each worker has a GPU where there are some, else the CPUs of a node.
    """

    def __init__(self, address: str = LOCAL, workers: int = 1, cpu_only: bool = False):
        """Choose a cluster.

        Args:
            address: HOST:PORT of a running cluster, "auto" for one that runs on this machine, or LOCAL.
            workers: Processes that share a GPU, or the CPUs of a node.
            cpu_only: Leave GPUs alone.
        """
        self._address, self._workers, self._cpu_only = address, workers, cpu_only

    def __enter__(self) -> Self:
        """Connect. Raises UserError if nobody answers."""
        if self._address not in (LOCAL, "auto"):
            _check_answer(self._address)
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors come as exceptions, too
        options: dict[str, Any] = {"address": self._address, "log_to_driver": False, "logging_level": logging.CRITICAL}
        if self._address == LOCAL:
            options |= {"include_dashboard": False}
        try:
            ray.init(**options)
        except (RayError, OSError, RuntimeError, ValueError, AssertionError) as error:
            raise UserError(f"--ray {self._address}: {one_line(error)}; start Ray there, or leave --ray out") from error
        return self

    def __exit__(self, *error: object) -> None:
        ray.shutdown()

    def map(self, make: Callable[[], Callable[[_Work], _Result]], work: Iterable[_Work]) -> Iterator[_Result]:
        """Yield function(item) for each item of `work`, in order.

        Args:
            make: Makes the function, once in each worker. It is pickled, as are work and results.
            work: Read as workers get free, in the thread of the caller.

        Raises:
            UserError: The function, or `make`, raised one; or workers end again and again.
        """
        items = iter(work)
        sent: deque[bytes] = deque()  # without a result
        losses = 0
        while True:
            try:
                for result in self._run(pickle.dumps(make), items, sent):
                    losses = 0
                    yield result
                return
            except RayError as error:
                losses += 1
                if losses >= MAX_LOSSES:
                    reason = one_line(error)
                    raise UserError(f"workers of Ray end again and again, the last one so: {reason}") from error
                _logger.warning("a worker of Ray was lost; what it had is sent to others")

    def _run(self, make: bytes, items: Iterator[Any], sent: deque[bytes]) -> Iterator[Any]:
        """Yield results until there are no items, or a worker is lost."""
        count, resources = self._size()
        queue = Queue(actor_options={"num_cpus": 0})
        results = _start(queue, count, resources, _Worker, (make, __version__, self._cpu_only))
        is_open = True
        try:
            for piece in [_START, *sent]:
                queue.put(piece)
            while True:
                room = max(0, AHEAD * count - len(sent))  # a lost node leaves more than the others take
                for item in itertools.islice(items, room):
                    sent.append(pickle.dumps(item))
                    queue.put(sent[-1])
                if is_open and len(sent) < AHEAD * count:
                    is_open = False
                    queue.put(None)
                if not sent:
                    return
                result = pickle.loads(next(results)[_COLUMN][0].as_py())
                if isinstance(result, _Failure):
                    raise (UserError if result.is_user_error else RuntimeError)(result.text)
                sent.popleft()
                yield result
        finally:
            with contextlib.suppress(RayError):
                queue.shutdown(force=True)
            results.close()

    def _size(self) -> tuple[int, dict[str, float]]:
        """Return how many workers there are to be, and what each takes."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = 0 if self._cpu_only else int(sum(node.get("GPU", 0) for node in nodes))
        if gpus:
            return gpus * self._workers, {"num_gpus": 1 / self._workers, "num_cpus": 0}
        cpus = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
        if not cpus:
            raise UserError(f"--ray {self._address}: the cluster has no CPU or GPU for workers")
        share = min(cpus) / self._workers
        return len(cpus) * self._workers, {"num_cpus": int(share) if share >= 1 else share}


class _Source(Datasource):
    """What comes out of a queue, as a data set of one column."""

    def __init__(self, queue: Queue):
        super().__init__()
        self._queue = queue

    def get_read_tasks(self, parallelism: int, *args: Any, **options: Any) -> list[ReadTask]:
        metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(lambda: _read(self._queue), metadata)]

    def estimate_inmemory_data_size(self) -> int | None:
        return None


def _read(queue: Queue) -> Iterator[pa.Table]:
    if queue.get() != _START:
        raise RuntimeError("the reader was started again, and does not know what it read")
    while (piece := queue.get()) is not None:
        yield _table(piece)


def _table(piece: bytes) -> pa.Table:
    return pa.table({_COLUMN: pa.array([piece], pa.large_binary())})


class _Worker:
    """The function of a worker, for `map_batches`."""

    def __init__(self, make: bytes, version: str, cpu_only: bool):
        # JAX takes most of a GPU's memory at its first use unless told otherwise; others may be using that GPU.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        if cpu_only:
            os.environ["JAX_PLATFORMS"] = "cpu"
        self._failure: _Failure | None = None
        try:
            if version != __version__:
                raise UserError(f"it has version {__version__} of dm_generations, the driver {version}")
            self._function = pickle.loads(make)()
        except Exception as error:
            self._failure = _fail(error)

    def __call__(self, batch: pa.Table) -> pa.Table:
        result: Any = self._failure
        if result is None:
            try:
                result = self._function(pickle.loads(batch[_COLUMN][0].as_py()))
            except Exception as error:
                result = _fail(error)
        return _table(pickle.dumps(result))


def _fail(error: Exception) -> _Failure:
    is_user_error = isinstance(error, UserError)
    text = str(error) if is_user_error else "".join(traceback.format_exception(error))
    return _Failure(f"worker on {platform.node()}: {text}", is_user_error)


def _start(queue: Queue, count: int, resources: dict[str, float], worker: type, arguments: tuple) -> Any:
    """Return an iterator over the results, as tables of one row, of what comes out of a queue."""
    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.target_max_block_size = 1  # byte: a piece of work is a block, and is not kept until there are more
    data = read_datasource(_Source(queue), num_cpus=0, override_num_blocks=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RayDeprecationWarning)  # `max_restarts` has no other way until Ray 2.64
        data = data.map_batches(
            worker,
            fn_constructor_args=arguments,
            batch_size=None,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=count),
            max_restarts=0,  # a worker that is to start again waits for its node, which may never come back
            **resources,
        )
    return iter(data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))


def _check_answer(address: str) -> None:
    """Raise UserError if an address is not one, or nobody answers there."""
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit():
        raise UserError(f"--ray {address!r:.100} is not HOST:PORT or auto; an archive stands before --ray")
    try:
        socket.create_connection((host, int(port)), ANSWER_S).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"--ray {address}: nobody answers there: {one_line(error)}; start it with `ray start --head`"
        ) from error
