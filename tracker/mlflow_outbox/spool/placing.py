"""The moment in which a call puts a file where it belongs itself, while the outbox has it for delivery too.

Where a run's artifacts are a directory, programs open what they have just logged, so the plugin's call writes the file
there, and the worker only makes sure of it. The worker must not undo what a later call wrote. For that the order is
fixed: event, then place; and between the two the call holds a lock (flock, shared) on the outbox's copy of the file.
A worker that finds the copy unlocked and another content in the place knows that a later event says so, which the
journal has by then, or that the call was cut off, which it makes good.

The kernel gives the lock back when the program dies. On a network file system no logging call locks a file; there an
older content can be in the place for the moment until the later event is delivered.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

#: Seconds between two looks at a lock.
_LOOK: Final = 0.01


@contextlib.contextmanager
def placing(copy: Path) -> Iterator[None]:
    """Have the worker wait with a file until the call has put it in its place; where there are no locks, it does not.

    Args:
        copy: the outbox's copy.
    """
    fd = _opened(copy)
    try:
        if fd >= 0:
            with contextlib.suppress(OSError):  # held for a moment by a worker that looks, or not to be had at all
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield
    finally:
        if fd >= 0:
            with contextlib.suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_UN)  # a child forked meanwhile has the descriptor too
            os.close(fd)


def is_placed(copy: Path, *, patience: float, sleep: Callable[[float], None] = time.sleep) -> bool:
    """Wait until no call is putting a file in its place; return False when one still is.

    Args:
        copy: the outbox's copy.
        patience: seconds to wait.
        sleep: waits for so many seconds.
    """
    fd = _opened(copy)
    if fd < 0:
        return True
    try:
        for _ in range(max(1, round(patience / _LOOK))):
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                sleep(_LOOK)
            except OSError:
                return True  # no locks here, so no call holds one
            else:
                return True
        return False
    finally:
        os.close(fd)  # and with it the lock


def _opened(copy: Path) -> int:
    try:
        return os.open(copy, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return -1
