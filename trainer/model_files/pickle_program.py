"""The program in a pickled checkpoint, carried out with nothing but plain values: tensors are described, nothing runs.

Python's unpickler of the standard library with all but 42 of its operations taken out. What a pickle may call is the
list below, and each stands here for a description or for nothing: no class or function is ever looked up by its name.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

MOST_OPERATIONS = 1_000_000  # SDXL takes 90,000; each costs some 1 us and 100 bytes
_MOST_AXES, _MOST_ARGUMENTS = 8, 16  # one tuple may stand for the arguments of many calls
_OLD_MAGIC, _OLD_VERSION = 0x1950A86A20F9469CFC6C, 1001
_Unpickler: Any = pickle._Unpickler  # pyright: ignore[reportAttributeAccessIssue] - the one in Python, made for this


class NotTensors(Exception):
    """A pickle wants more than tensors; the text names what."""


class BadProgram(Exception):
    """A pickle is damaged, or none that torch writes."""


@dataclass(frozen=True)
class Stored:
    """Bytes of an archive: its member `data/KEY`, of `count` elements of torch's dtype `dtype`, such as "float16"."""

    key: str
    dtype: str
    count: int


@dataclass(frozen=True)
class StoredView:
    """A tensor: elements of `stored` from `offset` on, at distances of `stride`, all counted in elements."""

    stored: Stored
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class _Named:
    """What stands in for a class or function."""

    call: Callable[..., object] | None = None
    dtype: str = ""


def _view(stored: object, offset: object, shape: object, stride: object, *_: object, dtype: str = "") -> StoredView:
    sound = isinstance(stored, Stored) and type(offset) is int and _are_counts(shape) and _are_counts(stride)
    if not sound or len(shape) != len(stride):  # pyright: ignore[reportArgumentType] - tuples by now
        raise BadProgram("a tensor without a place, shape or stride in whole numbers")
    return StoredView(stored, dtype or stored.dtype, offset, shape, stride)  # pyright: ignore


def _view_of_dtype(*arguments: object) -> StoredView:
    """The form of dtypes that have no storage class: the dtype is the seventh argument."""
    dtype = arguments[6] if len(arguments) > 6 else None
    if not isinstance(dtype, _Named) or not dtype.dtype:
        raise BadProgram("a tensor without a dtype")
    return _view(*arguments[:4], dtype=dtype.dtype)


def _are_counts(values: object) -> bool:
    return (
        isinstance(values, tuple)
        and len(values) <= _MOST_AXES
        and all(type(value) is int and 0 <= value < 1 << 48 for value in values)
    )


def _nothing(*_: object) -> None:
    return None


_STORAGES = {
    "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64", "Int": "int32",
    "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool", "ComplexFloat": "complex64",
    "ComplexDouble": "complex128",
}  # fmt: skip
_DTYPES = (*_STORAGES.values(), "float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64")
_NAMES = {
    "collections.OrderedDict": _Named(lambda *_: {}),
    "torch._utils._rebuild_tensor": _Named(_view),
    "torch._utils._rebuild_tensor_v2": _Named(_view),
    "torch._utils._rebuild_tensor_v3": _Named(_view_of_dtype),
    "torch._utils._rebuild_parameter": _Named(lambda data, *_: data),
    "torch.storage.UntypedStorage": _Named(dtype="uint8"),
    # Harmless company of weights in a training checkpoint, which nobody reads.
    **dict.fromkeys(
        ("collections.Counter", "builtins.set", "builtins.bytearray", "_codecs.encode", "torch.device", "torch.Size"),
        _Named(_nothing),
    ),
    **{f"torch.{name}Storage": _Named(dtype=dtype) for name, dtype in _STORAGES.items()},
    **{f"torch.{dtype}": _Named(dtype=dtype) for dtype in _DTYPES},
}
_OPERATIONS = (
    "PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT "
    "BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINSTRING SHORT_BINSTRING "
    "EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS "
    "BINGET LONG_BINGET BINPUT LONG_BINPUT MEMOIZE GLOBAL REDUCE BUILD BINPERSID"
)
_BAD = (EOFError, pickle.UnpicklingError, ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError)


