"""The descriptors of the segments that this process writes: a forked child closes all of them.

A child that kept one would share its lock, which tells readers that the writer lives (``disk``): the run of a parent
that was killed would wait for a child that does not know of it. Whatever the parent's other threads were doing with a
segment at the moment of the fork, its descriptor is either in this list or not there yet: segments are opened and
closed under a lock, for which a fork waits. It waits for a second at most, because a disk can hang.

This is the only thing that a fork waits for here; events are appended without the lock.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from mlflow_outbox.forklock import ForkLock

#: Held while a segment is opened or closed.
_lock: Final = ForkLock(patience=1.0)
_held: set[int] = set()


def opened(create: Callable[[Path], int], path: Path) -> int:
    """Open a segment's file and note its descriptor.

    Args:
        create: makes the file and returns its descriptor.
        path: where.

    Raises:
        OSError: the disk did not take it.
    """
    with _lock.alone():
        fd = create(path)
        _held.add(fd)
    return fd


def close(how: Callable[[int], None], fd: int) -> None:
    """Give a descriptor back.

    Args:
        how: closes it.
        fd: from ``opened``.

    Raises:
        OSError: the disk failed; it is closed all the same.
    """
    with _lock.alone():
        _held.discard(fd)
        how(fd)


def _after_fork_in_child() -> None:
    for fd in _held:
        with contextlib.suppress(OSError):
            os.close(fd)
    _held.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
