"""The reader of flax_model.msgpack, against files that Flax itself writes and against damaged ones."""

import ml_dtypes
import msgpack
import numpy as np
import pytest
from codec_kit import is_mapped
from flax import serialization

from dm_generations.errors import UserError
from dm_generations.weights.flax_msgpack import read_flax_msgpack


@pytest.fixture
def written(tmp_path):
    """Write bytes, or a tree as Flax does, to a file; returns its path."""

    def write(content):
        path = tmp_path / "flax_model.msgpack"
        path.write_bytes(content if isinstance(content, bytes) else serialization.msgpack_serialize(content))
        return path

    return write


def array_extension(shape, dtype, data, code=1):
    """A file with one array `a`, with any lies in its header."""
    return msgpack.packb({"a": msgpack.ExtType(code, msgpack.packb([shape, dtype, data]))})


@pytest.mark.parametrize("dtype", ["float32", "float16", ml_dtypes.bfloat16, "int8", "uint32", "bool"])
def test_array_keeps_values_shape_and_dtype(written, dtype):
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    read = read_flax_msgpack(written({"model": {"kernel": array}}))["model"]["kernel"]
    assert read.dtype == array.dtype and is_mapped(read)
    np.testing.assert_array_equal(read, array)


def test_scalars_and_empty_arrays(written):
    read = read_flax_msgpack(
        written({"scalar": np.float32(1.5), "zero_d": np.array(2, np.int32), "empty": np.zeros((0, 3), "f4")})
    )
    assert (read["scalar"], read["scalar"].dtype, read["scalar"].shape) == (1.5, np.float32, ())
    assert (read["zero_d"], read["zero_d"].shape) == (2, ())
    assert read["empty"].shape == (0, 3)


def test_array_in_pieces_is_joined(written, monkeypatch):
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 64)  # bytes; 1 GiB in real files
    array = np.arange(60, dtype=np.float32).reshape(5, 12)
    path = written({"a": {"big": array, "small": array[0, :3]}})
    assert b"__msgpack_chunked_array__" in path.read_bytes()
    read = read_flax_msgpack(path)["a"]
    np.testing.assert_array_equal(read["big"], array)
    np.testing.assert_array_equal(read["small"], array[0, :3])


def test_array_in_one_piece_is_a_view(written):
    read = read_flax_msgpack(written(pieces(shape={"0": 2, "1": 1}, chunks={"0": np.arange(2, dtype=np.float32)})))["a"]
    assert read.tolist() == [[0], [1]] and is_mapped(read)


def test_arrays_are_read_only(written):
    with pytest.raises(ValueError, match="read-only"):
        read_flax_msgpack(written({"a": np.zeros(3)}))["a"][0] = 1


def test_every_truncation_is_an_error_that_names_the_file(written):
    whole = serialization.msgpack_serialize({"a": {"b": np.arange(5.0), "c": np.arange(3)}})
    for length in range(len(whole)):
        with pytest.raises(UserError, match=r"flax_model\.msgpack"):
            read_flax_msgpack(written(whole[:length]))


