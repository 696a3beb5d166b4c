"""The door to a database file: within one process, it is read in passing or opened for writing, never both at once.

SQLite keeps one view of a file's ``-shm`` for all connections of a process, made by the first of them. A ``Reader``
asks for it read-only, because it must not make or mend anything. While it does so, a connection that opens the file to
write gets the same view: it cannot recover the log that a killed process left, fails with "attempt to write a readonly
database" or, after ten seconds, "locking protocol", and keeps the view alive for the next reader meanwhile, so that
both can go on failing (found by a run of F31 in which a flush and its worker held each other up for two minutes).
Once a writer is in, readers share its view, and nothing waits any more than for one query.

A read of a file that nobody has open takes no locks, and closing it would take away those of a writer that has come in
the meantime: that goes through the door as well.

A fork waits for the door, so that no thread is inside of SQLite then; the child has doors of its own.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from mlflow_outbox.errors import LedgerUnavailable
from mlflow_outbox_worker.forking import using_store

#: Seconds that a fork waits for a use of the database to end; a query or commit takes less than a few milliseconds.
FORK_PATIENCE: Final = 1.0

_DOORS: dict[Path, threading.Lock] = {}
#: By the thread that forks: the doors that it holds.
_FORKING: dict[int, list[threading.Lock]] = {}


@contextlib.contextmanager
def door(path: Path, timeout: float) -> Iterator[None]:
    """Be the only one in this process that opens a file, or reads it in passing.

    Args:
        path: the database.
        timeout: seconds to wait.

    Raises:
        LedgerUnavailable: another thread has been at it all that time.
    """
    lock = _DOORS.setdefault(path, threading.Lock())
    if not lock.acquire(timeout=timeout):
        msg = f"the ledger {path} has been read by another thread for {timeout:g} s"
        raise LedgerUnavailable(msg)
    try:
        with using_store():  # a fork that began before this door was made does not know of it
            yield
    finally:
        lock.release()


def _before_fork() -> None:
    _FORKING[threading.get_ident()] = [lock for lock in list(_DOORS.values()) if lock.acquire(timeout=FORK_PATIENCE)]


def _after_fork_in_parent() -> None:
    for lock in _FORKING.pop(threading.get_ident(), ()):
        lock.release()


def _after_fork_in_child() -> None:
    _DOORS.clear()
    _FORKING.clear()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
