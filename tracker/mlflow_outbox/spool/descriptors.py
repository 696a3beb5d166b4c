"""The descriptors of the segments that this process writes: a forked child closes all of them.

A child that kept one would share its lock, which tells readers that the writer lives (``disk``): the run of a parent
that was killed would wait for a child that does not know of it. Whatever the parent's other threads were doing with a
segment at the moment of the fork, its descriptor is either in this list or not there yet: segments are opened and
closed under a lock, for which a fork waits. It waits for a second at most, because a disk can hang.

This is the only thing that a fork waits for here; events are appended without the lock.

A program that ends runs faster than its disk can sync them would run out of descriptors. So where there are many, a
complete segment gives its own back, and is opened once more to be synced. (Linux tells of a write that failed in
between to whoever opens the file next, unless it has dropped what it knew of the file by then.)
"""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Final

from mlflow_outbox.forklock import ForkLock

#: Held while a segment is opened or closed.
_lock: Final = ForkLock(patience=1.0)
_held: dict[int, Path] = {}
#: Segments that may be open before complete ones give their descriptors back, and the part of all descriptors.
_MANY: Final = 128
_PART: Final = 8


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
        _held[fd] = path
    return fd


def holds(fd: int, path: Path) -> bool:
    """Return whether a descriptor is still that of a file.

    Args:
        fd: from ``opened``.
        path: given there.
    """
    return _held.get(fd) == path


def are_many() -> bool:
    """Return whether so many segments are open that those which are complete should not be."""
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return len(_held) > (_MANY if allowed == resource.RLIM_INFINITY else min(_MANY, allowed // _PART))


def close(how: Callable[[int], None], fd: int, path: Path) -> None:
    """Give a descriptor back, unless that was done before: by now it may be another file's.

    So who is interrupted by a signal handler's exception somewhere around this can call it again.

    Args:
        how: closes it.
        fd: from ``opened``.
        path: given there.

    Raises:
        OSError: the disk failed; it is closed all the same.
    """
    with _lock.alone():
        if _held.get(fd) == path:
            del _held[fd]  # no call between this and closing: nothing can interrupt here
            how(fd)


def _after_fork_in_child() -> None:
    for fd in _held:
        with contextlib.suppress(OSError):
            os.close(fd)
    _held.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
