"""Pickles as plain values: an interpreter of pickle's opcodes that imports nothing and calls nothing of the file's.

Python's own Unpickler calls what the file names. This one knows a few containers by name (`_PLAIN`) and what its
caller adds; any other class or function becomes an `Opaque`, and so does whatever the file does with it. The
opcodes are decoded by `pickletools`, the standard library's description of the format (protocols 0 to 5).

The file is not trusted: a length in it is held against the bytes that there are, and the numbers of opcodes, of
copied items and of nested containers have limits.
"""

import mmap
import pickletools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from dm_generations.weights.mmap import Malformed

MAX_BYTES = 64 << 20  # of one pickle; tensors lie outside of it
MAX_OPCODES = 4_000_000
MAX_COPIED = 4_000_000  # items or characters that calls such as set(list) may copy in all
MAX_DEPTH = 64  # of containers in containers
MAX_INT_BYTES = 32
MAX_NAME = 1000  # characters of a module or class name

_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_FRESH = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
_IGNORED = {"PROTO", "FRAME"}
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}
_NEW = {"copyreg._reconstructor", "copyreg.__newobj__"}


class Opaque:
    """A class or function that a file names, or what the file made of it; inert.

    name: "module.Class". args: None for the class itself, else what it was called with. state: what was set on the
    object, its `__dict__` as a rule. items: what was appended to it, or (key, value) pairs that were stored in it.
    """

    __slots__ = ("args", "items", "name", "state")

    def __init__(self, name: str, args: tuple | None = None, state: Any = None) -> None:
        self.name, self.args, self.state = name, args, state
        self.items: list = []

    def __repr__(self) -> str:
        return f"<Opaque {self.name:.100}{'' if self.args is None else '(...)'}>"


class Window:
    """The bytes of a mapping from `start` on, at most MAX_BYTES: the file that `pickletools` reads."""

    def __init__(self, content: mmap.mmap | bytes, start: int, stop: int) -> None:
        self._content, self._position = content, start
        self._stop = min(stop, start + MAX_BYTES, len(content))

    def tell(self) -> int:
        return self._position

    def read(self, count: int) -> bytes:
        return self._up_to(min(self._position + max(count, 0), self._stop))

    def readline(self) -> bytes:
        newline = self._content.find(b"\n", self._position, self._stop)
        return self._up_to(self._stop if newline < 0 else newline + 1)

    def _up_to(self, end: int) -> bytes:
        piece = self._content[self._position : end]
        self._position = max(end, self._position)
        return piece


