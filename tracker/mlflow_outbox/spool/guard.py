"""The disk budget: when new events are refused so that neither the outbox nor the disk overflows.

Looked at in the background, and when a small outbox is opened; a logging call only reads the last verdict, unless that
is an old refusal. What is undelivered is never deleted to make room: at the cap the newest events are refused and
counted, and logging goes on by itself as soon as delivery has made room (``mlflow_outbox_worker.room``).

Free space is one question. The size of the outbox is one for each of its files (``extent``). A walk that is not done at
once is made by another process, while a thread waits for it: neither the round of syncing that asked for it nor the
program's threads do. Walks take a hundredth of the time; a tenth while something depends on them: events are refused,
or so much of the disk's free space is gone that the outbox may be near its cap. Of many processes that write to a large
outbox one walks, the others take what it has found (``measurement``); when it ends, another one walks.

Who delivers may have other settings, so one that refuses events says what it allows (``demand``).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Final

from mlflow_outbox import stopwatch
from mlflow_outbox.counters import Counters
from mlflow_outbox.settings import Settings
from mlflow_outbox.spool import demand, extent, measurement
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox.spool.measurement import Measurement
from mlflow_outbox.spool.notices import FULL

#: Seconds between two measurements of the outbox's size, at least, while it cannot be near its cap.
_MEASURE_EVERY: Final = 10.0
#: Times as long as a measurement took until the next one: while its result is waited for, and else.
_URGENT: Final = 10.0
_USUAL: Final = 100.0
#: Seconds; what takes no longer is done here and now, and at each look while events are refused.
_QUICK: Final = 0.05
#: Seconds after which a refusal is not believed any more: nobody looks in a program that has logged nothing.
_STALE: Final = 10.0
#: Seconds between two notes of what is allowed, while events are refused.
_TELL: Final = 60.0


class DiskGuard:
    """Decides whether an outbox may take new events.

    Args:
        directory: the outbox.
        settings: ``outbox_bytes`` and ``free_bytes``.
        counters: where a size that had to be measured here, could not be, or could not be told to others is counted.
        clock: seconds of a clock that never goes back.
        wall: wall-clock seconds since the epoch.
        chance: returns a number from 0 to 1, below 1.
    """

    def __init__(
        self,
        directory: OutboxDirectory,
        settings: Settings,
        counters: Counters,
        clock: Callable[[], float] = stopwatch.seconds,
        wall: Callable[[], float] = time.time,
        chance: Callable[[], float] = lambda: os.urandom(1)[0] / 256,
    ) -> None:
        self._directory = directory
        self._settings = settings
        self._counters = counters
        self._clock, self._wall, self._chance = clock, wall, chance
        self._reason: str | None = None
        self._looked_at = self._told_at = float("-inf")
        self._thread: threading.Thread | None = None
        self._measured_at = float("-inf")
        self._took = 0.0
        self._used = 0
        self._free_then = 0
        #: Bytes of the files that were copied since, and before that since the measurement before.
        self._copied = self._copied_before = 0
        #: The part of a pause by which another process that measures is waited for: it is to be the only one.
        self._leave = 0.0

    def reason(self, size: int = 0) -> str | None:
        """Return why new events are refused, or None when they are not.

        Args:
            size: bytes of a file that is to be copied for the event. Unless it is refused it counts as part of the
                outbox from now on, before anything is measured. The one that fills the outbox is taken: what is
                delivered gives way in an outbox that is full, and not for what waits outside. Below zero: so many are
                not copied after all, and count no longer.
        """
        if size < 0:
            self._copied = max(0, self._copied + size)
            return None
        if self._reason is not None and self._clock() - self._looked_at >= _STALE:
            self.begin()
        if self._reason is not None or not size:
            return self._reason
        used = self._used + self._copied + self._copied_before
        if used >= self._settings.outbox_bytes:
            return self._over(used)
        self._copied += size  # two threads may count for one here, until the next measurement
        return None

    def begin(self) -> None:
        """Look before an event, where that is done at once: beside a program that logs each file costs a call.

        What takes longer, or may wait for a server of files, is left to the first look in the background.
        """
        if not self._directory.network and not is_large(self._directory):
            self.look(patiently=False)

    def look(self, *, patiently: bool = True) -> None:
        """Measure, and decide anew.

        Args:
            patiently: have another process measure what takes long; else that is not known for now.
        """
        self._looked_at = self._clock()
        try:
            found = os.statvfs(self._directory.path)
        except OSError:
            free = None  # the write itself will say what is wrong
        else:
            free = found.f_bavail * found.f_frsize if found.f_blocks else None
        before, self._reason = self._reason, self._free_space(free) or self._budget(free, patiently=patiently)
        if before is not None and self._reason is None:
            self._counters.forget(FULL)
        if self._reason is not None and self._clock() - self._told_at >= _TELL:
            self._told_at = self._clock()
            demand.tell_budget(self._directory.path, self._settings.outbox_bytes, self._settings.free_bytes)

    def _free_space(self, free: int | None) -> str | None:
        if free is None or free >= self._settings.free_bytes:
            return None
        kept = self._settings.free_bytes
        found = f"{free:,} bytes are free on the disk of {self._directory.path}, the setting free_bytes keeps {kept:,}"
        return f"{found}; make room there, or lower it"

    def _budget(self, free: int | None, *, patiently: bool) -> str | None:
        is_measuring = self._thread is not None and self._thread.is_alive()  # in a forked child it is not
        pause = self._pause(free, self._took)
        if not is_measuring and self._clock() - self._measured_at >= pause * (1 + self._leave):
            told = measurement.read(self._directory.path)
            if told is not None and 0 <= self._wall() - told.at < self._pause(free, told.took):
                self._adopt(told)
            else:
                self._measure(free or 0, patiently=patiently)
        if self._used < self._settings.outbox_bytes:
            return None
        return self._over(self._used)

    def _over(self, used: int) -> str:
        allowed = self._settings.outbox_bytes
        found = f"{self._directory.path} holds {used:,} bytes, the setting outbox_bytes allows {allowed:,}"
        helps = "mlflow-outbox flush; where nothing waits, mlflow-outbox gc --older-than 0"
        return f"{found}; what is delivered makes room ({helps}), or raise it"

    def _measure(self, free: int, *, patiently: bool) -> None:
        directory, begin, at, used = self._directory, self._clock(), self._wall(), 0
        rest = extent.sizes(directory.path)
        if not is_large(directory):
            for size in rest:
                used += size
                if self._clock() - begin >= _QUICK:
                    break
            else:
                self._note(used, free, begin)
                return
        if not patiently:
            return

        def go_on() -> None:
            found = extent.measured_apart(directory.path)
            if found is None:
                self._counters.add("size_measured_here")
                found = used + sum(rest)
            self._note(found, free, begin)
            if not measurement.write(directory.path, Measurement(found, free, self._took, at)):
                self._counters.add("size_not_told")

        self._thread = threading.Thread(target=go_on, name="mlflow-outbox-size", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # no threads left, or the interpreter exits: tried again at the next look
            self._counters.add("size_not_measured")

    def _note(self, used: int, free: int, begin: float) -> None:
        now = self._clock()
        self._used, self._free_then, self._measured_at, self._took = used, free, now, now - begin
        self._copied = self._copied_before = 0
        self._leave = 0.0

    def _adopt(self, told: Measurement) -> None:
        """Take what another process has measured: what was copied here since its begin is not known, so all is."""
        self._used, self._free_then, self._took = told.used, told.free, told.took
        self._measured_at = self._clock() - max(0.0, self._wall() - told.at)
        self._copied, self._copied_before = 0, self._copied
        self._leave = self._chance()

    def _pause(self, free: int | None, took: float) -> float:
        """Return the seconds from one measurement to the next.

        Args:
            free: bytes free on the disk.
            took: seconds of the one before.
        """
        room = self._settings.outbox_bytes - self._used - self._copied - self._copied_before
        if self._reason is not None or room <= 0:
            return _URGENT * took if took > _QUICK else 0.0
        is_near = free is None or self._free_then - free >= room // 2
        return _URGENT * took if is_near else max(_MEASURE_EVERY, _USUAL * took)


def used_bytes(directory: OutboxDirectory) -> int:
    """Return the bytes of all files of an outbox, its reserve aside; a large one is measured by another process."""
    found = extent.measured_apart(directory.path) if is_large(directory) else None
    return sum(extent.sizes(directory.path)) if found is None else found


def is_large(directory: OutboxDirectory) -> bool:
    """Return whether an outbox has so many runs that another process measures it."""
    return extent.is_large(directory.runs) or extent.is_large(directory.delivered)
