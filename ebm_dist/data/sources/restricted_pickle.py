"""Reads CIFAR's python archives by interpreting their pickle opcodes, without unpickling.

The batches are Python 2 pickles of `{"data": ndarray, "labels": list, …}`. `pickle.Unpickler` with
a restricted `find_class` would still pass foreign bytes to numpy's reconstructors. Here
`pickletools` decodes the opcodes, and this module interprets the two dozen that plain containers
need, on its own stack. It imports and calls nothing: the few names that occur in the pickle of an
array become inert objects, and every other name is refused.
"""

from __future__ import annotations

import math
import pickletools
from dataclasses import dataclass
from typing import Any

import numpy as np

from ebm_dist.core.errors import UserError

_ARRAY_NAMES = {
    "numpy.core.multiarray _reconstruct": "reconstruct",
    "numpy._core.multiarray _reconstruct": "reconstruct",
    "numpy ndarray": "ndarray",
    "numpy dtype": "dtype",
    "_codecs encode": "encode",  # Python 3's form of bytes in protocol 2
}

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NUMBERS = {"BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "FLOAT", "BINFLOAT"}
_BYTES = {"STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
_TEXTS = {"UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
_PUSH_ARGUMENT = _NUMBERS | _BYTES | _TEXTS
_IGNORED = frozenset(["PROTO", "FRAME"])


@dataclass(frozen=True, slots=True)
class _Name:
    """A global name in the pickle of an array; it does nothing."""

    role: str


@dataclass(slots=True)
class _Blank:
    """An array or dtype between REDUCE and BUILD."""

    role: str
    code: str = ""
    value: np.ndarray | None = None


class _Mark:
    pass


def read_plain_pickle(data: bytes, *, where: str) -> Any:
    """The pickled object: dicts, lists, tuples, numbers, strings and uint8 arrays.

    Strings of Python 2 are read as latin-1.

    Raises:
        UserError: names `where`; the pickle has another opcode or name, or is truncated.
    """
    try:
        return _interpret(data, where)
    except UserError:
        raise
    except Exception as error:  # a damaged pickle fails anywhere: stack, memo, codec, sizes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{where}: not a readable CIFAR batch ({reason})") from None


def _interpret(data: bytes, where: str) -> Any:
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        for index in range(len(stack) - 1, -1, -1):
            if isinstance(stack[index], _Mark):
                items = stack[index + 1 :]
                del stack[index:]
                return items
        raise ValueError("no mark on the stack")

    argument: Any
    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name in _IGNORED:
            continue
        if name in _PUSH_ARGUMENT:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "MARK":
            stack.append(_Mark())
        elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
            stack.append({"EMPTY_DICT": {}, "EMPTY_LIST": [], "EMPTY_TUPLE": ()}[name])
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            size = int(name[-1])
            items = tuple(stack[-size:])
            if len(items) < size:
                raise ValueError("stack underflow")
            stack[-size:] = [items]
        elif name in ("TUPLE", "LIST"):
            items = since_mark()
            stack.append(tuple(items) if name == "TUPLE" else items)
        elif name == "DICT":
            items = since_mark()
            stack.append(_keyed(items))
        elif name == "APPEND":
            item = stack.pop()
            _typed(stack[-1], list).append(item)
        elif name == "APPENDS":
            items = since_mark()
            _typed(stack[-1], list).extend(items)
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            _typed(stack[-1], dict).update(_keyed([key, value]))
        elif name == "SETITEMS":
            items = since_mark()
            _typed(stack[-1], dict).update(_keyed(items))
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            # Nested lists that repeat one list ten times each are small in the pickle, but take
            # exponential time to walk. CIFAR repeats only names and text.
            if isinstance(memo[argument], list | tuple | dict):
                raise ValueError("a list, tuple or dict that comes twice")
            stack.append(memo[argument])
        elif name == "GLOBAL":
            stack.append(_named(argument, where))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(_named(f"{module} {attribute}", where))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(_reduce(_typed(function, _Name), _typed(arguments, tuple)))
        elif name == "BUILD":
            state = stack.pop()
            _build(_typed(stack[-1], _Blank), _typed(state, tuple))
        elif name == "STOP":
            return _finish(stack.pop())
        else:
            raise UserError(
                f"{where}: its pickle uses the opcode {name}, which plain data does not need; "
                "it is not read, since it could run code"
            )
    raise ValueError("no STOP")


def _named(name: str, where: str) -> _Name:
    if name not in _ARRAY_NAMES:
        raise UserError(
            f"{where}: its pickle names {name.replace(' ', '.')!r}, which CIFAR does not need; "
            "it is not read, since it could run code"
        )
    return _Name(_ARRAY_NAMES[name])


def _keyed(items: list[Any]) -> dict[Any, Any]:
    # Hashing deeply nested tuples would overflow the C stack.
    if not all(isinstance(key, str | bytes | int) for key in items[::2]):
        raise ValueError("a key that is no text and no number")
    return dict(zip(items[::2], items[1::2], strict=True))


def _typed(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"expected {kind.__name__}, got {type(value).__name__}")
    return value


def _reduce(function: _Name, arguments: tuple[Any, ...]) -> Any:
    if function.role == "encode":
        return str(arguments[0]).encode("latin-1")
    if function.role == "reconstruct":
        return _Blank("ndarray")
    if function.role == "dtype":
        return _Blank("dtype", code=str(arguments[0]))
    raise ValueError(f"{function.role} is not called by an array's pickle")


def _build(blank: _Blank, state: tuple[Any, ...]) -> None:
    if blank.role == "dtype":
        return  # byte order and alignment: one byte has neither
    _, shape, dtype, fortran, raw = state
    if not isinstance(dtype, _Blank) or dtype.code != "u1":
        raise ValueError("an array that is not uint8")
    data = raw.encode("latin-1") if isinstance(raw, str) else bytes(_typed(raw, bytes))
    if len(_typed(shape, tuple)) > 8 or not all(
        isinstance(size, int) and 0 <= size <= len(data) for size in shape
    ):
        raise ValueError("an array whose shape is none")
    if math.prod(shape) != len(data):
        raise ValueError(f"an array of shape {shape} with {len(data)} bytes")
    order = "F" if fortran else "C"
    blank.value = np.frombuffer(data, dtype=np.uint8).reshape(shape, order=order)


def _finish(value: Any) -> Any:
    """Arrays in place of their blanks, at the top level and in a dict's values."""
    if isinstance(value, _Blank):
        return value.value
    if isinstance(value, dict):
        return {
            key.decode("latin-1") if isinstance(key, bytes) else key: (
                item.value if isinstance(item, _Blank) else item
            )
            for key, item in value.items()
        }
    return value
