"""Memory of hosts that tell less than Linux does, and batches that shrink when memory runs out."""

import os
import threading
from pathlib import Path

import jax
import pytest

from dm_generations.errors import UserError
from dm_generations.runtime import device as devices


def no_proc(self, *arguments, **options):
    raise FileNotFoundError(2, "No such file or directory", str(self))


def mac(name):
    found = {"SC_PHYS_PAGES": 1 << 20, "SC_PAGE_SIZE": 1 << 14}
    if name not in found:
        raise ValueError("unrecognized configuration name")
    return found[name]


@pytest.mark.parametrize(("sysconf", "expected"), [(mac, 1 << 33), (None, devices.UNKNOWN_HOST_BYTES)])
def test_free_bytes_where_there_is_no_proc(monkeypatch, sysconf, expected):
    device = jax.devices("cpu")[0]  # JAX starts here, and reads files of the system too
    monkeypatch.setattr(Path, "read_text", no_proc)
    if sysconf:
        monkeypatch.setattr(os, "sysconf", sysconf, raising=False)
    else:  # Windows
        monkeypatch.delattr(os, "sysconf", raising=False)
    assert devices.free_bytes(device) == expected


def run(runner, count, compute, **options):
    def take(first, size):
        return list(range(first, min(first + size, count))), first + size

    return [item for batch in runner.run(devices.Work(count, take, compute, **options)) for item in batch]


def exhausted():
    return jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")


@pytest.mark.parametrize("concurrency", [1, 2])
@pytest.mark.parametrize("in_turn", [False, True])
def test_a_batch_that_does_not_fit_is_computed_again_in_smaller_ones(concurrency, in_turn):
    runner, sizes = devices.BatchRunner(8, concurrency, "too large", step=2), []

    def compute(batch):
        sizes.append(len(batch))
        if len(batch) > 2:
            raise exhausted()
        return batch

    assert run(runner, 21, compute, in_turn=in_turn) == list(range(21))
    assert runner.size == 2 and sizes[0] == 8
    sizes.clear()
    assert run(runner, 21, compute, in_turn=in_turn) == list(range(21))
    assert max(sizes) == 2  # what it learned, it keeps


def test_concurrent_batches_that_do_not_fit_are_computed_one_by_one():
    runner, threads = devices.BatchRunner(4, 2, "too large"), []

    def compute(batch):
        threads.append(threading.current_thread())
        if threads[-1] is not threading.main_thread():
            raise exhausted()
        return batch

    assert run(runner, 4, compute) == list(range(4))  # compiled, alone
    assert run(runner, 20, compute) == list(range(20))
    assert (runner.size, runner.concurrency) == (4, 1) and len(set(threads)) > 1


def test_memory_that_does_not_hold_the_smallest_batch_is_an_error():
    def compute(batch):
        raise exhausted()

    with pytest.raises(UserError, match="too large"):
        run(devices.BatchRunner(8, 2, "too large"), 3, compute)
    with pytest.raises(UserError, match="use less"), devices.memory_errors("use less"):
        raise exhausted()


def test_other_errors_are_passed_on():
    def compute(batch):
        raise jax.errors.JaxRuntimeError("INTERNAL: broken")

    with pytest.raises(jax.errors.JaxRuntimeError, match="broken"):
        run(devices.BatchRunner(8, 2, "too large"), 20, compute)
    with pytest.raises(jax.errors.JaxRuntimeError, match="broken"), devices.memory_errors("use less"):
        compute([])
