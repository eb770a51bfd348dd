"""Files as `torch.save` writes them, made without torch: tensors, modules and any other object by name only."""

import io
import pickle
import struct
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

KINDS = {
    "float64": "Double",
    "float32": "Float",
    "float16": "Half",
    "bfloat16": "BFloat16",
    "int64": "Long",
    "int32": "Int",
    "int16": "Short",
    "int8": "Char",
    "uint8": "Byte",
    "bool": "Bool",
    "complex64": "ComplexFloat",
}
MAGIC_NUMBER, FORMAT_VERSION = 0x1950A86A20F9469CFC6C, 1001


@dataclass(frozen=True)
class Global:
    """A class or function that the pickle names."""

    module: str
    name: str

    def __call__(self):  # pickle asks for something callable
        raise AssertionError("only its name is used")


@dataclass(eq=False)
class Call:
    """What a file makes by calling `function`; with `new`, as an instance of a class; with state set behind."""

    function: Global
    args: tuple = ()
    state: Any = None
    new: bool = False


@dataclass(eq=False)
class Storage:
    """Elements of one type; `count` and `kind` may lie."""

    elements: np.ndarray
    kind: Global | None = None
    count: int | None = None
    view: tuple | None = None  # legacy files only: (key, first element, number of elements)

    def saved_id(self, key: str) -> tuple:
        kind = self.kind or Global("torch", f"{KINDS[self.elements.dtype.name]}Storage")
        count = self.elements.size if self.count is None else self.count
        return ("storage", kind, key, "cpu", count)


@dataclass(eq=False)
class Tensor:
    """A tensor over a storage, offset and strides in elements."""

    storage: Storage
    offset: Any
    shape: Any
    strides: Any
    function: str = "_rebuild_tensor_v2"
    more: tuple = field(default=(False, Call(Global("collections", "OrderedDict"))))


def tensor(array: np.ndarray) -> Tensor:
    """The contiguous tensor with these values."""
    array = np.array(array, order="C")
    strides = tuple(stride // array.itemsize for stride in array.strides)
    return Tensor(Storage(array.reshape(-1)), 0, array.shape, strides)


class _Pickler(pickle._Pickler):
    """The pickler that is written in Python, which can be told what to write for a class."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def __init__(self, file: io.BytesIO, protocol: int, legacy: bool) -> None:
        super().__init__(file, protocol)
        self.legacy = legacy
        self.keys: dict[int, tuple[str, Storage]] = {}  # storages by identity

    def persistent_id(self, value: Any) -> tuple | None:
        if not isinstance(value, Storage):
            return None
        key, _ = self.keys.setdefault(id(value), (str(len(self.keys)), value))
        return (*value.saved_id(key), value.view) if self.legacy else value.saved_id(key)

    def save_global_name(self, value: Global) -> None:
        self.write(pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode())
        self.memoize(value)

    def save_call(self, value: Call) -> None:
        self.save(value.function)
        self.save(value.args)
        self.write(pickle.NEWOBJ if value.new else pickle.REDUCE)
        self.memoize(value)
        if value.state is not None:
            self.save(value.state)
            self.write(pickle.BUILD)

    def save_tensor(self, value: Tensor) -> None:
        args = (value.storage, value.offset, value.shape, value.strides, *value.more)
        self.save(Call(Global("torch._utils", value.function), args))

    dispatch |= {Global: save_global_name, Call: save_call, Tensor: save_tensor}


def pickled(value: Any, protocol: int = 2, legacy: bool = False) -> tuple[bytes, list[tuple[str, Storage]]]:
    """The pickle of `value`, and the storages that it refers to, by key."""
    file = io.BytesIO()
    pickler = _Pickler(file, protocol, legacy)
    pickler.dump(value)
    return file.getvalue(), list(pickler.keys.values())


def save(path: Path, value: Any, protocol: int = 2, **entries: bytes) -> Path:
    """Write `value` as torch 1.6 and later do; `entries` are added, or left out if None. Returns `path`."""
    data, storages = pickled(value, protocol)
    contents = {"data.pkl": data, "version": b"3\n"}
    contents |= {f"data/{key}": storage.elements.tobytes() for key, storage in storages}
    return save_entries(path, {name: data for name, data in (contents | entries).items() if data is not None})


def save_entries(path: Path, entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(f"{path.stem}/{name}", content)
    return path


def save_legacy(path: Path, value: Any, changed: dict[str, int] | None = None) -> Path:
    """Write `value` as torch did before 1.6; `changed`: other element counts for storages by key."""
    data, storages = pickled(value, legacy=True)
    head = [MAGIC_NUMBER, FORMAT_VERSION, {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}]
    content = b"".join(pickle.dumps(part, 2) for part in head) + data
    content += pickle.dumps([key for key, _ in storages], 2)
    for key, storage in storages:
        count = (changed or {}).get(key, storage.elements.size)
        content += struct.pack("<q", count) + storage.elements.tobytes()
    path.write_bytes(content)
    return path


def module(parameters=(), buffers=(), modules=(), **more) -> Call:
    """A network as torch pickles it whole: pairs of name and tensor, and of name and network."""
    ordered = Global("collections", "OrderedDict")
    parts = {"_parameters": parameters, "_buffers": buffers, "_modules": modules}
    state = {"training": False} | {name: Call(ordered, (list(part),)) for name, part in parts.items()} | more
    return Call(Global("net", "Module"), (), state, new=True)


WRITERS = pytest.mark.parametrize("write", [save, save_legacy], ids=["zip", "legacy"])
