"""The sleep of a background thread, which anything may end: a logging call, a finalizer, a signal handler.

``threading.Event`` has a lock that is not re-entrant, and works on while it holds it: a finalizer that sets one in the
middle of that waits for its own thread. Here is one bare lock that is taken by whoever sleeps and given by whoever
wakes, each in a single step of the interpreter.
"""

from __future__ import annotations

import threading


class Alarm:
    """Wakes one thread.

    Attributes:
        is_over: the thread is to end.
    """

    __slots__ = ("_lock", "is_over")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()
        self.is_over = False

    def sleep(self, seconds: float) -> bool:
        """Sleep; return whether that was ended before its time, as it is at once by a ring that nobody heard."""
        return self._lock.acquire(timeout=max(0.0, min(seconds, threading.TIMEOUT_MAX)))

    def ring(self) -> None:
        """End the sleep, or the next one."""
        try:  # noqa: SIM105 - in a single step, where contextlib.suppress is code of Python's
            self._lock.release()
        except RuntimeError:  # it was rung before
            pass

    def end(self) -> None:
        """Have the thread end."""
        self.is_over = True
        self.ring()
