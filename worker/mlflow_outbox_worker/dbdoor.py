"""The door to a database file: within one process, it is read in passing or opened for writing, never both at once.

SQLite keeps one view of a file's ``-shm`` for all connections of a process, made by the first of them. A ``Reader``
asks for it read-only, because it must not make or mend anything. While it does so, a connection that opens the file to
write gets the same view: it cannot recover the log that a killed process left, fails with "attempt to write a readonly
database" or, after ten seconds, "locking protocol", and keeps the view alive for the next reader meanwhile, so that
both can go on failing (found by a run of F31 in which a flush and its worker held each other up for two minutes).
Once a writer is in, readers share its view, and nothing waits any more than for one query. One that waits goes before
all readers: it is the writer that makes a file readable which a killed process left.

A read of a file that nobody has open takes no locks, and closing it would take away those of a writer that has come in
the meantime: that goes through the door as well.

A fork waits for the door, so that no thread is inside of SQLite then; the child has doors of its own.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from mlflow_outbox import stopwatch
from mlflow_outbox.errors import LedgerUnavailable
from mlflow_outbox_worker.forking import using_store

#: Seconds that a fork waits for a use of the database to end; a query or commit takes less than a few milliseconds.
FORK_PATIENCE: Final = 1.0

#: Seconds that one who reads leaves to a writer who waits.
_PAUSE: Final = 0.001

_DOORS: dict[Path, threading.Lock] = {}
#: The files that connections of this process write to, once for each connection.
_WRITTEN: list[Path] = []
#: The files that threads wait to open for writing.
_WAITING: list[Path] = []
#: By the thread that forks: the doors that it holds.
_FORKING: dict[int, list[threading.Lock]] = {}


@contextlib.contextmanager
def door(path: Path, timeout: float, *, writing: bool = False) -> Iterator[None]:
    """Be the only one in this process that opens a file, or reads it in passing.

    Args:
        path: the database.
        timeout: seconds to wait.
        writing: go before those who only read, also before those who have waited for longer.

    Raises:
        LedgerUnavailable: other threads have been at it all that time.
    """
    lock = _DOORS.setdefault(path, threading.Lock())
    if writing:
        _WAITING.append(path)
    try:
        _enter(lock, path, timeout, writing=writing)
    finally:
        if writing:
            _WAITING.remove(path)
    try:
        with using_store():  # a fork that began before this door was made does not know of it
            yield
    finally:
        lock.release()


def _enter(lock: threading.Lock, path: Path, timeout: float, *, writing: bool) -> None:
    deadline = stopwatch.seconds() + timeout
    while lock.acquire(timeout=max(0.0, deadline - stopwatch.seconds())):
        if writing or path not in _WAITING:
            return
        lock.release()
        if stopwatch.seconds() > deadline:
            break
        time.sleep(_PAUSE)
    msg = f"the ledger {path} has been in use by another thread for {timeout:g} s"
    raise LedgerUnavailable(msg)


def writer_came(path: Path) -> None:
    """Take note, at the door, that a connection of this process writes to a file."""
    _WRITTEN.append(path)


def writer_left(path: Path) -> None:
    """Take note that one of them is closed."""
    _WRITTEN.remove(path)


def is_written(path: Path) -> bool:
    """Return whether a connection of this process writes to a file; at the door, none comes meanwhile."""
    return path in _WRITTEN


def _before_fork() -> None:
    _FORKING[threading.get_ident()] = [lock for lock in list(_DOORS.values()) if lock.acquire(timeout=FORK_PATIENCE)]


def _after_fork_in_parent() -> None:
    for lock in _FORKING.pop(threading.get_ident(), ()):
        lock.release()


def _after_fork_in_child() -> None:
    _DOORS.clear()
    _WAITING.clear()
    _FORKING.clear()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
