"""Keeps a fork from happening in the middle of the import of mlflow, or of a use of an SQLite store.

A module that one thread is importing while another forks stays locked in the child for ever: whoever imports it there
waits for a thread that the child does not have (CPython renews its global import lock at a fork, not those of single
modules). Where delivery happens in a thread of the program, not in a child process, that thread imports the loop, and
may import mlflow with hundreds of modules, pandas and SQLAlchemy among them, for seconds; and just then a training
program is likely to fork its data loaders. So a fork waits until that is over, ``PATIENCE`` seconds at most; it happens
once in the life of a process.

SQLite has locks of its own for the whole process, for its memory and its files. One that another thread holds at the
fork is never released in the child, which waits for it in its first use of any database. (Seen with eight threads
that delivered to as many files, and two forks.) So a fork waits for those who use a store too, for a shorter time: a
use may itself be waiting for another process.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Final

#: Seconds that a fork waits for an import; mlflow takes two, on a busy machine some more.
PATIENCE: Final = 10.0

#: The same for a use of a store, which takes milliseconds.
STORE_PATIENCE: Final = 1.0

_lock = threading.RLock()
_held: dict[int, bool] = {}


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Hold back forks of other threads while the block imports."""
    with _lock:
        yield


class _Uses:
    """Who uses a store, and who forks."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._users: dict[int, int] = {}
        #: By their threads. One that never came to ``hold`` must not end another one's.
        self._forks: list[int] = []

    def enter(self) -> None:
        """Begin a use, once no other thread forks."""
        me = threading.get_ident()
        with self._changed:
            self._changed.wait_for(lambda: not self._forks or me in self._users, STORE_PATIENCE)
            self._users[me] = self._users.get(me, 0) + 1

    def leave(self) -> None:
        """End a use."""
        me = threading.get_ident()
        with self._changed:
            left = self._users.pop(me, 1) - 1  # none is known in a child that was forked inside of a use
            if left > 0:
                self._users[me] = left
            self._changed.notify_all()

    def hold(self) -> None:
        """Let nobody begin a use, and wait for those of other threads to end."""
        me = threading.get_ident()
        with self._changed:
            self._forks.append(me)
            self._changed.wait_for(lambda: not self._users.keys() - {me}, STORE_PATIENCE)

    def release(self) -> None:
        """End ``hold``, if this thread has come to it."""
        me = threading.get_ident()
        with self._changed:
            if me in self._forks:
                self._forks.remove(me)
            self._changed.notify_all()


_uses = _Uses()


@contextlib.contextmanager
def using_store() -> Iterator[None]:
    """Hold back forks of other threads while the block uses a store that may be an SQLite file."""
    uses = _uses
    uses.enter()
    try:
        yield
    finally:
        uses.leave()


def _before_fork() -> None:
    try:
        _held[threading.get_ident()] = _lock.acquire(timeout=PATIENCE)
    finally:
        _uses.hold()  # also where a signal handler has ended the wait, which ends no fork


def _after_fork_in_parent() -> None:
    _uses.release()
    if _held.pop(threading.get_ident(), False):
        _lock.release()


def _after_fork_in_child() -> None:
    global _lock, _uses  # the child's own; the parent's may be held by threads that are not here
    _lock, _uses = threading.RLock(), _Uses()
    _held.clear()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
