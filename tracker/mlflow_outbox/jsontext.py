"""Objects of the host program, read without trusting them: their fields, and their JSON.

Sessions bring their results as pydantic models, dataclasses, attrs classes, named tuples, plain dicts and mixtures of
these, with numpy and pandas values inside. None of those libraries is imported here: what an object offers decides how
it is read.

* ``Reader.attempt`` is the only place where code of such an object runs (properties, serialisers, ``__str__``,
  iteration). What it raises is listed in ``Reader.refused``, and the reading goes on without that value.
* JSON comes from the object's own serialiser when it has one, else from its fields, and is always written anew: strict
  JSON (NaN and the infinities are null), indented by two, keys in their order.
* Depth, cycles and the number of values are bounded; a marker in angle brackets stands where something was left out.
"""

from __future__ import annotations

import collections
import dataclasses
import datetime as dt
import decimal
import enum
import inspect
import json
import math
import operator
import os
import types
from collections.abc import Callable, Iterable, Mapping, Sequence, ValuesView
from collections.abc import Set as AbstractSet
from typing import Any, Final

from mlflow_outbox.counters import described
from mlflow_outbox.interrupts import forward

#: Levels of nesting that are written; a session's state has about eight.
MAX_DEPTH: Final = 64
#: Values after which no more containers are opened: some ten megabytes of text; a bound for lists that share parts.
MAX_VALUES: Final = 1_000_000
#: Times as many values may be in a document that is itself what is to be kept.
_WHOLE: Final = 20
#: Refusals that are listed one by one; further ones are counted in a last entry.
MAX_REFUSED: Final = 50
#: Bits of the largest integer written as a number; Python refuses to print more than about 14,000.
_MAX_INT_BITS: Final = 8192

_SERIALISERS: Final = ("model_dump_json", "json", "to_json")
_UNREADABLE: Final = object()


def json_text(thing: Any) -> str:
    """Return a mapping, a list or any object with fields as strict JSON; null stands for what cannot be read.

    Args:
        thing: what to write.

    Raises:
        ValueError: nothing of it can be written.
    """
    reader = Reader()
    text = reader.json_text(thing, type(thing).__name__)
    if text is None:
        msg = f"a {type(thing).__name__} cannot be written as JSON: {reader.refused[-1][1]}"
        raise ValueError(msg)
    return text


class _Items(dict[str, Any]):
    """One opened level of an object: names and values that are not yet plain."""


