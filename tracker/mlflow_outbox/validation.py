"""What a logging call accepts, turned into what an event holds; the limits are MLflow's own.

The functions raise one of the ``EventRefused`` errors with a sentence that names the key and the remedy; the caller
decides whether that is raised or warned about and counted.

Limits and the key pattern: mlflow/utils/validation.py (MLflow 3.9 to 3.18). Steps and times outside int64 are refused
here because MLflow's server answers them with 200 and stores something else.
"""

from __future__ import annotations

import datetime as dt
import math
import operator
import posixpath
import re
from collections.abc import Callable
from typing import Any, Final

from mlflow_outbox import times
from mlflow_outbox.counters import described, printable, shown
from mlflow_outbox.errors import InvalidEvent, InvalidEventType, InvalidSettings
from mlflow_outbox.interrupts import forward
from mlflow_outbox.spool.events import INT64_MAX, INT64_MIN, MAX_KEY_CHARS, MAX_NAME_CHARS, MAX_TAG_CHARS, STATUSES

#: Characters of an experiment's name; MLflow's MAX_EXPERIMENT_NAME_LENGTH.
_MAX_EXPERIMENT_NAME: Final = 500
_KEY: Final = re.compile(r"[/\w.\- :]+")
#: A float time in this range is seconds since the epoch of this century, most likely given by time.time().
_LIKELY_SECONDS: Final = (1e9, 1e11)
_EPOCH: Final = dt.datetime(1970, 1, 1, tzinfo=dt.timezone.utc)


def checked_key(key: object, what: str) -> str:
    """Return a metric, param or tag key that MLflow accepts.

    Args:
        key: what the caller gave.
        what: "metric", "param" or "tag", for the message.
    """
    if not isinstance(key, str):
        msg = f"the {what} key {shown(key)} is a {type(key).__name__}; use a string"
        raise InvalidEventType("bad_key", msg)
    name = printable(key)
    if not key:
        msg = f"the {what} key is empty; give it a name"
        raise InvalidEvent("bad_key", msg)
    if len(key) > MAX_KEY_CHARS:
        msg = f"the {what} key {name!r} has {len(key)} characters; MLflow allows {MAX_KEY_CHARS}"
        raise InvalidEvent("bad_key", msg)
    if not _KEY.fullmatch(key):
        msg = f"the {what} key {name!r} may hold only letters, digits, '_', '-', '.', ' ', ':' and '/'"
        raise InvalidEvent("bad_key", msg)
    if posixpath.normpath(key) != key or key == "." or key.startswith(("..", "/")):
        msg = f"the {what} key {name!r} is not a plain relative path; use for instance {_plain(key)!r}"
        raise InvalidEvent("bad_key", msg)
    return str.__str__(key)  # its characters: str() of an enumeration's member, which is a string too, is its name


def _plain(key: str) -> str:
    return "/".join(part for part in key.split("/") if part not in {"", ".", ".."}) or "key"


def checked_value(key: str, value: object) -> float:
    """Return a metric's value as a float: Python, NumPy and framework scalars, NaN and infinities."""
    if isinstance(value, (str, bytes, bytearray)) or value is None:
        msg = f"the metric {printable(key)!r} has the value {shown(value)}, a {type(value).__name__}; use a number"
        raise InvalidEventType("bad_value", msg)
    if type(value) is not float and _is_imaginary_or_time(value):
        msg = f"the metric {printable(key)!r} has the value {shown(value)}, a {type(value).__name__}; use a real number"
        raise InvalidEventType("bad_value", msg)
    try:
        return float(value)  # type: ignore[arg-type]  # what has no float is refused below
    except Exception as error:  # noqa: BLE001 - __float__ of any framework's object may raise anything; refused, counted
        forward(error)
        number = _tried(lambda: float(value.item()))  # type: ignore[attr-defined]  # as of a scalar of NumPy
        if isinstance(number, float):
            return number
        kind = type(value).__name__
        msg = f"the metric {printable(key)!r} has a value of type {kind} that is no single number: {described(error)}"
        raise InvalidEventType("bad_value", msg) from None


def _is_imaginary_or_time(value: object) -> bool:
    """Return whether a value of NumPy's has a float that is not its value: a time counts its units, whichever."""
    return times.numpy_kind(value) in ("c", "m", "M")


def checked_step(key: str, step: object) -> int:
    """Return a step as an int; None is 0, as in MLflow, and a float must be whole."""
    if step is None:
        return 0
    number = _whole(step)
    if not isinstance(number, int):
        msg = f"the metric {printable(key)!r} has the step {shown(step)}{_because(number)}; use a whole number"
        raise InvalidEventType("bad_step", msg)
    if not INT64_MIN <= number <= INT64_MAX:
        msg = f"the metric {printable(key)!r} has the step {shown(number)}, outside MLflow's 64-bit range"
        raise InvalidEvent("bad_step", msg)
    return number


def checked_time_ms(what: str, time: object) -> int:
    """Return a wall-clock time as milliseconds since the epoch: an int or float of milliseconds, or a datetime."""
    number = _milliseconds(time)
    if not isinstance(number, int):
        given = f"{shown(time)}{_because(number)}"
        msg = f"the time of {printable(what)!r} is {given}; use milliseconds since the epoch, or a datetime"
        raise InvalidEventType("bad_time", msg)
    if not 0 <= number <= INT64_MAX:
        msg = f"the time of {printable(what)!r} is {shown(number)} ms, outside what MLflow holds (0 to 2**63 - 1)"
        raise InvalidEvent("bad_time", msg)
    return number


