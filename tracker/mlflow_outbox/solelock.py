"""A lock for which its own thread does not wait: a signal handler's call, in the middle of it, is refused.

A re-entrant lock would let the handler in, to what is half done. The thread counts as being inside from before it waits
for the lock, so that a handler may come at any moment. A forked child makes another one.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator


class SoleLock:
    """Lets one thread in at a time, and none twice."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._here = threading.local()

    @contextlib.contextmanager
    def held(self, refusal: Callable[[], Exception]) -> Iterator[None]:
        """Hold the lock while the block runs.

        Args:
            refusal: makes what is raised where this thread is inside already.

        Raises:
            Exception: what ``refusal`` makes.
        """
        here = self._here
        if getattr(here, "is_inside", False):
            raise refusal()
        try:
            here.is_inside = True
            with self._lock:
                yield
        finally:
            here.is_inside = False
