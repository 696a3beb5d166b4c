"""Numbers, sizes, spans and times as people read them, and paths as they type them."""

from __future__ import annotations

import shlex
import time
from pathlib import Path

from mlflow_outbox.counters import printable


def count(number: int, noun: str = "") -> str:
    """Return a number with separators, and a noun in the right number behind it."""
    text = f"{number:,}"
    return f"{text} {noun if number == 1 else noun + 's'}" if noun else text


def unreadable(segments: int) -> str:
    """Return what it means that segments cannot be read, and who says which."""
    whose = "its" if segments == 1 else "their"
    cannot = f"{count(segments, 'segment')} cannot be read, so that {whose} events are not delivered"
    return f"{cannot}; see: mlflow-outbox doctor"


def size(number: float) -> str:
    """Return a number of bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:  # noqa: PLR2004 - the step of the units
            return f"{number:.0f} {unit}" if unit == "B" or number >= 100 else f"{number:.1f} {unit}"  # noqa: PLR2004 - three digits tell enough
        number /= 1000
    return f"{number:.1f} TB"


def span(seconds: float) -> str:
    """Return a time span for people."""
    seconds = max(0.0, seconds)
    for limit, unit, per in ((120, "s", 1), (7200, "min", 60), (172_800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / per:.0f} {unit}"
    return f"{seconds / 86_400:.0f} d"


def quoted(path: Path | str) -> str:
    """Return a path as a shell takes it, in a command that a person may copy."""
    return printable(shlex.quote(str(path)), 1000)


def moment(time_ms: int) -> str:
    """Return a wall-clock time of this machine's zone; "-" for none."""
    if not time_ms:
        return "-"
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time_ms / 1000))
    except (ValueError, OverflowError, OSError):  # a time that a program made up
        return f"{time_ms} ms"
