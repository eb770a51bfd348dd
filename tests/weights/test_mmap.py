"""Mapped files: views, their bounds, and the memory that loading large weights takes."""

import json
import pickle
import struct
import subprocess
import sys

import ml_dtypes
import msgpack
import numpy as np
import pytest
from codec_kit import is_mapped
from helpers import ROOT
from torch_files import Storage, Tensor, pickled

from dm_generations.errors import UserError
from dm_generations.weights import mmap as mapped
from dm_generations.weights.mmap import MappedFile


@pytest.fixture
def numbers(tmp_path):
    """A file of the float32 0 to 5."""
    path = tmp_path / "numbers.bin"
    path.write_bytes(np.arange(6, dtype="<f4").tobytes())
    return MappedFile(path)


def test_array_is_a_read_only_view(numbers):
    array = numbers.array(8, np.dtype("<f4"), (2, 2))
    np.testing.assert_array_equal(array, [[2, 3], [4, 5]])
    assert is_mapped(array.transpose())
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1


def test_unaligned_scalar_and_empty_arrays(numbers):
    assert numbers.array(1, np.dtype("<u2"), ()) == 0
    assert numbers.array(24, np.dtype(ml_dtypes.bfloat16), (3, 0)).shape == (3, 0)


@pytest.mark.parametrize(
    ("offset", "shape"),
    [(0, (7,)), (4, (6,)), (-4, (1,)), (0, (-1,)), (25, (0,)), (0, (2**62,)), (0, (2**40, 2**40)), (0, (0, 2**62))],
)
def test_array_beyond_the_file_is_an_error_that_names_it(numbers, offset, shape):
    with pytest.raises(UserError, match=r"numbers\.bin is damaged"):
        numbers.array(offset, np.dtype("<f4"), shape)


def test_released_arrays_keep_their_values(numbers):
    array = numbers.array(0, np.dtype("<f4"), (6,))
    for _ in range(2):
        assert array.sum() == 15
        mapped.release([array, array[2:], np.zeros(3)])


def test_unreadable_and_empty_files(tmp_path):
    (tmp_path / "empty").touch()
    for name, what in (("none", "cannot read"), (".", "cannot read"), ("empty", "empty")):
        with pytest.raises(UserError, match=what):
            MappedFile(tmp_path / name)


# Memory. The files are sparse: 2 GB of them are read, but only their headers take room on the disk.

COUNT, ELEMENTS = 32, 1 << 24  # float32 tensors of 64 MiB
NBYTES = 4 * ELEMENTS
FIRST = b"\0\0\x80\x3f"  # 1.0, the first element of each


def write_safetensors(file):
    header = {
        str(i): {"dtype": "F32", "shape": [ELEMENTS], "data_offsets": [i * NBYTES, (i + 1) * NBYTES]}
        for i in range(COUNT)
    }
    text = json.dumps(header).encode()
    file.write(struct.pack("<Q", len(text)) + text)
    write_tensors(file, [b""] * COUNT)


def write_msgpack(file):
    packed = msgpack.packb([[ELEMENTS], "float32"])
    payload = b"\x93" + packed[1:] + b"\xc6" + struct.pack(">I", NBYTES)
    extension = b"\xc9" + struct.pack(">I", len(payload) + NBYTES) + b"\x01" + payload
    file.write(b"\xde" + struct.pack(">H", COUNT))
    write_tensors(file, [msgpack.packb(str(i)) + extension for i in range(COUNT)])


def write_legacy_torch(file):
    for part in (0x1950A86A20F9469CFC6C, 1001, {}):
        file.write(pickle.dumps(part, 2))
    file.write(torch_value(legacy=True) + pickle.dumps([str(i) for i in range(COUNT)], 2))
    write_tensors(file, [struct.pack("<q", ELEMENTS)] * COUNT)


def write_torch(file):
    names = [b"a/data.pkl", *(f"a/data/{i}".encode() for i in range(COUNT))]
    data = torch_value()
    sizes = [len(data), *[NBYTES] * COUNT]
    fields = [struct.pack("<5H3L2H", 20, 0, 0, 0, 33, 0, n, n, len(s), 0) for n, s in zip(sizes, names, strict=True)]
    local = [b"PK\x03\x04" + field + name for field, name in zip(fields, names, strict=True)]
    file.write(local[0] + data)
    offsets = [0, *write_tensors(file, local[1:])]
    start = file.tell()
    for field, name, offset in zip(fields, names, offsets, strict=True):
        file.write(b"PK\x01\x02\x14\0" + field + struct.pack("<3H2L", 0, 0, 0, 0, offset) + name)
    size = file.tell() - start
    file.write(b"PK\x05\x06" + struct.pack("<4H2LH", 0, 0, len(names), len(names), size, start, 0))


def torch_value(legacy=False):
    one = np.ones(1, np.float32)
    return pickled(
        {str(i): Tensor(Storage(one, count=ELEMENTS), 0, (ELEMENTS,), (1,)) for i in range(COUNT)}, legacy=legacy
    )[0]


def write_tensors(file, heads):
    """Each head with a tensor behind it; returns where the heads begin."""
    offsets = []
    for head in heads:
        offsets.append(file.tell())
        file.write(head + FIRST)
        file.seek(NBYTES - len(FIRST), 1)
    file.truncate()
    return offsets


LOADING = """
import resource, sys
import numpy as np
from dm_generations.weights import flax_msgpack, native, torch_file
from dm_generations.weights import mmap as mapped
module, function = sys.argv[2].split(".")
arrays = getattr(globals()[module], function)(sys.argv[1])
copies = []
for array in arrays.values():
    copies.append(np.array(array))
    mapped.release([array])
assert all(copy[0] == 1 for copy in copies), "the tensors are not where they were written"
print(sum(copy.nbytes for copy in copies), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
@pytest.mark.parametrize(
    ("write", "read"),
    [
        (write_safetensors, "native.read_safetensors"),
        (write_msgpack, "flax_msgpack.read_flax_msgpack"),
        (write_torch, "torch_file.read_torch"),
        (write_legacy_torch, "torch_file.read_torch"),
    ],
)
def test_loading_2_gb_takes_less_than_1_3_times_their_memory(tmp_path, write, read):
    path = tmp_path / "weights"
    with open(path, "wb") as file:
        write(file)
    command = [sys.executable, "-c", LOADING, str(path), read]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    loaded, peak = map(int, out.stdout.split())
    assert loaded == COUNT * NBYTES
    assert peak < 1.3 * loaded, f"{peak / loaded:.2f} N"