def pieces(**changes):
    piece = np.arange(2, dtype=np.float32)
    node = {"__msgpack_chunked_array__": True, "shape": {"0": 4}, "chunks": {"0": piece, "1": piece}}
    return serialization.msgpack_serialize({"a": node | changes}, in_place=True)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"\x80\x04\x95 pickle", id="pickle"),
        pytest.param(b"version https://git-lfs.github.com/spec/v1\n", id="git lfs pointer"),
        pytest.param(b"\x93\x01\x02\x03", id="a list"),
        pytest.param(b"\x01", id="a number"),
        pytest.param(msgpack.packb({"a": 1}), id="leaf is a number"),
        pytest.param(msgpack.packb({"a": None}), id="leaf is nothing"),
        pytest.param(msgpack.packb({b"a": {}}), id="key is bytes"),
        pytest.param(msgpack.packb({1: {}}), id="key is a number"),
        pytest.param(msgpack.packb({"a": msgpack.ExtType(7, b"")}), id="unknown extension"),
        pytest.param(msgpack.packb({"a": msgpack.ExtType(2, msgpack.packb([1.0, 2.0]))}), id="complex"),
        pytest.param(msgpack.packb({"a": msgpack.ExtType(1, b"\xc1")}), id="payload is garbage"),
        pytest.param(msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb([[1], "int8"]))}), id="2 fields"),
        pytest.param(array_extension([4], "float32", b"\0" * 15), id="bytes too few"),
        pytest.param(array_extension([4], "float32", b"\0" * 17), id="bytes too many"),
        pytest.param(array_extension([2**62, 4], "float32", b"\0" * 16), id="huge shape"),
        pytest.param(array_extension([0, 2**63], "float32", b""), id="huge empty shape"),
        pytest.param(array_extension([-1, -4], "float32", b"\0" * 16), id="negative shape"),
        pytest.param(array_extension([True], "float32", b"\0" * 4), id="shape of bools"),
        pytest.param(array_extension([1] * 100, "float32", b"\0" * 4), id="100 dimensions"),
        pytest.param(array_extension([1], "object", b"\0" * 8), id="objects"),
        pytest.param(array_extension([1], "f4,f4", b"\0" * 8), id="structured dtype"),
        pytest.param(array_extension([1], 5, b"\0" * 8), id="dtype is a number"),
        pytest.param(array_extension([1], "float32", "abcd"), id="content is text"),
        pytest.param(b"\x81\xa1a\xdd\xff\xff\xff\xff", id="list that claims 4 billion items"),
        pytest.param(b"\xdf\xff\xff\xff\xff", id="map that claims 4 billion items"),
        pytest.param(b"\x81\xa1a\xc9\xff\xff\xff\xff\x01", id="array that claims 4 GB"),
        pytest.param(b"\x81\xa1a" * 100 + b"\x80", id="100 levels"),
        pytest.param(b"\x81\xa1a" * 100_000 + b"\x80", id="100,000 levels"),
        pytest.param(serialization.msgpack_serialize({"a": np.zeros(2)}) + b"\0", id="more follows"),
        pytest.param(pieces(shape={"0": 5}), id="pieces do not add up"),
        pytest.param(msgpack.packb({"a": {"b": 1}, "c": True}), id="leaf is a boolean"),
        pytest.param(b"\x82\xa1a\x80\xa1a\x80", id="a name twice"),
        pytest.param(b"\x81\xa1\xff\x80", id="a name that is not UTF-8"),
        pytest.param(b"\x81\xdb\xff\xff\xff\xff", id="name that claims 4 GB"),
        pytest.param(pieces(shape={"0": 0, "1": 2**62}, chunks={"0": np.zeros(0)}), id="huge empty shape of pieces"),
        pytest.param(pieces(shape={"0": -2, "1": -2}), id="pieces with a negative shape"),
        pytest.param(pieces(shape=None), id="pieces without a shape"),
        pytest.param(pieces(chunks={}), id="no pieces"),
        pytest.param(pieces(chunks={"0": np.zeros(2), "2": np.zeros(2)}), id="a piece is missing"),
        pytest.param(pieces(chunks={"0": np.zeros((2, 2))}), id="a piece is not flat"),
        pytest.param(pieces(chunks={"0": np.zeros(2), "1": np.zeros(2, "i4")}), id="pieces differ in dtype"),
        pytest.param(pieces(chunks={"0": {}}), id="a piece is not an array"),
    ],
)
def test_wrong_content_is_an_error_that_names_the_file(written, content):
    with pytest.raises(UserError, match=r"flax_model\.msgpack") as error:
        read_flax_msgpack(written(content))
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()], ids=["missing", "a folder"])
def test_unreadable_file_is_an_error_that_names_it(tmp_path, make):
    path = tmp_path / "flax_model.msgpack"
    make(path)
    with pytest.raises(UserError, match=r"cannot read .*flax_model\.msgpack"):
        read_flax_msgpack(path)
