"""Read a pickle as plain values: Python's own unpickler, which here imports and calls nothing that a file names.

Every class or function that a pickle names is an inert subclass of `Opaque`. A few names stand for functions of this
program (`_PLAIN`, and those of the caller), which give containers, bytes and tensors. Before the unpickler runs,
`pickletools` lists the opcodes, and what could take much memory or time is refused (`_check_opcodes`).
"""

import io
import pickle
import pickletools
import warnings
from collections.abc import Callable, Iterable, Mapping
from pickletools import markobject
from typing import Any, NoReturn, TypeGuard

from dm_generations.weights.mmap import Malformed

MAX_OPCODES = 4_000_000
MAX_COPIED = 4_000_000  # items or characters that calls such as set(list) may copy in all
MAX_DEPTH = 64  # of containers in containers
MAX_INT_BYTES = 32
MAX_NAME = 1000  # characters of a module and class name
MAX_NAMES = 10_000  # different ones

# On the stack of `_check_opcodes`. Large integers, tuples and frozensets can be chosen so that all have the same hash.
_MARK, _USABLE, _UNUSABLE = range(3)  # as a key
_MAX_KEY_BITS = 60
_DAMAGED = (pickle.UnpicklingError, EOFError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
_REFUSED = {"PERSID", "EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER"}
# Where the keys are in what opcodes take from the stack.
_KEYS = {
    "SETITEM": slice(1, 2),
    "SETITEMS": slice(2, None, 2),
    "DICT": slice(1, None, 2),
    "ADDITEMS": slice(2, None),
    "FROZENSET": slice(1, None),
}
_NO_KEYS = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "FROZENSET"}
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}


class Opaque:
    """An inert stand-in: a subclass is a class or function that a file names, an instance is what the file made of it.

    Attributes:
        name: "module.Class".
        args: What it was called with; None for the class itself.
        state: What was set on the object, as a rule its `__dict__`.
        items: What was appended to it, or the (key, value) pairs that were stored in it.
    """

    name: str = ""
    args: tuple | None = None
    state: Any = None
    items: list

    def __new__(cls, *args: Any, **_keywords: Any) -> "Opaque":
        """Make an instance that remembers the arguments."""
        made = object.__new__(cls)
        made.args, made.items = args, []
        return made

    def __call__(self, *args: Any) -> "Opaque":
        """Return a stand-in for what a call of it would give."""
        made = Opaque(*args)
        made.name = f"{self.name:.{MAX_NAME}}()"
        return made

    def __repr__(self) -> str:
        return f"<Opaque {self.name:.100}(...)>"

    # What the unpickler calls on an object that it fills.

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def append(self, item: Any) -> None:
        """Take an element, as a list does."""
        self.items.append(item)

    add = append

    def extend(self, items: Iterable[Any]) -> None:
        """Take several elements, as a list does."""
        self.items.extend(items)


class _Dict(dict):
    """An OrderedDict, Counter or defaultdict of a file: a dict whose further attributes are dropped."""

    def __setstate__(self, _state: Any) -> None:
        pass


def is_class(value: Any) -> TypeGuard[type[Opaque]]:
    """Whether `value` stands for a class or function that a pickle names."""
    return isinstance(value, type) and issubclass(value, Opaque)


def load(
    stream: io.BytesIO,
    calls: Mapping[str, Callable[..., Any]] | None = None,
    persistent_load: Callable[[Any], Any] | None = None,
) -> Any:
    """Read the pickle at the position of `stream`, which then stands behind it.

    Args:
        stream: The bytes in which the pickle lies.
        calls: What stands in for functions of these names ("module.name"). They get the arguments of the file,
            unchecked, and give arrays, instances of `Opaque` or short tuples of integers.
        persistent_load: Gives the value of a persistent id: an array or a stand-in.

    Returns:
        Plain values, what `calls` and `persistent_load` give, and stand-ins for everything else.

    Raises:
        Malformed: The pickle is damaged or beyond the limits of this module; or `calls` raised TypeError.
    """
    start = stream.tell()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unknown escapes in texts of protocol 0
            _check_opcodes(stream)
            end = stream.tell()
            stream.seek(start)
            value = _Unpickler(stream, calls or {}, persistent_load or _refuse_persistent).load()
    except Malformed:
        raise
    except _DAMAGED as error:
        raise Malformed(f"its pickle is cut short or wrong near byte {stream.tell()}") from error
    stream.seek(end)
    _check_depth(value, 0, {})
    return value


class _Unpickler(pickle.Unpickler):
    """The unpickler, confined to stand-ins."""

    def __init__(
        self, stream: io.BytesIO, calls: Mapping[str, Callable[..., Any]], persistent_load: Callable[[Any], Any]
    ) -> None:
        super().__init__(stream, encoding="latin-1")
        self._calls, self._persistent_load = calls, persistent_load
        self._classes: dict[str, type] = {}
        self._copied = 0

    def find_class(self, module: str, name: str) -> type:
        """Return the stand-in for a name, never what bears it."""
        full = f"{_PYTHON_2.get(module, module)}.{name}"
        if full not in self._classes:
            if len(full) > MAX_NAME or len(self._classes) >= MAX_NAMES:
                raise Malformed(f"its pickle has a class name of more than {MAX_NAME} characters, or too many of them")
            attributes: dict[str, Any] = {"name": full}
            # Functions are classes too, as the unpickler could set attributes on a function of ours.
            if full in self._calls:
                attributes["__new__"] = lambda _cls, *args, _call=self._calls[full]: _call(*args)
            elif full in _PLAIN:
                attributes["__new__"] = lambda _cls, *args, _call=_PLAIN[full]: self._copy(_call, args)
            self._classes[full] = type("Opaque", (Opaque,), attributes)
        return self._classes[full]

    def persistent_load(self, saved_id: Any) -> Any:
        return self._persistent_load(saved_id)

    def _copy(self, call: Callable[..., Any], args: tuple) -> Any:
        self._copied += sum(len(arg) for arg in args if hasattr(arg, "__len__"))
        if self._copied > MAX_COPIED:
            raise Malformed("its pickle copies the same data over and over")
        return call(*args)


