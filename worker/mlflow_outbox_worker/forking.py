"""Keeps a fork from happening in the middle of the import of mlflow.

A module that one thread is importing while another forks stays locked in the child for ever: whoever imports it there
waits for a thread that the child does not have (CPython renews its global import lock at a fork, not those of single
modules). The worker thread imports mlflow with hundreds of modules, pandas and SQLAlchemy among them, for seconds, and
just then a training program is likely to fork its data loaders. So a fork waits until that is over, ``PATIENCE``
seconds at most; it happens once in the life of a process.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Final

#: Seconds that a fork waits for an import; mlflow takes two, on a busy machine some more.
PATIENCE: Final = 10.0

_lock = threading.RLock()
_held: dict[int, bool] = {}


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Hold back forks of other threads while the block imports."""
    with _lock:
        yield


def _before_fork() -> None:
    _held[threading.get_ident()] = _lock.acquire(timeout=PATIENCE)


def _after_fork_in_parent() -> None:
    if _held.pop(threading.get_ident(), False):
        _lock.release()


def _after_fork_in_child() -> None:
    global _lock  # noqa: PLW0603 - the child's own; the parent's may be held by a thread that is not here
    _lock = threading.RLock()
    _held.clear()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