class Reader:
    """Reads foreign objects; what cannot be read is listed, never raised.

    Attributes:
        refused: what could not be read or written, and why, in the order of reading.
    """

    def __init__(self) -> None:
        self.refused: list[tuple[str, str]] = []
        self._unlisted = 0
        self._values = 0
        self._most, self._full = MAX_VALUES, False
        self._open_ids: set[int] = set()

    def refuse(self, what: str, reason: str) -> None:
        """List something that is left out."""
        if len(self.refused) < MAX_REFUSED:
            self.refused.append((what, reason))
            return
        self._unlisted += 1
        self.refused[MAX_REFUSED:] = [("...", f"{self._unlisted} more")]

    def attempt(self, what: str, function: Callable[..., Any], *args: Any, default: Any = None) -> Any:
        """Call code that belongs to a foreign object; return default, and list the refusal, when it raises."""
        try:
            return function(*args)
        # That must not cost the host the rest. Who logs the rest counts what is listed here (``Doubts.unreadable``).
        except Exception as error:  # noqa: BLE001 - the host's properties and serialisers can raise anything
            forward(error)
            self.refuse(what, described(error))
            return default

    def field(self, thing: Any, name: str, default: Any = None, *, what: str = "") -> Any:
        """Return the item or attribute called name.

        Args:
            thing: a mapping, or an object with attributes.
            name: name of the field.
            default: answer when there is no such field, or it is None; an unreadable one is None.
            what: how a refusal names the field; "" means by its name.
        """
        value = self.attempt(what or name, _lookup, thing, name, default=_UNREADABLE)
        if value is _UNREADABLE:
            return None
        return default if value is None else value

    def items(self, thing: Any, what: str) -> dict[str, Any]:
        """Return the entries of a mapping, or the fields of an object, by name; empty when there are none.

        Pairs are entries, too; anything else without names is listed as refused.
        """
        if thing is None:
            return {}
        if isinstance(thing, (list, tuple)) and not hasattr(thing, "_fields"):
            thing = self.attempt(what, _paired, thing, default={})
        entries: _Items | None = self.attempt(what, self._entries, thing, what)
        if entries is None:
            names = self.attempt(what, _public_names, thing)
            if not names:
                self.refuse(what, f"a {type(thing).__name__} has no names with values")
            entries = self._fields(thing, names or (), what)
        return {name: value for name, value in entries.items() if value is not _UNREADABLE}

    def text(self, value: Any, what: str) -> str | None:
        """Return a value as MLflow writes it, an enum as its value; None when it cannot be printed."""
        answer = self.attempt(what, _printed, value)
        return None if answer is None else str(answer)

    def json_text(self, thing: Any, what: str, *, whole: bool = False) -> str | None:
        """Return an object as strict JSON, or None when nothing of it can be written.

        Args:
            thing: a mapping, a model, or any object with fields.
            what: how refusals name the document.
            whole: it is what is to be kept, and may have twenty times the values; of what describes something, such as
                a profile that keeps its data set, a large array or table is left out.
        """
        self._values, self._full, self._open_ids = 0, False, set()
        self._most = MAX_VALUES * (_WHOLE if whole else 1)
        is_array = hasattr(type(thing), "dtype") or hasattr(type(thing), "dtypes")  # what pandas writes has ten digits
        document = self._serialised(thing, what, _SERIALISERS[: -1 if is_array else None])
        if document is _UNREADABLE:
            names = self.attempt(what, _public_names, thing)
            document = self._fields(thing, names, what) if names else thing
        text: str | None = self.attempt(what, lambda: _dumps(self._plain(document, what, 0)))
        return text

    def _serialised(self, thing: Any, what: str, names: Iterable[str]) -> Any:
        """Return what the first serialiser that the object has makes of it, parsed, or _UNREADABLE."""
        for name in names:
            method = self.attempt(f"{what}: {name}", inspect.getattr_static, thing, name, None)
            if method is None or isinstance(thing, type):
                continue
            method = self.field(thing, name, what=f"{what}: {name}")
            if callable(method):
                return self.attempt(f"{what}: {name}()", _parsed, method, default=_UNREADABLE)
        return _UNREADABLE

    def _fields(self, thing: Any, names: Iterable[str], what: str) -> _Items:
        values = _Items()
        for name in names:
            values[name] = self.attempt(f"{what}.{name}", _lookup, thing, name, default=_UNREADABLE)
        return values

    def _plain(self, value: Any, what: str, depth: int) -> Any:
        """Return a value made of dict, list, str, int, finite float, bool and None only."""
        kind = type(value)
        self._values += 1
        if value is None or value is _UNREADABLE:
            return None
        if kind is str or kind is bool:
            return value
        if kind is float:
            return value if math.isfinite(value) else None
        if kind is int:
            return value if value.bit_length() <= _MAX_INT_BITS else hex(value)
        if self._values > self._most:
            if not self._full:
                self._full = True
                self.refuse(what, f"the document has more than {self._most} values; the rest was left out")
            return "<left out>"
        if id(value) in self._open_ids:
            self.refuse(what, "the value contains itself")
            return "<contains itself>"
        if depth > MAX_DEPTH:
            self.refuse(what, f"the value is nested deeper than {MAX_DEPTH} levels")
            return "<nested too deep>"
        if self.attempt(what, _elements, value, default=0) > self._most:
            self.refuse(what, f"a {kind.__name__} of more than {self._most} values was left out")
            return "<left out>"
        self._open_ids.add(id(value))
        try:
            opened = self.attempt(what, self._opened, value, what)
            if type(opened) is _Items:
                return {key: self._plain(child, f"{what}.{key}", depth + 1) for key, child in opened.items()}
            if type(opened) is list:
                return [self._plain(child, what, depth + 1) for child in opened]
            return self._plain(opened, what, depth + 1)
        finally:
            self._open_ids.discard(id(value))

    def _opened(self, value: Any, what: str) -> Any:
        """Return a value one step plainer: a list, _Items, a plain scalar, or something to be opened again."""
        if type(value) is _Items:
            return value
        if isinstance(value, enum.Enum):
            return value.value
        if isinstance(value, type):
            return value.__qualname__
        scalar = _scalar(value)
        if scalar is not value:
            return scalar
        if not isinstance(value, Mapping):
            document = self._serialised(value, what, _SERIALISERS[:1])
            if document is not _UNREADABLE:
                return document
        entries = self._entries(value, what)
        if entries is not None:
            return entries
        if isinstance(value, AbstractSet):
            return sorted(value, key=str)
        if isinstance(value, (Sequence, ValuesView, collections.deque)):
            return list(value)
        plainer = _by_offer(value)
        if plainer is not value:
            return plainer
        kind: Any = type(value)
        if kind.__repr__ is object.__repr__ and kind.__str__ is object.__str__:
            names = _public_names(value)
            if names:
                return self._fields(value, names, what)
        return str(value)

    def _entries(self, value: Any, what: str) -> _Items | None:
        """Return the entries of a mapping or the declared fields of an object; None when it has neither."""
        if isinstance(value, Mapping):
            pairs: Iterable[tuple[Any, Any]] = list(value.items())
        elif callable(getattr(value, "items", None)) and hasattr(value, "index") and not isinstance(value, Sequence):
            pairs = list(value.items())  # a pandas Series: what value_counts() and isna().sum() return
        else:
            names = _declared_names(value)
            return None if names is None else self._fields(value, names, what)
        entries = _Items()
        for key, child in pairs:
            name = key if type(key) is str else self.attempt(f"{what}: a key", _key, key)
            if name is None:
                continue
            if name in entries:
                self.refuse(f"{what}.{name}", "two keys have this name in JSON; the first was kept")
            else:
                entries[name] = child
        return entries