def load(
    window: Window,
    calls: Mapping[str, Callable[..., Any]] | None = None,
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """The value that the pickle at the window's position describes; the window then stands behind it.

    calls: what stands in for functions of these names ("module.name"); they get the file's arguments, unchecked.
    persistent: gives the value of a persistent id. Raises Malformed, also for whatever these two raise as TypeError.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unknown escapes in texts of protocol 0
            value = _Machine(calls or {}, persistent or _no_persistent).run(window)
    except Malformed:
        raise
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise Malformed(f"its pickle is cut short or wrong at byte {window.tell()}") from error
    _check_depth(value)
    return value


class _Machine:
    """The stack and the memo. Each opcode that is more than a push has a method of its (lower-case) name."""

    def __init__(self, calls: Mapping[str, Callable[..., Any]], persistent: Callable[[Any], Any]) -> None:
        self.calls, self.persistent = calls, persistent
        self.stack: list = []
        self.memo: dict[int, Any] = {}
        self.copied = 0

    def run(self, window: Window) -> Any:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(window)):
            if count > MAX_OPCODES:
                raise Malformed(f"its pickle has more than {MAX_OPCODES} steps")
            name = opcode.name
            if name in _PUSHED:
                self.push_argument(argument)
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            elif name in _FRESH:
                self.stack.append(_FRESH[name]())
            elif name in _STEPS:
                _STEPS[name](self, argument)
            elif name == "STOP":
                return self.pop()
            elif name not in _IGNORED:
                raise Malformed(f"its pickle uses {name}, which weight files do not")
        raise Malformed("its pickle has no end")

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise Malformed("its pickle takes a value where there is none")
        return value

    def pop_to_mark(self) -> list:
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is _MARK:
                items = self.stack[index + 1 :]
                del self.stack[index:]
                return items
        raise Malformed("its pickle ends a list that was not begun")

    def top(self) -> Any:
        if self.stack[-1] is _MARK:
            raise Malformed("its pickle takes a value where there is none")
        return self.stack[-1]

    def push_argument(self, argument: Any) -> None:
        if type(argument) is int and argument.bit_length() > 8 * MAX_INT_BYTES:
            raise Malformed(f"its pickle has an integer of more than {MAX_INT_BYTES} bytes")
        self.stack.append(argument)

    # the stack and the memo

    def mark(self, _: None) -> None:
        self.stack.append(_MARK)

    def pop_opcode(self, _: None) -> None:
        self.stack.pop()

    def pop_mark(self, _: None) -> None:
        self.pop_to_mark()

    def dup(self, _: None) -> None:
        self.stack.append(self.top())

    def put(self, index: int) -> None:
        self.memo[index] = self.top()

    def memoize(self, _: None) -> None:
        self.memo[len(self.memo)] = self.top()

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    # containers

    def tuple_of(self, count: int | None) -> None:
        if count is None:
            items = self.pop_to_mark()
        else:
            items = [self.pop() for _ in range(count)][::-1]
        self.stack.append(tuple(items))

    def list(self, _: None) -> None:
        self.stack.append(self.pop_to_mark())

    def dict(self, _: None) -> None:
        items = self.pop_to_mark()
        self.stack.append({})
        self.store(items)

    def frozenset(self, _: None) -> None:
        self.stack.append(frozenset(map(_key, self.pop_to_mark())))

    def append(self, _: None) -> None:
        self.extend([self.pop()])

    def appends(self, _: None) -> None:
        self.extend(self.pop_to_mark())

    def setitem(self, _: None) -> None:
        value, key = self.pop(), self.pop()
        self.store([key, value])

    def setitems(self, _: None) -> None:
        self.store(self.pop_to_mark())

    def additems(self, _: None) -> None:
        items, target = self.pop_to_mark(), self.top()
        if isinstance(target, Opaque):
            target.items.extend(items)
        elif isinstance(target, set):
            target.update(map(_key, items))
        else:
            raise Malformed("its pickle adds items to something that is no set")

    def extend(self, items: list) -> None:
        target = self.top()
        if isinstance(target, Opaque):
            target.items.extend(items)
        elif isinstance(target, list):
            target.extend(items)
        else:
            raise Malformed("its pickle appends to something that is no list")

    def store(self, items: list) -> None:
        target = self.top()
        if len(items) % 2:
            raise Malformed("its pickle stores a key without a value")
        pairs = zip(items[::2], items[1::2], strict=True)
        if isinstance(target, Opaque):
            target.items.extend(pairs)
        elif isinstance(target, dict):
            target.update((_key(key), value) for key, value in pairs)
        else:
            raise Malformed("its pickle stores items in something that is no dict")

    # names, and what the file wants to be done with them

    def global_name(self, argument: str) -> None:
        # pickletools joins the two lines of module and name by a space
        self.push_name(*argument.split(" ", 1))

    def stack_global(self, _: None) -> None:
        name, module = self.pop(), self.pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise Malformed("its pickle names a class by something that is no text")
        self.push_name(module, name)

    def push_name(self, module: str, name: str) -> None:
        if len(module) + len(name) > MAX_NAME:
            raise Malformed(f"its pickle has a class name of more than {MAX_NAME} characters")
        self.stack.append(Opaque(f"{_PYTHON_2.get(module, module)}.{name}"))

    def inst(self, argument: str) -> None:
        args = self.pop_to_mark()
        self.global_name(argument)
        self.stack.append(self.call(self.pop(), tuple(args)))

    def obj(self, _: None) -> None:
        cls, *args = self.pop_to_mark()
        self.stack.append(self.call(cls, tuple(args)))

    def reduce(self, _: None) -> None:
        args, function = self.pop(), self.pop()
        self.stack.append(self.call(function, args))

    def newobj_ex(self, _: None) -> None:
        keywords, args, cls = self.pop(), self.pop(), self.pop()
        if not isinstance(keywords, dict):
            raise Malformed("its pickle makes an object with keywords that are no dict")
        self.stack.append(self.call(cls, args))

    def call(self, function: Any, args: Any) -> Any:
        if not (isinstance(function, Opaque) and isinstance(args, tuple)):
            raise Malformed("its pickle calls something that is no class or function")
        if function.args is None and function.name in _NEW and args and isinstance(args[0], Opaque):
            function, args = args[0], args[1:]
        if function.args is not None:
            return Opaque(f"{function.name:.{MAX_NAME}}()", args)
        if function.name in self.calls:
            return self.calls[function.name](*args)
        if function.name in _PLAIN:
            return self.plain(function.name, args)
        return Opaque(function.name, args)

    def plain(self, name: str, args: tuple) -> Any:
        """The container or number that a call of one of `_PLAIN` gives."""
        self.copied += sum(len(arg) for arg in args if hasattr(arg, "__len__"))
        if self.copied > MAX_COPIED:
            raise Malformed("its pickle copies the same data over and over")
        return _PLAIN[name](*args)

    def build(self, _: None) -> None:
        state, target = self.pop(), self.top()
        # what else can have a state here, a dict or a tensor, has attributes that do not count
        if isinstance(target, Opaque):
            target.state = state

    def binpersid(self, _: None) -> None:
        self.stack.append(self.persistent(self.pop()))


_PUSHED = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark,
    "POP": _Machine.pop_opcode,
    "POP_MARK": _Machine.pop_mark,
    "DUP": _Machine.dup,
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine.put),
    "MEMOIZE": _Machine.memoize,
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.get),
    "TUPLE": lambda machine, _: machine.tuple_of(None),
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "LIST": _Machine.list,
    "DICT": _Machine.dict,
    "FROZENSET": _Machine.frozenset,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "SETITEM": _Machine.setitem,
    "SETITEMS": _Machine.setitems,
    "ADDITEMS": _Machine.additems,
    "GLOBAL": _Machine.global_name,
    "STACK_GLOBAL": _Machine.stack_global,
    "INST": _Machine.inst,
    "OBJ": _Machine.obj,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.reduce,
    "NEWOBJ_EX": _Machine.newobj_ex,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.binpersid,
}


def _no_persistent(_: Any) -> NoReturn:
    raise Malformed("its pickle refers to something outside of it")


def _key(value: Any) -> Any:
    """`value`, if it can be a key of a dict without a deep or long computation of its hash."""
    parts = value if isinstance(value, tuple) else (value,)
    if not all(isinstance(part, (str, bytes, int, float, complex, Opaque, type(None))) for part in parts):
        raise Malformed("its pickle has a key that is no text, number or class")
    return value


def _dict(pairs: Any = ()) -> dict:
    pairs = pairs.items() if isinstance(pairs, dict) else pairs
    return {_key(key): value for key, value in pairs}


def _set(items: Any = ()) -> set:
    return set(map(_key, items))


def _encoded(text: str, encoding: str = "latin1") -> bytes:
    """bytes, as protocols below 3 write them."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise Malformed("its pickle encodes text in a way that weight files do not")
    return text.encode("latin-1")


# Calls that give plain values. OrderedDict and defaultdict become dicts, which keep their order.
_PLAIN: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _dict,
    "collections.Counter": _dict,
    "collections.defaultdict": lambda factory=None: {},
    "builtins.dict": _dict,
    "builtins.set": _set,
    "builtins.frozenset": lambda items=(): frozenset(_set(items)),
    "builtins.list": lambda items=(): list(items),
    "builtins.tuple": lambda items=(): tuple(items),
    "builtins.bytes": lambda: b"",
    "_codecs.encode": _encoded,
}


