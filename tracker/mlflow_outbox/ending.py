"""The end of the interpreter, where threads stop for good and what they hold stays held.

When all handlers of ``atexit`` have run, daemon threads do not get the interpreter any more: one that was in the middle
of a logging call keeps the lock that it had. What logs after that, a ``__del__`` while modules are taken apart, is in
the only thread that is left, and would wait for ever.
"""

from __future__ import annotations

import sys
import threading
from typing import Any


def is_stuck(lock: Any) -> bool:
    """Return whether a thread that the end of the interpreter has stopped for good holds a lock.

    A lock for which that is denied at the end can be taken without a wait: there is nobody who could take it before.

    Args:
        lock: a lock of ``threading``; a re-entrant one that this thread holds is not stuck.
    """
    if not sys.is_finalizing():
        return False
    if lock.acquire(blocking=False):
        lock.release()
        return False
    return True


def usable(lock: Any) -> Any:
    """Return a re-entrant lock, or a new one in its place if it is stuck."""
    return threading.RLock() if is_stuck(lock) else lock
