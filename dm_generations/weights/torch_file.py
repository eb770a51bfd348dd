"""Read what `torch.save` wrote, without torch and without running anything that the file names.

Two formats. Since torch 1.6 a file is a zip archive of uncompressed entries: `<name>/data.pkl`, a pickle whose
persistent ids name the storages, `<name>/data/<key>` for each storage, and since 2.1 `<name>/byteorder`. Before that,
five pickles (magic number, format version, system, the value, keys of the storages) and behind them, for each key, the
number of elements as int64 and the elements, both little-endian. See `torch/serialization.py` and `torch/_utils.py`.
"""

import io
import math
import os
import struct
import zipfile
from collections.abc import Callable
from typing import Any, NoReturn

import ml_dtypes  # noqa: F401
import numpy as np

from dm_generations.errors import UserError
from dm_generations.weights import unpickler
from dm_generations.weights.mmap import MAX_DIMENSIONS, Malformed, MappedFile, short_shape
from dm_generations.weights.unpickler import Opaque, is_class

__all__ = ["Opaque", "read_torch", "state_of"]

MAGIC_NUMBER, FORMAT_VERSION = 0x1950A86A20F9469CFC6C, 1001  # of the format before the zip archives
MAX_PICKLE = 64 << 20  # bytes; tensors lie outside of it
SMALL = 1 << 20  # bytes that a tensor may always have; more, only in a file of that size
MAX_PARTS = 1_000_000  # modules and tensors of one network
MAX_MODULE_DEPTH = 64
MAX_NAME = 1000  # characters of a tensor's name
_PARTS = ("_parameters", "_buffers", "_modules")
LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip entry: signature, ..., lengths of the name and of the extra field

_NAMES = (
    "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 complex64 complex128 "
    "int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool"
)
DTYPES = {f"torch.{name}": np.dtype(name) for name in _NAMES.split()}  # ml_dtypes adds those that NumPy lacks
_STORAGES = dict(Double="float64", Float="float32", Half="float16", BFloat16="bfloat16", Bool="bool", Byte="uint8")
_STORAGES |= dict(Long="int64", Int="int32", Short="int16", Char="int8")
_STORAGES |= dict(ComplexFloat="complex64", ComplexDouble="complex128")
STORAGES = {f"torch.{name}Storage": np.dtype(dtype) for name, dtype in _STORAGES.items()}
STORAGES |= dict.fromkeys(("torch.storage.UntypedStorage", "torch.UntypedStorage"), np.dtype("uint8"))
UNREADABLE = {
    "qtensor": "a quantised",
    "sparse_tensor": "a sparse",
    "sparse_csr_tensor": "a sparse",
    "nested_tensor": "a nested",
    "meta_tensor_no_storage": "an empty (meta)",
    "wrapper_subclass": "a wrapped",
    "device_tensor_from_numpy": "a device's own kind of",
}


def read_torch(path: str | os.PathLike) -> Any:
    """Read a file of `torch.save`; nothing that it names is imported or called.

    Args:
        path: The file.

    Returns:
        Plain containers and numbers. A tensor is a read-only view of the mapped file, with the dtype, byte order and
        strides that it has there, and so is a Parameter. An OrderedDict is a dict, a torch.Size a tuple; every other
        class or function, and what the file made of it, is an inert `Opaque`.

    Raises:
        UserError: The file cannot be read, is damaged, or holds a quantised or sparse tensor.
    """
    file = MappedFile(path)
    try:
        if file.content[:4] == b"PK\x03\x04":
            return _read_zip(file)
        if file.content[:1] == b"\x80":
            return _read_legacy(file)
    except Malformed as error:
        raise UserError(f"cannot read {path}: {error}") from error
    raise UserError(f"{path} is not a file that torch.save wrote: download it again")