def _milliseconds(time: object) -> int | Exception:
    """Return a time as milliseconds since the epoch, or why it is none."""
    if not isinstance(time, dt.datetime) and not times.is_numpy_time(time):
        return _whole(time, truncate=True)
    try:
        local = times.wall_clock(time if isinstance(time, dt.datetime) else times.parsed(str(time)))
        aware = local if local.tzinfo is not None else local.astimezone()
        return (aware - _EPOCH) // dt.timedelta(milliseconds=1)
    # The year 1 in a local time, pandas' "not a time".
    except (OverflowError, OSError, ValueError, TypeError) as error:
        forward(error)
        return error


def looks_like_seconds(time: object) -> bool:
    """Return whether a time is probably in seconds, where milliseconds are meant."""
    return isinstance(time, float) and _LIKELY_SECONDS[0] <= time < _LIKELY_SECONDS[1]


def _whole(number: object, *, truncate: bool = False) -> int | Exception:
    """Return a whole number, or why it is none."""
    if _is_imaginary_or_time(number):
        return TypeError("no number")
    try:
        return operator.index(number)  # type: ignore[arg-type]  # what has no index is looked at below
    except Exception as error:  # noqa: BLE001 - __index__ of any object may raise anything; it may still have a float
        forward(error)
        if isinstance(number, (str, bytes, bytearray)):
            return error
    as_float = _tried(lambda: float(number))  # type: ignore[arg-type]  # what has no float is returned as an error
    if isinstance(as_float, Exception):
        return as_float
    if not math.isfinite(as_float) or (as_float != int(as_float) and not truncate):
        return ValueError("not whole")
    return int(as_float)


def _tried(convert: Callable[[], float]) -> float | Exception:
    """Return what a conversion gives, or what it raises."""
    try:
        return convert()
    except Exception as error:  # noqa: BLE001 - a host's object may raise anything; the caller refuses, which is counted
        forward(error)
        return error


def _because(error: Exception) -> str:
    """Return what a refusal says of an error; nothing of those that say no more than the value does."""
    return "" if isinstance(error, (TypeError, ValueError, OverflowError)) else f" ({described(error)})"


def checked_text(key: str, value: object, what: str) -> str:
    """Return a param's or tag's value as text, as MLflow does: str(value)."""
    try:
        text = value if type(value) is str else str.__str__(str(value))
        text.encode()
    except UnicodeEncodeError:
        msg = f"the {what} {printable(key)!r} has a value that is not valid Unicode (a lone surrogate); encode it"
        raise InvalidEvent("bad_value", msg) from None
    except Exception as error:  # noqa: BLE001 - __str__ of a user's object may raise anything; refused and counted
        kind = type(value).__name__
        msg = f"the {what} {printable(key)!r} has a value of type {kind} that has no text: {described(error)}"
        raise InvalidEventType("bad_value", msg) from None
    return text


def is_ordinary_tag(key: str, value: str) -> bool:
    """Return whether MLflow keeps a tag as it is that is set by a request of its own.

    At the creation of a run its stores keep nearly any: keys are not judged there, and values not cut.
    """
    try:
        checked_key(key, "tag")
    except (InvalidEvent, InvalidEventType):
        return False
    return len(value) <= MAX_TAG_CHARS and "\0" not in value


def ordinary_name(name: str) -> str:
    """Return a run's name as every database of MLflow's takes it: cut to its column, without a NUL."""
    return name.replace("\0", "")[:MAX_NAME_CHARS]


def checked_status(status: object) -> str:
    """Return a run status that MLflow knows."""
    text = getattr(status, "name", status)
    if not isinstance(text, str) or text.upper() not in STATUSES:
        msg = f"the status {shown(status)} is none of {', '.join(sorted(STATUSES))}"
        raise InvalidEvent("bad_status", msg)
    return text.upper()


def status_after(error: BaseException | None) -> str:
    """Return the status of a run whose block was left, with what was raised in it."""
    if error is None or (isinstance(error, SystemExit) and _is_success(error.code)):
        return "FINISHED"
    return "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"


def _is_success(code: object) -> bool:
    """Return whether a program that is left with a code exits with 0; it may be any object, which is printed then."""
    return code is None or (isinstance(code, int) and code == 0)


def checked_mapping(values: object, what: str) -> dict[Any, Any]:
    """Return a mapping of keys to values as a dict."""
    try:
        return dict(values)  # type: ignore[call-overload, no-any-return]
    except Exception as error:  # noqa: BLE001 - a user's mapping may raise anything; refused and counted
        msg = f"{what} takes a mapping of keys to values, not a {type(values).__name__}{_because(error)}"
        raise InvalidEventType("bad_mapping", msg) from None


def checked_experiment_name(name: object) -> str:
    """Return the name of an experiment as plain text.

    Raises:
        InvalidSettings: it is none that MLflow takes.
    """
    if not isinstance(name, str) or not name.strip():
        msg = f"the experiment name {name!r} must be a text that is not empty"
        raise InvalidSettings(msg)
    try:
        name.encode()
    except UnicodeEncodeError:
        msg = f"the experiment name {name!r} is not valid Unicode"
        raise InvalidSettings(msg) from None
    if len(name) > _MAX_EXPERIMENT_NAME:
        msg = (
            f"the experiment name {shown(name)} has {len(name)} characters, "
            f"MLflow takes at most {_MAX_EXPERIMENT_NAME}; shorten it"
        )
        raise InvalidSettings(msg)
    return str.__str__(name)
