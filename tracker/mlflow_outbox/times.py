"""Times as programs hold them: datetimes, those of pandas and NumPy, ISO 8601 text; and how long something took."""

from __future__ import annotations

import datetime as dt
import re
from typing import Any, Final

from mlflow_outbox.interrupts import forward

_ISO_FRACTION: Final = re.compile(r"(:\d\d)[.,](\d+)")
_ISO_OFFSET: Final = re.compile(r"(:\d\d(?:\.\d+)?)\s*([+-]\d\d):?(\d\d)?$")


def numpy_kind(value: object) -> str:
    """Return NumPy's letter for the kind of a value: "M" a point in time, "m" a length of it, "c" complex; or ""."""
    try:
        kind = getattr(getattr(value, "dtype", None), "kind", "")
    except Exception as error:  # noqa: BLE001 - a host's property may raise anything; how it fails is said by what needs it
        forward(error)
        return ""
    return kind if isinstance(kind, str) else ""


def is_numpy_time(value: object) -> bool:
    """Return whether a value is a point in time of NumPy's."""
    return numpy_kind(value) == "M"


def seconds(value: Any) -> Any:
    """Return a length of time, of NumPy's too and in whichever unit, as seconds; what is none as it is.

    Raises:
        TypeError: it is one of NumPy's that has no length in seconds, as a month has none.
    """
    if isinstance(value, dt.timedelta):
        return value.total_seconds()
    return float(value / type(value)(1, "s")) if numpy_kind(value) == "m" else value


def wall_clock(value: dt.datetime) -> dt.datetime:
    """Return a plain datetime: a pandas Timestamp without a zone would take itself for UTC."""
    if value.tzinfo is not None:
        return value
    time = dt.time(value.hour, value.minute, value.second, value.microsecond, fold=value.fold)
    return dt.datetime.combine(dt.date(value.year, value.month, value.day), time)


def parsed(text: str) -> dt.datetime:
    """Parse ISO 8601 as Python 3.11 does, on 3.10 as well: a Z, short offsets, fractions of any length.

    Raises:
        ValueError: it is none.
    """
    text = re.sub(r"[zZ]$", "+00:00", text)
    text = _ISO_FRACTION.sub(lambda match: f"{match[1]}.{match[2][:6]:0<6}", text)
    text = _ISO_OFFSET.sub(lambda match: f"{match[1]}{match[2]}:{match[3] or '00'}", text)
    return dt.datetime.fromisoformat(text)