def state_of(value: Any) -> dict[str, np.ndarray]:
    """Return the tensors of a pickled torch module by dotted name, as its `state_dict()` does; a dict as it is.

    Raises:
        UserError: The value is neither.
    """
    if isinstance(value, dict):
        return value
    tensors: dict[str, np.ndarray] = {}
    modules, part_count = [("", 0, value)], 0
    while modules:
        prefix, depth, module = modules.pop()
        state = _module_state(module)
        if state is None or depth > MAX_MODULE_DEPTH or len(prefix) > MAX_NAME:
            what = f"its part {prefix[:-1]!r:.200}" if prefix else "the value"
            raise UserError(f"{what} is not a network that torch pickled")
        part_count += 1 + sum(len(state[kind]) for kind in _PARTS)
        if part_count > MAX_PARTS:
            raise UserError(f"the network has more than {MAX_PARTS} parts")
        skipped = state.get("_non_persistent_buffers_set")
        skipped = skipped if isinstance(skipped, (set, list, tuple)) else ()
        buffers = {name: buffer for name, buffer in state["_buffers"].items() if name not in skipped}
        named = (state["_parameters"] | buffers).items()
        tensors |= {f"{prefix}{name}": tensor for name, tensor in named if isinstance(tensor, np.ndarray)}
        children = [(f"{prefix}{name}.", depth + 1, child) for name, child in state["_modules"].items()]
        modules += [child for child in reversed(children) if child[2] is not None]
    return tensors


def _module_state(module: Any) -> dict | None:
    """Return the attributes of a pickled module; None for anything else."""
    state = module.state if isinstance(module, Opaque) else None
    if isinstance(state, tuple) and state:  # (attributes, slots)
        state = state[0]
    if not isinstance(state, dict) or not all(isinstance(state.get(kind), dict) for kind in _PARTS):
        return None
    names = (name for kind in _PARTS for name in state[kind])
    return state if all(isinstance(name, str) and len(name) <= MAX_NAME for name in names) else None


# the zip format


def _read_zip(file: MappedFile) -> Any:
    entries = _entries(file)
    folder = next(iter(entries)).split("/")[0]

    def content(name: str) -> bytes | None:
        offset, size = entries.get(f"{folder}/{name}", (0, -1))
        return None if size < 0 else file.content[offset : offset + min(size, MAX_PICKLE)]

    pickled, order = content("data.pkl"), content("byteorder") or b"little"
    if pickled is None:
        raise Malformed(f"it is a zip archive without {folder:.100}/data.pkl, so torch.save did not write it")
    if order not in (b"little", b"big"):
        raise Malformed(f"its byte order is {order[:10]!r}")

    def storage(kind: Any, key: Any, count: Any) -> np.ndarray:
        dtype = _storage_dtype(kind)
        if order == b"big" and dtype.itemsize > 1:
            if dtype.kind not in "biufc":
                raise Malformed(f"it holds big-endian {dtype}, which this program cannot read")
            dtype = dtype.newbyteorder(">")
        offset, size = entries.get(f"{folder}/data/{key}", (0, -1))
        if size < 0:
            raise Malformed(f"it lacks the tensor data {key!r:.100}")
        if count * dtype.itemsize > size:
            raise Malformed(f"its tensor data {key!r:.100} are {size} bytes, too few")
        return file.array(offset, dtype, (count,))

    return unpickler.load(io.BytesIO(pickled), _calls(file), lambda saved_id: _storage_of_id(saved_id, storage))


def _entries(file: MappedFile) -> dict[str, tuple[int, int]]:
    """Return where the content of each entry begins and its size, both in bytes, in the order of the archive."""
    try:
        with zipfile.ZipFile(file.path) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, OverflowError, struct.error) as error:
        raise Malformed("it is cut short or not a zip archive") from error
    if any(info.filename.split("/")[1:] == ["constants.pkl"] for info in infos):
        raise Malformed(
            "it is a program of TorchScript with its weights: give the model as torch.save or safetensors has it, "
            "OpenAI's CLIP as the folder that transformers reads"
        )
    entries: dict[str, tuple[int, int]] = {}
    for info in infos:
        name = info.filename
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
            raise Malformed(f"its entry {name!r:.100} is compressed: unpack it, and zip it without compression")
        if name in entries:
            raise Malformed(f"it has the entry {name!r:.100} twice")
        header = file.content[info.header_offset : info.header_offset + LOCAL_HEADER.size]
        if info.header_offset < 0 or len(header) < LOCAL_HEADER.size or header[:4] != b"PK\x03\x04":
            raise Malformed(f"its entry {name!r:.100} is not where the archive says")
        _, name_length, extra_length = LOCAL_HEADER.unpack(header)
        offset = info.header_offset + LOCAL_HEADER.size + name_length + extra_length
        if offset + info.file_size > file.size:
            raise Malformed(f"it ends within its entry {name!r:.100}")
        entries[name] = (offset, info.file_size)
    if not entries:
        raise Malformed("it is an empty zip archive")
    return entries


