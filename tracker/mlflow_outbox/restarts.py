"""When a worker, or a worker's child, that has ended is begun anew: at once, but for one of several that ended soon.

What ends each of them, such as a lack of memory, a broken library or a directory that others may enter, ends the next
one too; and to begin takes a processor for seconds, which the program would be without for as long as it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

from mlflow_outbox import stopwatch
from mlflow_outbox.counters import Counters

#: Seconds that a worker lives at least unless something ends each of them.
_BRIEF: Final = 30.0
#: Workers in a row that ended so soon after which the next ones wait, and the first and the longest pause in seconds.
_SEVERAL: Final = 3
_PAUSE: Final = 2.0
_PAUSE_MOST: Final = 30.0


class Restarts:
    """Knows of the workers of one outbox in this process, or of one's children, of which there is one at a time.

    Used under a lock, or by one thread.

    Args:
        path: the outbox.
        counters: by which it is said that they end again and again.
        clock: seconds of a clock that never goes back.
    """

    def __init__(self, path: Path, counters: Counters, clock: Callable[[], float] = stopwatch.seconds) -> None:
        self._path = path
        self._counters = counters
        self._clock = clock
        self._begun: float | None = None
        self._due = 0.0
        self._brief = 0  # in a row

    @property
    def are_vain(self) -> bool:
        """Whether several in a row ended soon after their start."""
        return self._brief >= _SEVERAL

    def begun(self) -> None:
        """Take note that one is there."""
        self._begun = self._clock()

    def ended(self, how: str) -> None:
        """Take note that it has ended, by itself; to be told of it once more changes nothing.

        Args:
            how: in words.
        """
        begun, self._begun = self._begun, None
        if begun is None:
            return
        now = self._clock()
        self._brief = self._brief + 1 if now - begun < _BRIEF else 0
        self._due = now
        if not self.are_vain:
            self._counters.forget("restarts")
            return
        self._due += min(_PAUSE_MOST, _PAUSE * 2.0 ** min(self._brief - _SEVERAL, 10))
        self._counters.warn_once(
            "restarts",
            f"mlflow-outbox: what delivers {self._path} ends again and again soon after its start ({how}); events stay "
            "on disk, and it is started more rarely",
        )

    def is_due(self) -> bool:
        """Return whether the next one may be begun."""
        return self._clock() >= self._due
