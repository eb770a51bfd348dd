"""The memory of hosts that tell less than Linux does."""

import os
from pathlib import Path

import jax
import pytest

from dm_generations.runtime import device as devices


def no_proc(self, *arguments, **options):
    raise FileNotFoundError(2, "No such file or directory", str(self))


def mac(name):
    found = {"SC_PHYS_PAGES": 1 << 20, "SC_PAGE_SIZE": 1 << 14}
    if name not in found:
        raise ValueError("unrecognized configuration name")
    return found[name]


@pytest.mark.parametrize(("sysconf", "expected"), [(mac, 1 << 33), (None, devices._UNKNOWN_HOST_BYTES)])
def test_free_bytes_where_there_is_no_proc(monkeypatch, sysconf, expected):
    device = jax.devices("cpu")[0]  # JAX starts here, and reads files of the system too
    monkeypatch.setattr(Path, "read_text", no_proc)
    if sysconf:
        monkeypatch.setattr(os, "sysconf", sysconf, raising=False)
    else:  # Windows
        monkeypatch.delattr(os, "sysconf", raising=False)
    assert devices.free_bytes(device) == expected