# the format before


def _read_legacy(file: MappedFile) -> Any:
    stream = io.BytesIO(file.content[:MAX_PICKLE])
    if unpickler.load(stream) != MAGIC_NUMBER:
        raise Malformed("it is a pickle, but torch.save did not write it")
    if unpickler.load(stream) != FORMAT_VERSION:
        raise Malformed("torch.save wrote it in a format that this program does not know")
    unpickler.load(stream)  # sizes of C's types on the machine of the writer
    start = stream.tell()
    # The storages lie behind the pickle that says how many elements of which type they have, so it is read twice: first
    # for the storages alone, then, once they are found, for the tensors.
    wanted: dict[str, tuple[np.dtype, int]] = {}

    def want(kind: Any, key: str, count: int) -> Opaque:
        if wanted.setdefault(key, (_storage_dtype(kind), count)) != (_storage_dtype(kind), count):
            raise Malformed(f"its tensor data {key!r:.100} have two types or sizes")
        return Opaque()

    unpickler.load(stream, persistent_load=lambda saved_id: _storage_of_id(saved_id, want))
    keys = unpickler.load(stream)
    position = stream.tell()
    storages: dict[str, np.ndarray] = {}
    for key in keys if isinstance(keys, list) else ():
        if not isinstance(key, str) or key in storages or key not in wanted:
            raise Malformed("its list of tensor data is not that of its tensors")
        dtype, count = wanted[key]
        if int(file.array(position, np.dtype("<i8"), ())) != count:
            raise Malformed(f"its tensor data {key!r:.100} have another size than its tensors say")
        storages[key] = file.array(position + 8, dtype, (count,))
        position += 8 + storages[key].nbytes

    def storage(_kind: Any, key: str, _count: int) -> np.ndarray:
        if key not in storages:
            raise Malformed(f"it lacks the tensor data {key!r:.100}")
        return storages[key]

    stream.seek(start)
    return unpickler.load(stream, _calls(file), lambda saved_id: _storage_of_id(saved_id, storage))


# storages and tensors


def _storage_of_id(saved_id: Any, storage: Callable[[Any, str, int], Any]) -> Any:
    """Return what `storage(type, key, element count)` gives for a persistent id; in legacy files also a part of it."""
    if isinstance(saved_id, tuple) and len(saved_id) == 4 and saved_id[0] == "module" and is_class(saved_id[1]):
        return saved_id[1]  # a class that was saved with its source text
    if not (isinstance(saved_id, tuple) and len(saved_id) in (5, 6) and saved_id[0] == "storage"):
        raise Malformed("its pickle refers to something that is not tensor data")
    _, kind, key, _device, count, *view = saved_id
    if not isinstance(key, str) or not _is_size(count):
        raise Malformed("its pickle refers to tensor data without name or size")
    whole = storage(kind, key, count)
    if view and view[0] is not None and isinstance(whole, np.ndarray):
        part = view[0]
        if not (isinstance(part, tuple) and len(part) == 3 and _is_size(part[1]) and _is_size(part[2])):
            raise Malformed(f"it takes an unclear part of the tensor data {key!r:.100}")
        if part[1] + part[2] > whole.size:
            raise Malformed(f"it takes a part of the tensor data {key!r:.100} that lies beyond their end")
        return whole[part[1] : part[1] + part[2]]
    return whole