def read_program(data: bytes) -> object:
    """What a pickle makes: plain values, dictionaries with keys of text or whole numbers, `StoredView` for tensors.

    Raises:
        NotTensors: it wants a class or function that no tensor needs.
        BadProgram: it is damaged, or longer than a model's.
    """
    return _value_of(io.BytesIO(data))


def read_old_programs(data: bytes) -> tuple[object, list[str], int]:
    """As `read_program`, of a file of torch before 1.6: five pickles one after another, then the tensors' data.

    Returns:
        What was saved, the keys of the data in their order, and where the data begin.

    Raises:
        NotTensors, BadProgram: as `read_program`; or the format is another.
    """
    stream = io.BytesIO(data)
    magic, version = _value_of(stream), _value_of(stream)
    if (magic, version) != (_OLD_MAGIC, _OLD_VERSION):
        raise BadProgram("a pickle that torch did not write")
    system, content, keys = _value_of(stream), _value_of(stream), _value_of(stream)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise BadProgram("its numbers are not in the byte order little")
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or len(set(keys)) != len(keys):
        raise BadProgram("no list of the tensors' data")
    return content, keys, stream.tell()


def _value_of(stream: io.BytesIO) -> object:
    try:
        return _Described(stream).load()
    except _BAD as error:
        raise BadProgram(str(error) or type(error).__name__) from None


class _Counted(dict[int, Any]):
    """Operations by their byte, as long as there are not too many."""

    done = 0

    def __getitem__(self, operation: int) -> Any:
        self.done += 1
        if self.done > MOST_OPERATIONS:
            raise BadProgram(f"more than {MOST_OPERATIONS:,} operations")
        if operation not in self:
            raise BadProgram(f"the operation 0x{operation:02x}, which no checkpoint of tensors has")
        return super().__getitem__(operation)


class _Described(_Unpickler):
    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream, encoding="latin1")
        self.dispatch = _Counted({ord(getattr(pickle, name)): _Unpickler.dispatch[ord(getattr(pickle, name))]
                                  for name in _OPERATIONS.split()} | self._own)  # fmt: skip

    def find_class(self, module: str, name: str) -> _Named:
        found = _NAMES.get(f"{module}.{name}".replace("__builtin__.", "builtins."))
        if found is None:
            raise NotTensors(f"{module}.{name}")
        return found

    def persistent_load(self, pid: object) -> Stored:
        # The old format has a sixth entry, None: a view of another's data, which torch has not written since 0.4.
        if isinstance(pid, tuple) and pid[5:] in ((), (None,)) and len(pid) > 4 and pid[0] == "storage":
            _, kind, key, _, count = pid[:5]
            if isinstance(kind, _Named) and kind.dtype and isinstance(key, str) and _are_counts((count,)):
                return Stored(key, kind.dtype, count)
        raise BadProgram("a reference that is none to a tensor's data")

    def _reduce(self) -> None:
        arguments, named = self.stack.pop(), self.stack[-1]
        if not isinstance(named, _Named) or named.call is None or not isinstance(arguments, tuple):
            raise BadProgram("a call of what is no function")
        if len(arguments) > _MOST_ARGUMENTS:
            raise BadProgram(f"a call with {len(arguments):,} arguments")
        self.stack[-1] = named.call(*arguments)

    def _build(self) -> None:
        self.stack.pop()  # versions and hooks, which weights do without

    def _set(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        # A key of nested tuples would be hashed for ever.
        if type(target) is not dict or not all(type(key) in (str, int) for key in pairs[::2]):
            raise BadProgram("a dictionary with keys that are neither text nor whole numbers")
        target.update(zip(pairs[::2], pairs[1::2], strict=True))

    def _set_item(self) -> None:
        pair = self.stack[-2:]
        del self.stack[-2:]
        self._set(pair)

    def _set_items(self) -> None:
        self._set(self.pop_mark())

    def _append(self) -> None:
        self._extend([self.stack.pop()])

    def _appends(self) -> None:
        self._extend(self.pop_mark())

    def _extend(self, entries: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise BadProgram("entries for what is no list")
        self.stack[-1].extend(entries)

    _own: ClassVar = {
        pickle.REDUCE[0]: _reduce,
        pickle.BUILD[0]: _build,
        pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: _set_items,
        pickle.APPEND[0]: _append,
        pickle.APPENDS[0]: _appends,
    }
