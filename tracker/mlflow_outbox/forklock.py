"""A lock for which a fork waits, so that no child finds it, or what it stands for, held by a thread that is not there.

What is done under it must be short; a fork waits for so many seconds at most, because a disk, or whoever reads a pipe,
can hang. At the end of the interpreter a thread that was stopped with it holds up nobody (``ending``).
"""

from __future__ import annotations

import os
import threading
from typing import Any

from mlflow_outbox.ending import usable


class ForkLock:
    """A lock that no other thread holds while this process is forked, if it gives it back in time.

    It is re-entrant: a signal handler, or what is called under it, may need it again, or fork.

    Args:
        patience: seconds that a fork waits.
    """

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self._lock = threading.RLock()
        self._forking = threading.local()
        os.register_at_fork(before=self._wait, after_in_parent=self._go_on, after_in_child=self._begin_anew)

    def alone(self) -> Any:
        """Return the lock as it is to be taken now."""
        self._lock = usable(self._lock)
        return self._lock

    def _wait(self) -> None:
        self._forking.waited = self._lock.acquire(timeout=self.patience)

    def _go_on(self) -> None:
        if self._forking.waited:
            self._lock.release()

    def _begin_anew(self) -> None:
        self._lock = threading.RLock()