def _storage_dtype(kind: Any) -> np.dtype:
    name = kind.name.replace("torch.cuda.", "torch.") if is_class(kind) else "?"
    if name not in STORAGES:
        raise Malformed(f"it holds tensor data of the type {name!r:.100}, which this program cannot read")
    return STORAGES[name]


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _calls(file: MappedFile) -> dict[str, Callable[..., Any]]:
    """Return what stands in for the functions by which torch pickles tensors."""
    limit = max(file.size, SMALL)

    def tensor(storage: Any, offset: Any, shape: Any, strides: Any, *more: Any) -> np.ndarray:
        # more: requires_grad, backward_hooks, and metadata when the data are not what the tensor shows
        if len(more) > 2 and isinstance(more[2], dict) and any(more[2].values()):
            raise Malformed("it holds a tensor that is negated or conjugated only when read")
        return _view(storage, offset, shape, strides, limit)

    def typed_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *more: Any) -> np.ndarray:
        dtype = more[2] if len(more) > 2 else None
        if not is_class(dtype) or dtype.name not in DTYPES or not isinstance(storage, np.ndarray):
            raise Malformed("it holds a tensor of a type that this program cannot read")
        whole = storage.size // DTYPES[dtype.name].itemsize * DTYPES[dtype.name].itemsize
        return _view(storage[:whole].view(DTYPES[dtype.name]), offset, shape, strides, limit)

    def parameter(data: Any, *_: Any) -> np.ndarray:
        if not isinstance(data, np.ndarray):
            raise Malformed("it holds a parameter that is not a tensor")
        return data

    def of_type(function: Any, _type: Any, args: Any, _state: Any) -> Any:
        if not is_class(function) or function.name not in rebuilds or not isinstance(args, tuple):
            raise Malformed("it holds a tensor of a type that this program cannot read")
        return rebuilds[function.name](*args)

    def size(sizes: Any = ()) -> tuple:
        if not isinstance(sizes, tuple) or len(sizes) > MAX_DIMENSIONS or not all(map(_is_size, sizes)):
            raise Malformed("it holds a torch.Size that is not one")
        return _Size(sizes)

    rebuilds: dict[str, Callable[..., Any]] = {
        "torch._utils._rebuild_tensor": tensor,
        "torch._utils._rebuild_tensor_v2": tensor,
        "torch._utils._rebuild_tensor_v3": typed_tensor,
        "torch._utils._rebuild_parameter": parameter,
        "torch._utils._rebuild_parameter_with_state": parameter,
    }
    rebuilds |= {f"torch._utils._rebuild_{name}": _refusal(what) for name, what in UNREADABLE.items()}
    return rebuilds | {"torch._tensor._rebuild_from_type_v2": of_type, "torch.Size": size}


class _Size(tuple):
    """A torch.Size, which is no key here: tuples can be chosen so that all have the same hash."""

    __slots__ = ()
    __hash__ = None  # type: ignore[assignment]


def _refusal(what: str) -> Callable[..., NoReturn]:
    def refuse(*_: Any) -> NoReturn:
        raise Malformed(f"it holds {what} tensor, which this program cannot read")

    return refuse


def _view(storage: Any, offset: Any, shape: Any, strides: Any, limit: int) -> np.ndarray:
    """Return the tensor that begins `offset` elements into a flat storage: a view, strides in elements.

    Raises:
        Malformed: It reaches beyond the storage, or is larger than `limit` bytes by repeating elements.
    """
    described = isinstance(storage, np.ndarray) and isinstance(shape, tuple) and isinstance(strides, tuple)
    if not described or len(shape) != len(strides) or len(shape) > MAX_DIMENSIONS:
        raise Malformed("it holds a tensor without data, shape or strides")
    if not all(map(_is_size, (offset, *shape, *strides))):
        raise Malformed("it holds a tensor whose offset, shape or strides are not sizes")
    itemsize = storage.dtype.itemsize
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    # empty ones too: NumPy counts the other sides
    if math.prod(max(size, 1) for size in shape) * itemsize > limit:
        raise Malformed(f"it holds a tensor of shape {short_shape(shape)}, larger than the whole file")
    if 0 in shape:
        return np.ndarray(shape, storage.dtype, storage)
    if last >= storage.size:
        raise Malformed(f"it holds a tensor of shape {short_shape(shape)} that reaches beyond its data")
    return np.ndarray(shape, storage.dtype, storage, offset * itemsize, [stride * itemsize for stride in strides])