def _lookup(thing: Any, name: str) -> Any:
    if thing is None:
        return None
    if isinstance(thing, Mapping) and name in thing:
        return thing[name]
    try:
        return getattr(thing, name)
    except AttributeError:
        if inspect.getattr_static(thing, name, None) is not None:
            raise  # it is there: its property failed
    if not isinstance(thing, Mapping) and hasattr(thing, "keys") and hasattr(thing, "__getitem__"):
        return thing[name] if name in thing.keys() else None  # noqa: SIM118 - rows of databases have keys, and no `in`
    return None


def _declared_names(value: Any) -> Sequence[str] | None:
    """Return the names of the fields that a value's class declares, or None for a class that declares none."""
    kind = type(value)
    if dataclasses.is_dataclass(kind):
        return [field.name for field in dataclasses.fields(kind)]
    if isinstance(value, tuple) and hasattr(kind, "_fields"):
        return list(kind._fields)
    if hasattr(kind, "__attrs_attrs__"):
        return [attribute.name for attribute in kind.__attrs_attrs__]
    if hasattr(kind, "__struct_fields__"):
        return list(kind.__struct_fields__)
    if hasattr(kind, "model_fields") or _is_pydantic_v1(kind):
        return [*vars(value), *(getattr(value, "__pydantic_extra__", None) or ())]
    if isinstance(value, types.SimpleNamespace):
        return list(vars(value))
    return None


def _paired(pairs: Iterable[Any]) -> dict[Any, Any]:
    try:
        return dict(pairs)
    except (TypeError, ValueError):
        msg = "a list without names, where a mapping of names to values is meant"
        raise TypeError(msg) from None


def _is_pydantic_v1(kind: type) -> bool:
    return hasattr(kind, "__fields__") and hasattr(kind, "__validators__")


def _public_names(value: Any) -> Sequence[str]:
    """Return the names of the fields of any object whatever; none for containers and scalars."""
    if isinstance(value, (Mapping, str, bytes, int, float, type)):
        return ()
    declared = _declared_names(value)
    if declared is not None:
        return declared
    names = list(getattr(value, "__dict__", ()))
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        names += [slots] if isinstance(slots, str) else list(slots)
    return [name for name in dict.fromkeys(names) if not name.startswith("_")]


def _scalar(value: Any) -> Any:
    """Return a scalar as a plain one; the value itself when it is no scalar."""
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, int):
        return operator.index(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value).decode("utf-8", "backslashreplace")
    if type(value).__name__ in ("NaTType", "NAType"):  # what pandas has for "no time" and "no value"
        return None
    if isinstance(value, dt.timedelta):
        return value.total_seconds()
    if isinstance(value, decimal.Decimal):
        return str(value) if value.is_finite() else None  # a float would lose digits
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _elements(value: Any) -> int:
    """Return how many values an array, a table or a range holds, each of which would become an object; 0 for others."""
    if isinstance(value, range):
        return len(value)
    if not hasattr(type(value), "dtype") and not hasattr(type(value), "dtypes"):
        return 0
    size = getattr(value, "size", None)
    if isinstance(size, int):
        return size
    shape = getattr(value, "shape", None)  # PyTorch's size is a method, and Polars has none
    return math.prod(shape) if isinstance(shape, tuple) and all(isinstance(n, int) for n in shape) else 0


def _by_offer(value: Any) -> Any:
    """Return what a value of numpy or pandas, or one like them, offers as itself; the value when it offers nothing."""
    if getattr(getattr(value, "dtype", None), "kind", "") in ("M", "m") and hasattr(value, "astype"):
        return _times(value.astype(str).tolist())  # .item() of nanosecond times would be a bare integer
    for name in ("to_dict", "tolist", "to_list", "item", "isoformat"):  # Polars has the third
        method = getattr(value, name, None)
        if callable(method):
            return method()
    return value


def _times(texts: Any) -> Any:
    if isinstance(texts, list):
        return [_times(text) for text in texts]
    return None if texts == "NaT" else texts


def _key(key: Any) -> str:
    if key is None or isinstance(key, bool):
        return json.dumps(key)
    if isinstance(key, enum.Enum):
        return _key(key.value)
    plain = _scalar(key)
    if isinstance(key, (dt.date, dt.time)) and plain is not None:
        return key.isoformat()
    return str(plain)


def _printed(value: Any) -> str:
    text = str(value.value if isinstance(value, enum.Enum) else value)
    return text.encode("utf-8", "backslashreplace").decode()  # half a surrogate pair cannot be stored as UTF-8


def _parsed(method: Callable[[], Any]) -> Any:
    answer = method()
    if isinstance(answer, (str, bytes, bytearray)):
        return json.loads(answer)
    if isinstance(answer, (Mapping, list)):
        return answer
    msg = f"the serialiser returned {type(answer).__name__}, which is no JSON"
    raise TypeError(msg)


def _dumps(document: Any) -> str:
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(document, indent=2, allow_nan=False)
    return text
