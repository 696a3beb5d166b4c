"""The Python that runs processes of ours, and where it finds modules: where the program does, wherever that is.

A program may have changed its path, or run without a ``site``; a process of ours that did not look in the same places
would not find this package. It looks in none other: ``-m`` puts the current directory before everything else, and a
file there that is named like a module of the standard library, ``queue.py`` or ``types.py``, would be imported in its
place. ``PYTHONSAFEPATH`` keeps Python 3.11 and later from that; for 3.10 a module is started by a line that takes the
entry away before anything is imported.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Final

from mlflow_outbox.settings import environment_for_child
from mlflow_outbox_worker.surroundings import NO_THREADS

_KNOWS_SAFE_PATH: Final = sys.version_info >= (3, 11)
_START: Final = "import sys; del sys.path[0]; import runpy; runpy.run_module({!r}, None, '__main__', True)"


def is_there() -> bool:
    """Return whether there is a Python to start: not where it is embedded, or frozen into a program of one file."""
    return bool(sys.executable) and not getattr(sys, "frozen", False)


def command(module: str) -> list[str]:
    """Return the beginning of a command line that runs a module as a program, for an ``environment`` from here.

    Args:
        module: its name.
    """
    how = ["-m", module] if _KNOWS_SAFE_PATH else ["-c", _START.format(module)]
    return [sys.executable or "", *how]


def entries() -> list[str]:
    """Return where this program finds modules."""
    return [os.fsdecode(entry) for entry in sys.path]


def standard_error() -> int | None:
    """Return what a process of ours is given as that: None for the program's, nothing where the program has none.

    Else the first thing that it opens would be it.
    """
    try:
        os.fstat(2)
    except OSError:
        return subprocess.DEVNULL
    return None


def environment() -> dict[str, str]:
    """Return this program's environment for a process of ours, with the places where modules are found in it."""
    places = os.pathsep.join(_absolute(entries()))
    return environment_for_child(PYTHONPATH=places, PYTHONSAFEPATH="1", **NO_THREADS)


def _absolute(places: list[str]) -> Iterator[str]:
    """Yield places, but for what is relative to a current directory that is gone."""
    for place in places:
        with contextlib.suppress(FileNotFoundError):
            yield os.path.abspath(place)