def _refuse_persistent(_saved_id: Any) -> NoReturn:
    raise Malformed("its pickle refers to something outside of it")


# calls that give plain values


def _key(value: Any) -> Any:
    """Return `value` if it can be a key of a dict and its hash costs little."""
    if _is_large(value) or not (isinstance(value, (str, bytes, int, float, Opaque, type(None))) or is_class(value)):
        raise Malformed("its pickle has a key that is not a text, a number or a class")
    return value


def _is_large(value: Any) -> bool:
    return isinstance(value, int) and value.bit_length() > _MAX_KEY_BITS


def _dict(pairs: Any = ()) -> dict:
    pairs = pairs.items() if isinstance(pairs, dict) else pairs
    return _Dict((_key(key), value) for key, value in pairs)


def _set(items: Any = ()) -> set:
    return set(map(_key, items))


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """Return the bytes that protocols below 3 write as text."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise Malformed("its pickle encodes text in a way that weight files do not")
    return text.encode("latin-1")


def _reconstruct(cls: Any, *args: Any) -> Opaque:
    if not is_class(cls):
        raise Malformed("its pickle makes an object of something that is not a class")
    return Opaque.__new__(cls, *args)


_PLAIN: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _dict,
    "collections.Counter": _dict,
    "collections.defaultdict": lambda _factory=None: _Dict(),
    "builtins.dict": _dict,
    "builtins.set": _set,
    "builtins.frozenset": _set,
    "builtins.bytes": lambda: b"",
    "copyreg._reconstructor": _reconstruct,
    "_codecs.encode": _encode,
}


# limits


def _check_opcodes(stream: io.BytesIO) -> None:
    """Raise Malformed for a pickle that could take much memory or time; `stream` then stands behind it.

    The stack and the memo are followed with `_USABLE` or `_UNUSABLE` in place of each value.
    """
    stack: list[int] = []
    memo: dict[int, int] = {}
    frame_end = 0
    steps: Iterable[tuple[Any, Any, Any]] = pickletools.genops(stream)
    for count, (opcode, argument, position) in enumerate(steps):
        name = opcode.name
        if count > MAX_OPCODES:
            raise Malformed(f"its pickle has more than {MAX_OPCODES} steps")
        if name in _REFUSED:
            raise Malformed(f"its pickle uses {name}, which weight files do not")
        if type(argument) is int and argument.bit_length() > 8 * MAX_INT_BYTES:
            raise Malformed(f"its pickle has an integer of more than {MAX_INT_BYTES} bytes")
        # Here the unpickler would go on at another byte than pickletools.
        if position < frame_end and (name == "FRAME" or stream.tell() > frame_end):
            raise Malformed("its pickle goes on within a value where a frame ends")
        if name == "FRAME":
            frame_end = stream.tell() + argument
        taken = _take(stack, opcode)
        if name in _KEYS and _UNUSABLE in taken[_KEYS[name]]:
            raise Malformed("its pickle has a key that is not a text, a number or a class")
        if name in ("PUT", "BINPUT", "LONG_BINPUT"):
            if argument > count:  # the unpickler makes room for all numbers below it
                raise Malformed(f"its pickle remembers a value under the number {argument}")
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = taken[0]
            stack += taken
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "DUP":
            stack += taken * 2
        elif name in _NO_KEYS or (opcode.stack_after and _is_large(argument)):
            stack.append(_UNUSABLE)
        else:
            stack += [_MARK if kind is markobject else _USABLE for kind in opcode.stack_after]


def _take(stack: list[int], opcode: pickletools.OpcodeInfo) -> list[int]:
    """Take from the stack what an opcode takes, with the mark and what lies above it if the opcode takes a mark."""
    before = opcode.stack_before
    takes_mark = markobject in before
    start = len(stack) - len(before)
    if takes_mark:
        mark = next((index for index in range(len(stack) - 1, -1, -1) if stack[index] == _MARK), -1)
        start = mark - before.index(markobject)
    taken = stack[start:] if start >= 0 else []
    if start < 0 or (taken.count(_MARK) != takes_mark and opcode.name != "POP"):
        raise Malformed("its pickle takes a value where there is none")
    del stack[start:]
    return taken


def _check_depth(value: Any, level: int, heights: dict[int, int]) -> int:
    """Return how deep containers are nested in `value`; objects end a nesting, so they may refer to what holds them.

    Args:
        value: What was read.
        level: How deep in other containers it lies.
        heights: What this function gave for containers, by id.

    Raises:
        Malformed: They are nested deeper than MAX_DEPTH, or one holds itself.
    """
    if not isinstance(value, (dict, list, tuple, set, frozenset)):
        return 0
    if id(value) not in heights and level <= MAX_DEPTH:
        parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        heights[id(value)] = 1 + max((_check_depth(part, level + 1, heights) for part in parts), default=0)
    if level + heights.get(id(value), 0) > MAX_DEPTH:
        raise Malformed(f"its pickle nests containers deeper than {MAX_DEPTH}")
    return heights[id(value)]