def _check_depth(root: Any) -> None:
    """Raises Malformed if containers are nested too deep to be walked, or hold themselves.

    An Opaque ends a nesting and begins another, so objects may refer back to what holds them.
    """
    height: dict[int, int | None] = {}  # of containers by id; None while their parts are measured
    seen: set[int] = set()  # objects by id
    roots = [[root]]
    for start in roots:  # it grows, and keeps what it holds alive: ids stay theirs
        stack: list = [start]
        while stack:
            node = id(stack[-1])
            if height.get(node) is not None:
                stack.pop()
                continue
            parts = _parts(stack[-1])
            if node in height:
                stack.pop()
                height[node] = 1 + max((height[part] or 0 for part in parts if part in height), default=0)
                if height[node] > MAX_DEPTH:
                    raise Malformed(f"its pickle nests containers deeper than {MAX_DEPTH}")
                continue
            height[node] = None
            for name, part in parts.items():
                if isinstance(part, Opaque):
                    if name not in seen:
                        seen.add(name)
                        roots.append([part.args, part.state, part.items])
                elif name not in height:
                    stack.append(part)
                elif height[name] is None:
                    raise Malformed("its pickle has a container that holds itself")


def _parts(container: Any) -> dict[int, Any]:
    """What is in a container and can be one itself, by id."""
    items = [*container.keys(), *container.values()] if isinstance(container, dict) else container
    return {id(item): item for item in items if isinstance(item, (dict, list, tuple, set, frozenset, Opaque))}
