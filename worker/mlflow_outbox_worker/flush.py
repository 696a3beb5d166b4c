"""Flush: have an outbox delivered now, by whichever worker holds it, and say what is left.

A flush does not deliver itself. It asks the worker to hurry, which cuts back-offs short, and watches the ledger until
the cursors have passed where the journals ended when it was called. What waits for a person is tried again first: that
it was refused before, perhaps to an earlier program, says nothing of now. So it works the same from the experiment,
from another process, and while the experiment goes on logging; and a server that hangs cannot hold it up beyond its
time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from mlflow_outbox import stopwatch
from mlflow_outbox.counters import Counters, described
from mlflow_outbox.errors import LedgerUnavailable, OutboxUnusable
from mlflow_outbox.outbox import FlushResult
from mlflow_outbox.spool.disk import is_foreign
from mlflow_outbox_worker.backlog import Targets, counted, left, targets, total
from mlflow_outbox_worker.host_lease import delivers_elsewhere, worker_of
from mlflow_outbox_worker.ledger import Ledger
from mlflow_outbox_worker.notes import destination_note, last_tried_ms
from mlflow_outbox_worker.records import RunRecord
from mlflow_outbox_worker.retired import Totals

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from mlflow_outbox.outbox import Outbox
    from mlflow_outbox.settings import Settings
    from mlflow_outbox.spool.directory import OutboxDirectory

#: Seconds between two looks at the ledger: at first, and at most.
_LOOK: Final = 0.02
_LOOK_MOST: Final = 0.1
#: Seconds between two calls to hurry: a server that has just come back is tried at once.
_HURRY: Final = 1.0
#: Seconds without any worker after which waiting is pointless, and with one that was started and has not begun to
#: deliver: on a busy machine, or where Python lies on a file system of the network, its imports take a while.
_NO_WORKER: Final = 5.0
_BEGINS: Final = 60.0
#: Seconds after which what waited for a person before still does, although no worker has been answered since.
_STILL_PARKED: Final = 30.0
#: Seconds for which a flush without a time waits for what the disk does not let be read, when all else is delivered.
_BLIND: Final = 5.0
#: Seconds for which it waits while another machine delivers and nothing is filed: what that has delivered of a run that
#: goes on stands in its own ledger. Longer than it takes to succeed one that died.
_UNSEEN: Final = 180.0


def flush(outbox: Outbox, timeout: float | None, *, settled: bool) -> FlushResult:
    """Have an outbox of this process delivered; see ``Outbox.flush``."""
    watch = Watch(outbox.directory, outbox.settings, outbox.counters, is_coming=outbox.has_worker)
    return watch.until_delivered(timeout if outbox.worker_kind != "none" else 0, settled=settled)


class Watch:
    """Watches the delivery of an outbox from outside of its worker.

    Args:
        directory: the outbox.
        settings: where its ledger is.
        counters: counts looks that the disk did not allow as "backlog_unread".
        is_coming: tells whether a worker was started that may not have begun yet.
    """

    def __init__(
        self,
        directory: OutboxDirectory,
        settings: Settings,
        counters: Counters | None = None,
        *,
        is_coming: Callable[[], bool] = lambda: False,
    ) -> None:
        self._directory = directory
        self._is_coming = is_coming
        self._counters = counters or Counters()
        self._path: Path = directory.ledger_in(settings.ledger_dir)
        self._last = FlushResult()
        self._settling = False  # a run may have a twin, for which the worker looks soon
        self._tried_ms = 0  # when what is parked was tried, the run that was tried longest ago
        self._unread: dict[str, OSError] = {}  # runs that the disk does not let be read; each counts as one event
        self._is_blind = False  # nothing is known to be pending but what cannot be read

    def until_delivered(self, timeout: float | None, *, hurry: bool = True, settled: bool = False) -> FlushResult:
        """Wait until everything that is on disk now has been delivered, or time is up.

        Args:
            timeout: seconds; None waits without limit, as long as there is a worker, and runs can be read, and it is
                not another machine's, of which nothing is seen.
            hurry: cut the worker's back-offs short.
            settled: wait for runs to settle too (``twins``): the worker is to end afterwards.
        """
        began_ms = time.time_ns() // 1_000_000
        started = stopwatch.seconds()
        deadline = None if timeout is None else started + timeout
        ends: Targets | None = None
        look, next_hurry, seen_worker, seen, changed = _LOOK, started, started, started, started
        before: FlushResult | None = None
        while True:
            now, begun = stopwatch.seconds(), stopwatch.processor_seconds()
            result, ends = self.measure(ends)
            sure = self._tried_ms >= began_ms or now - started > _STILL_PARKED
            if result and not (settled and self._settling):
                # The ledger was read before the disk: what was filed in between is not counted in it.
                return self.measure(ends)[0] or result
            if result.pending == 0 and result.parked and sure:
                return result
            if deadline is not None and now >= deadline:
                return result
            if not self._is_blind:
                seen = now
            elif deadline is None and now - seen > _BLIND:
                return result  # what the disk does not give nobody can deliver
            if result != before or deadline is not None or not delivers_elsewhere(self._directory):
                before, changed = result, now
            elif now - changed > _UNSEEN:
                return result
            if worker_of(self._directory) is not None:
                seen_worker = now
            elif now - seen_worker > (_BEGINS if self._is_coming() else _NO_WORKER):
                return result  # nobody delivers, and nobody has come to do so
            if hurry and now >= next_hurry:
                with contextlib.suppress(OSError):
                    self._directory.ask_hurry()
                next_hurry = now + _HURRY
            spent = stopwatch.processor_seconds() - begun
            pause = max(look, 4 * spent)  # a large backlog takes time to measure: leave most of it to the worker
            if deadline is not None:
                pause = min(pause, max(0.0, deadline - stopwatch.seconds()))
            time.sleep(pause)
            look = min(_LOOK_MOST, look * 1.2)

    def measure(self, ends: Targets | None = None) -> tuple[FlushResult, Targets | None]:
        """Return the counts up to given ends of the journals, or up to their present ends, and those ends.

        Where the disk does not let the journals be read, something is taken to be pending: it may be.
        """
        try:
            return self._measured(ends)
        except OSError as error:
            self._note_unread(error)
            self._is_blind = True
        return (self._last if self._last.pending or self._last.parked else FlushResult(pending=1)), ends

    def _measured(self, ends: Targets | None) -> tuple[FlushResult, Targets]:
        try:
            ledger = Ledger.open(self._path, read_only=True)
        except (LedgerUnavailable, OutboxUnusable):
            return self._unknown(ends)
        try:
            records, retired = counted(ledger)
            letters = ledger.dead_letter_counts()
            note = destination_note(ledger)
        except (LedgerUnavailable, OutboxUnusable):
            return self._unknown(ends)
        finally:
            with contextlib.suppress(LedgerUnavailable):
                ledger.close()
        self._settling = any(record.settles_ms for record in records.values())
        known = self._ends(ends, records)
        parked = note.state == "parked"
        found = total(known, records.values(), retired, letters, parked=parked)
        self._last = dataclasses.replace(found, pending=found.pending + len(self._unread))
        self._is_blind = bool(self._unread) and not found.pending
        if self._last.parked:
            self._tried_ms = min(
                last_tried_ms(note, records.get(run))
                for run, run_ends in known.items()
                if left(run_ends, records.get(run), parked=parked).parked
            )
        return self._last, known

    def _ends(self, before: Targets | None, records: Mapping[str, RunRecord]) -> Targets:
        found = targets(self._directory, records, self._unread, before=before)
        for error in self._unread.values():
            self._note_unread(error)
        return found

    def _note_unread(self, error: OSError) -> None:
        """Count and say what the disk does not give; what a signal handler raises is meant for the program."""
        if is_foreign(error):
            raise error
        self._counters.add("backlog_unread")
        self._counters.warn_once(
            "backlog_unread", f"mlflow-outbox: how much is delivered cannot be told now: {described(error)}"
        )

    def _unknown(self, ends: Targets | None) -> tuple[FlushResult, Targets]:
        """Answer when the ledger cannot be read: as if nothing had been delivered since the last look.

        It is locked, or its directory is not safe to use: then the worker says so, which needs it too.
        """
        known = self._ends(None, {}) if ends is None else ends
        if self._last.pending or self._last.parked:
            return self._last, known
        found = total(known, (), Totals(), {}, parked=False)
        return dataclasses.replace(found, pending=found.pending + len(self._unread)), known
