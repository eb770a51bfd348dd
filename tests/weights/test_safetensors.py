"""The reader of .safetensors, against files that the safetensors library writes and against damaged ones."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from codec_kit import is_mapped
from safetensors.numpy import save

from dm_generations.errors import UserError
from dm_generations.weights.native import read_safetensors

FLOAT = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.fixture
def written(tmp_path):
    """Write bytes, or a header (text or JSON) and data, to a file; returns its path."""

    def write(content, data=b""):
        path = tmp_path / "model.safetensors"
        if not isinstance(content, bytes):
            text = (content if isinstance(content, str) else json.dumps(content)).encode()
            content = struct.pack("<Q", len(text)) + text + data
        path.write_bytes(content)
        return path

    return write


def test_arrays_keep_values_shapes_and_dtypes_and_are_views(written):
    dtypes = ["float32", "float16", "float64", "int8", "int64", "uint16", "bool", ml_dtypes.bfloat16]
    arrays = {f"a.{i}": np.arange(12).reshape(3, 4).astype(dtype) for i, dtype in enumerate(dtypes)}
    arrays |= {"scalar": np.array(3, np.int32), "empty": np.zeros((0, 3), np.float32)}
    read = read_safetensors(written(save(arrays, metadata={"format": "pt"})))
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        assert read[name].dtype == array.dtype and is_mapped(read[name])
        np.testing.assert_array_equal(read[name], array)
    with pytest.raises(ValueError, match="read-only"):
        read["a.0"][0] = 1


def test_no_tensors(written):
    assert read_safetensors(written({"__metadata__": {}})) == {}


def test_every_truncation_is_an_error_that_names_the_file(written):
    whole = save({"a": np.arange(5.0), "b": np.arange(3)})
    for length in range(len(whole)):
        with pytest.raises(UserError, match=r"model\.safetensors"):
            read_safetensors(written(whole[:length]))


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ({"a": FLOAT}, b"\0" * 7),
        ({"a": FLOAT}, b"\0" * 9),
        ({"a": FLOAT | {"data_offsets": [0, 4]}}, b"\0" * 4),
        ({"a": FLOAT | {"data_offsets": [8, 0]}}, b"\0" * 8),
        ({"a": FLOAT | {"data_offsets": [-8, 0]}}, b"\0" * 8),
        ({"a": FLOAT | {"data_offsets": [1, 9]}}, b"\0" * 9),
        ({"a": FLOAT | {"data_offsets": [0, 8, 16]}}, b"\0" * 8),
        ({"a": FLOAT | {"shape": [-2]}}, b"\0" * 8),
        ({"a": FLOAT | {"shape": [2.0]}}, b"\0" * 8),
        ({"a": FLOAT | {"shape": [True, 2]}}, b"\0" * 8),
        ({"a": FLOAT | {"shape": [2**61, 2**61, 4]}}, b"\0" * 8),
        ({"a": FLOAT | {"shape": [0, 2**61], "data_offsets": [0, 0]}}, b""),
        ({"a": FLOAT | {"shape": [1] * 100}}, b"\0" * 4),
        ({"a": FLOAT | {"shape": None}}, b"\0" * 8),
        ({"a": FLOAT | {"dtype": "O"}}, b"\0" * 8),
        ({"a": FLOAT | {"dtype": [[]]}}, b"\0" * 8),
        ({"a": FLOAT, "b": FLOAT}, b"\0" * 8),
        ({"a": FLOAT, "b": FLOAT | {"data_offsets": [12, 20]}}, b"\0" * 20),
        ({"a": 1}, b""),
        ([1], b""),
        ('{"a": 1, "a": 2}', b""),
        ("[" * 100_000, b""),
        ('{"a": ' + "9" * 10_000 + "}", b""),
        ("{", b""),
        (struct.pack("<Q", 2**63) + b"{}", b""),
        (struct.pack("<Q", 5) + b"{}", b""),
        (struct.pack("<Q", 2) + b"\xff\xff", b""),
        (b"version https://git-lfs.github.com/spec/v1\n", b""),
    ],
)
def test_wrong_content_is_an_error_that_names_the_file(written, header, data):
    with pytest.raises(UserError, match=r"model\.safetensors") as error:
        read_safetensors(written(header, data))
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
