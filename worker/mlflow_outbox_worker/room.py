"""Room on a disk that has none: what is delivered gives way, what is not never does.

Delivered runs are kept for the retention time as a courtesy. When the disk has less than ``free_bytes`` left, or the
outbox holds more than ``outbox_bytes``, the experiment's new events are refused, and then they are worth more: the
delivered runs go, the one first that was verified first, and after them the filed segments and copies of runs that go
on. All of them are behind a checkpoint of the ledger (``retention``), so whatever the ledger forgets, it never asks for
them. So do they for a file that a program could not log because the disk had less room than it needs (``demand``), if
all that may go is enough for it: the next one finds room. A program that refuses events may allow less than this worker
does, and then what it allows counts (``demand`` too).
A run with dead letters stays, because a person may still send those.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from mlflow_outbox import stopwatch
from mlflow_outbox.counters import Counters
from mlflow_outbox.errors import LedgerUnavailable
from mlflow_outbox.settings import Settings
from mlflow_outbox.spool import demand, reserve
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox.spool.guard import is_large, used_bytes
from mlflow_outbox_worker.ledger import Ledger, LedgerCorrupt
from mlflow_outbox_worker.removal import leftovers, remove_run
from mlflow_outbox_worker.retention import filed_parts, gave_way, reclaimable

#: Seconds between two measurements of the outbox, at least, and how many times as long as one takes.
_MEASURE: Final = 5.0
_RARELY: Final = 100.0
#: Seconds between two looks at what may go while nothing may.
_AGAIN: Final = 30.0


class Room:
    """Makes room in one outbox; used by the delivery loop and by its lanes.

    Args:
        directory: the outbox; None when nothing of it may be deleted.
        settings: ``free_bytes`` and ``outbox_bytes``.
        counters: counts what was deleted before its time as "reclaimed_early".
    """

    def __init__(self, directory: OutboxDirectory | None, settings: Settings, counters: Counters) -> None:
        self._directory = directory
        self._settings = settings
        self._counters = counters
        self._lock = threading.Lock()
        self._measure_at = float("-inf")
        #: A measurement was asked for when it was too early for one.
        self._is_owed = False
        #: The delivered runs when all that could go was gone, and until when that is believed.
        self._futile: tuple[list[str], float] = ([], 0.0)

    def __repr__(self) -> str:
        return f"<Room in {str(self._directory.path) if self._directory else 'nothing'!r}>"

    def opened(self, path: Path, report: Callable[[str], object]) -> Ledger:
        """Open the ledger; where the disk has no room for that, make some by what it says when it is only read.

        Args:
            path: the ledger's directory.
            report: told about each database that is set aside.

        Raises:
            OutboxUnusable: the directory or a file in it is not safe to use.
            LedgerUnavailable: the database is locked, or the disk fails.
        """
        try:
            return Ledger.open(path, report=report)
        except LedgerUnavailable as error:
            if isinstance(error, LedgerCorrupt) or reserve.free(path) >= reserve.LOW:
                raise
        with contextlib.closing(Ledger.open(path, read_only=True)) as seen:
            self.look(seen)
        return Ledger.open(path, report=report)

    def begin(self, ledger: Ledger) -> None:
        """Look before anything is delivered where that is done at once, and else soon.

        Where new events are refused, and all that is there was delivered, nothing else would ask for that.

        Args:
            ledger: says what is delivered.

        Raises:
            LedgerUnavailable: the ledger cannot be read now.
        """
        self._is_owed = True
        if self._directory is not None and not is_large(self._directory):
            self.look(ledger)

    def look(self, ledger: Ledger, *, measure: bool = False) -> None:
        """Delete what is delivered as far as there is need of room.

        Args:
            ledger: says what is delivered.
            measure: look at the size of the outbox too, which walks its directories; if that was done seconds ago, a
                later look does it, whatever it is told. Else only look at the free space.

        Raises:
            LedgerUnavailable: the ledger cannot be read now.
        """
        directory = self._directory
        if directory is None or not self._lock.acquire(blocking=False):
            return  # another lane is at it
        number = 0
        try:
            excess = self._excess(directory, measure=measure) or self._excess_for_a_file(directory, ledger)
            if excess <= 0 or self._is_futile(directory):
                return
            stays: OSError | None = None
            for path in _delivered(directory, ledger):
                if excess <= 0:
                    break
                try:
                    excess -= _remove(path)
                except OSError as error:  # the next one may go
                    stays = stays or error
                else:
                    number += 1
            if stays is not None:
                self._stays(stays)
            elif excess > 0:
                self._futile = directory.delivered_ids(), stopwatch.seconds() + _AGAIN
        except OSError as error:  # delivery goes on, whatever cannot be deleted
            self._stays(error)
        finally:
            self._lock.release()
        if number:
            gave_way(directory, number, self._counters)

    def _stays(self, error: OSError) -> None:
        self._counters.add("reclaim_errors")
        self._counters.warn_once("reclaim_errors", f"mlflow-outbox: what was delivered cannot be deleted: {error}")

    def filed(self) -> None:
        """Take notice that there is more that may go."""
        self._futile = [], 0.0

    def _is_futile(self, directory: OutboxDirectory) -> bool:
        """Return whether nothing could be deleted the last time and nothing has been delivered since."""
        seen, until = self._futile
        return stopwatch.seconds() < until and seen == directory.delivered_ids()

    def _excess(self, directory: OutboxDirectory, *, measure: bool) -> int:
        """Return how many bytes are to go: a tenth more than is needed, so that the next event does not need them."""
        most, least = self._budget(directory)
        lacking = least - reserve.free(directory.path)
        if lacking > 0:
            return lacking + least // 10
        begin = stopwatch.seconds()
        self._is_owed = self._is_owed or measure
        if not self._is_owed or begin < self._measure_at or not directory.delivered_ids():
            return 0
        self._is_owed = False
        used = used_bytes(directory)
        end = stopwatch.seconds()
        self._measure_at = end + max(_MEASURE, _RARELY * (end - begin))
        return used - most + most // 10 if used >= most else 0

    def _excess_for_a_file(self, directory: OutboxDirectory, ledger: Ledger) -> int:
        """Return how many bytes are to go for a file that found no room; none where that would be in vain."""
        size = demand.told(directory.path)
        if not size:
            return 0
        lacking = size + self._budget(directory)[1] - reserve.free(directory.path)
        if 0 < lacking <= bytes_that_may_go(directory, ledger):
            return lacking
        demand.forget(directory.path)
        return 0

    def _budget(self, directory: OutboxDirectory) -> tuple[int, int]:
        """Return the bytes that the outbox may take, and those to be left free."""
        most, least = demand.told_budget(directory.path)
        return min(self._settings.outbox_bytes, most), max(self._settings.free_bytes, least, reserve.LOW)


def bytes_that_may_go(directory: OutboxDirectory, ledger: Ledger) -> int:
    """Return how many bytes of an outbox are delivered and give way.

    Args:
        directory: the outbox.
        ledger: of its worker.

    Raises:
        LedgerUnavailable: the ledger cannot be read now.
        OSError: what is there cannot be listed.
    """
    return sum(map(_size, _delivered(directory, ledger)))


def _delivered(directory: OutboxDirectory, ledger: Ledger) -> Iterator[Path]:
    """Yield what may go, in the order in which it goes: what is left of some, whole runs, then segments and copies."""
    yield from leftovers(directory)
    done = sorted((verified_ms, run_id) for run_id, verified_ms in reclaimable(directory, ledger))
    for _, run_id in done:
        yield directory.delivered / run_id
    parts = filed_parts(directory, ledger)
    yield from (path for _, path in sorted((found.st_mtime_ns, path) for path, found in parts))


def _remove(path: Path) -> int:
    """Delete a run's directory, a segment or a copy, and return how many bytes that freed."""
    size = _size(path)
    if path.is_dir():
        remove_run(path)
    else:
        os.unlink(path)
    return size


def _size(path: Path) -> int:
    files = [path]
    if path.is_dir():
        files = [Path(folder, name) for folder, _, names in os.walk(path) for name in names]
    return sum(os.stat(file, follow_symlinks=False).st_size for file in files)
