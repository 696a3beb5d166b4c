"""The disk budget: when new events are refused so that neither the outbox nor the disk overflows.

Looked at in the background, never by a logging call; a call only reads the last verdict. What is undelivered is never
deleted to make room: at the cap the newest events are refused and counted, and logging goes on by itself as soon as
delivery has made room (``mlflow_outbox_worker.room``).

Free space is one question. The size of the outbox is one for each of its files (``extent``). A walk that is not done at
once is made by another process, while a thread waits for it: neither the round of syncing that asked for it nor the
program's threads do. Walks take a hundredth of the time; a tenth while something depends on them: events are refused,
or so much of the disk's free space is gone that the outbox may be near its cap.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Final

from mlflow_outbox import stopwatch
from mlflow_outbox.counters import Counters
from mlflow_outbox.settings import Settings
from mlflow_outbox.spool import extent
from mlflow_outbox.spool.directory import OutboxDirectory

#: Seconds between two measurements of the outbox's size, at least, while it cannot be near its cap.
_MEASURE_EVERY: Final = 10.0
#: Times as long as a measurement took until the next one: while its result is waited for, and else.
_URGENT: Final = 10.0
_USUAL: Final = 100.0
#: Seconds; what takes no longer is done here and now, and at each look while events are refused.
_QUICK: Final = 0.05


class DiskGuard:
    """Decides whether an outbox may take new events.

    Args:
        directory: the outbox.
        settings: ``outbox_bytes`` and ``free_bytes``.
        counters: where a size that had to be measured here, or could not be, is counted.
        clock: seconds of a clock that never goes back.
    """

    def __init__(
        self,
        directory: OutboxDirectory,
        settings: Settings,
        counters: Counters,
        clock: Callable[[], float] = stopwatch.seconds,
    ) -> None:
        self._directory = directory
        self._settings = settings
        self._counters = counters
        self._clock = clock
        self._reason: str | None = None
        self._thread: threading.Thread | None = None
        self._measured_at = float("-inf")
        self._took = 0.0
        self._used = 0
        self._free_then = 0
        #: Bytes of the files that were copied since.
        self._copied = 0

    def reason(self, size: int = 0) -> str | None:
        """Return why new events are refused, or None when they are not.

        Args:
            size: bytes of a file that is to be copied for the event. Unless it is refused it counts as part of the
                outbox from now on, before anything is measured. The one that fills the outbox is taken: what is
                delivered gives way in an outbox that is full, and not for what waits outside.
        """
        if self._reason is not None or not size:
            return self._reason
        used = self._used + self._copied
        if used >= self._settings.outbox_bytes:
            return self._over(used)
        self._copied += size  # two threads may count for one here, until the next measurement
        return None

    def look(self) -> None:
        """Measure, and decide anew."""
        try:
            found = os.statvfs(self._directory.path)
        except OSError:
            free = None  # the write itself will say what is wrong
        else:
            free = found.f_bavail * found.f_frsize if found.f_blocks else None
        self._reason = self._free_space(free) or self._budget(free)

    def _free_space(self, free: int | None) -> str | None:
        if free is None or free >= self._settings.free_bytes:
            return None
        kept = self._settings.free_bytes
        return f"{free:,} bytes are free on the disk of {self._directory.path}, the setting free_bytes keeps {kept:,}"

    def _budget(self, free: int | None) -> str | None:
        is_measuring = self._thread is not None and self._thread.is_alive()  # in a forked child it is not
        if not is_measuring and self._clock() - self._measured_at >= self._pause(free):
            self._measure(free or 0)
        if self._used < self._settings.outbox_bytes:
            return None
        return self._over(self._used)

    def _over(self, used: int) -> str:
        allowed = self._settings.outbox_bytes
        return f"{self._directory.path} holds {used:,} bytes, the setting outbox_bytes allows {allowed:,}"

    def _measure(self, free: int) -> None:
        directory, begin, used = self._directory, self._clock(), 0
        rest = extent.sizes(directory.path)
        if not _is_large(directory):
            for size in rest:
                used += size
                if self._clock() - begin >= _QUICK:
                    break
            else:
                self._note(used, free, begin)
                return

        def go_on() -> None:
            found = extent.measured_apart(directory.path)
            if found is None:
                self._counters.add("size_measured_here")
                found = used + sum(rest)
            self._note(found, free, begin)

        self._thread = threading.Thread(target=go_on, name="mlflow-outbox-size", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # no threads left, or the interpreter exits: tried again at the next look
            self._counters.add("size_not_measured")

    def _note(self, used: int, free: int, begin: float) -> None:
        now = self._clock()
        self._used, self._copied, self._free_then, self._measured_at, self._took = used, 0, free, now, now - begin

    def _pause(self, free: int | None) -> float:
        """Return the seconds from one measurement to the next."""
        room = self._settings.outbox_bytes - self._used - self._copied
        if self._reason is not None or room <= 0:
            return _URGENT * self._took if self._took > _QUICK else 0.0
        is_near = free is None or self._free_then - free >= room // 2
        return _URGENT * self._took if is_near else max(_MEASURE_EVERY, _USUAL * self._took)


def used_bytes(directory: OutboxDirectory) -> int:
    """Return the bytes of all files of an outbox, its reserve aside; a large one is measured by another process."""
    found = extent.measured_apart(directory.path) if _is_large(directory) else None
    return sum(extent.sizes(directory.path)) if found is None else found


def _is_large(directory: OutboxDirectory) -> bool:
    return extent.is_large(directory.runs) or extent.is_large(directory.delivered)
