"""What has to be delivered before a request that changes an experiment as a whole.

An experiment's changes are in the journal of its room and its runs are in journals of their own, so neither waits for
the other by itself. But MLflow takes no run into a deleted experiment, and a name is free again only after a rename. So
those requests wait for what was logged before them: an event that was logged first is delivered first. What is logged
later is not waited for, nor what waits itself, directly or by others, for the room that would wait.

What is logged after an experiment was restored comes after that, in turn. It is sent all the same, and waits only where
MLflow refuses it because the experiment is deleted: nothing is asked, then, for the many experiments that never are.

Nor does a change of a trace that another program logged say which experiment that is in. It is sent, too, and waits
where MLflow refuses it while a room has something from before it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Final

from mlflow_outbox.spool import provisional
from mlflow_outbox.spool.events import Request, SegmentClosed
from mlflow_outbox.spool.reader import RunReader
from mlflow_outbox.spool.window import Cursor
from mlflow_outbox_worker.ledger import Ledger
from mlflow_outbox_worker.records import RunRecord
from mlflow_outbox_worker.sources import Source

#: Milliseconds after which a trace that was there for others to change is in a journal: MLflow holds it back for five
#: seconds, and has queues.
_HELD_BACK: Final = 15_000


class Waits(Exception):
    """Raised when something of another run or room has to be delivered first; try again soon.

    Attributes:
        what: its id, or what it is called in a message.
        on: that run or room; "" when it is not known.
    """

    def __init__(self, what: str, on: str) -> None:
        super().__init__(f"waits for {what}")
        self.what = what
        self.on = on


class Precedence:
    """Knows what of one source comes before what; used by several threads for different runs.

    Args:
        source: where the runs come from.
        ledger: how far they are delivered.
    """

    def __init__(self, source: Source, ledger: Ledger) -> None:
        self._source = source
        self._ledger = ledger
        #: By room and time in ms: the runs that a deletion still has to wait for.
        self._before: dict[tuple[str, int], list[str]] = {}
        #: What each run or room waits for, of those that wait.
        self._waiting: dict[str, str] = {}
        #: How far a run was delivered when MLflow refused what follows, because it or its experiment was deleted, and
        #: no restoration was on its way.
        self._refused_at: dict[str, dict[str, Cursor]] = {}
        #: The models that are being made.
        self._making: set[str] = set()
        self._lock = threading.Lock()

    def waits(self, run_id: str, on: str) -> None:
        """Note that a run or room waits for another; for none that is known, if that is ""."""
        self._waiting[_name(run_id)] = _name(on)

    def goes_on(self, run_id: str) -> None:
        """Note that a run or room waits for nothing."""
        self._waiting.pop(_name(run_id), None)
        self._refused_at.pop(run_id, None)

    def waits_for(self, run_id: str, other: str) -> bool:
        """Return whether a run or room waits for another, directly or by others."""
        seen: set[str] = set()
        name = _name(run_id)
        while name and name not in seen:
            seen.add(name)
            name = self._waiting.get(name, "")
            if name == _name(other):
                return True
        return False

    @contextlib.contextmanager
    def making(self, model_id: str) -> Iterator[None]:
        """Have nobody else make a model meanwhile, as who needs it ahead of its turn may (``Requests.make_ahead``).

        Raises:
            Waits: somebody is at it.
        """
        with self._lock:
            if model_id in self._making:
                raise Waits(model_id, "")
            self._making.add(model_id)
        try:
            yield
        finally:
            self._making.discard(model_id)

    def run_before(self, room: str, time_ms: int, experiments: set[str]) -> str:
        """Return a run of an experiment of which something was logged before a time and is not delivered, or "".

        Args:
            room: of the experiment.
            time_ms: wall-clock milliseconds since the epoch.
            experiments: the ids of the experiment, here and in MLflow.

        Raises:
            LedgerUnavailable: the ledger could not be read.
        """
        key = (room, time_ms)
        if key not in self._before:
            self._before[key] = self._runs_of(room, experiments)
        runs = self._before[key]
        while runs and (self.waits_for(runs[0], room) or not self.is_pending(runs[0], time_ms)):
            runs.pop(0)
        if runs:
            return runs[0]
        del self._before[key]
        return ""

    def await_restoration(self, record: RunRecord) -> None:
        """Let the restoration of a run's experiment come first, if there is one on its way.

        Args:
            record: of a run of which MLflow takes nothing, because it or its experiment is deleted.

        Raises:
            Waits: for it; or for nothing, once, as it may have arrived since MLflow refused this.
            LedgerUnavailable: the ledger could not be read.
        """
        room = self._restoring(record)
        if room:
            self._refused_at.pop(record.run_id, None)  # it may arrive between the next refusal and the look after that
            self.waits(record.run_id, room)
        elif self._refused_at.get(record.run_id) == record.cursors:
            return
        else:
            self._refused_at[record.run_id] = dict(record.cursors)
        what = "the restoration of its experiment"
        raise Waits(what, room)

    def await_trace(self, trace_id: str, time_ms: int, room: str) -> None:
        """Let what other rooms have from before a change of a trace come first: one of them may have the trace.

        What waits for a person is not waited for: it may have nothing to do with the trace, and others wait here.

        Args:
            trace_id: which MLflow does not have.
            time_ms: when the change was logged, in wall-clock milliseconds since the epoch.
            room: in which it is.

        Raises:
            Waits: for one of them.
            LedgerUnavailable: the ledger could not be read.
        """
        what = f"the trace {trace_id}"
        for other in self._source.run_ids():
            if not provisional.is_room(other) or _name(other) == _name(room) or self.waits_for(other, room):
                continue
            record = self._record(other)
            is_parked = record is not None and record.state == "parked"
            if not is_parked and self.is_pending(other, time_ms + _HELD_BACK):
                raise Waits(what, other)

    def _restoring(self, record: RunRecord) -> str:
        """Return the room in which a run's experiment is restored, if that is not delivered, or ""."""
        started, _ = RunReader(*self._source.folders(record.run_id)).started()
        known = {record.experiment_id, started.experiment_id if started is not None else ""} - {""}
        rooms = (provisional.room_of(experiment) for experiment in sorted(known))
        return next((room for room in rooms if room != record.run_id and self._is_restoring(room)), "")

    def _is_restoring(self, room: str) -> bool:
        folders = self._source.folders(room)
        if not folders:  # it is not among what is replayed
            return False
        record = self._record(room)
        pending = RunReader(*folders).each(Request, record.cursors if record is not None else {})
        return any(event.operation == "restore_experiment" and not event.known for _, event in pending)

    def is_pending(self, run_id: str, time_ms: int) -> bool:
        """Return whether something of a run or room that was logged before a time is not delivered.

        Args:
            run_id: the run.
            time_ms: wall-clock milliseconds since the epoch.

        Raises:
            LedgerUnavailable: the ledger could not be read.
        """
        folders = self._source.folders(run_id)
        if not folders:  # as above
            return False
        reader = RunReader(*folders)
        record = self._record(run_id)
        cursors = record.cursors if record is not None else {}
        if not provisional.is_room(run_id) and (record is None or not (record.remote_id or cursors)):
            _, header = reader.started()  # the time at which a run started may be of the program's choice
            return header is not None and header.created_ms <= time_ms
        everybody = reader.segments().keys()
        writers: set[str] = set()
        while True:
            window = reader.window(cursors)
            for writer, event in window.events:
                if isinstance(event, SegmentClosed):
                    continue
                if writer not in writers and event.time_ms <= time_ms:
                    return True
                writers.add(writer)  # what follows was logged later still
            if not window.more or writers >= everybody:
                return False
            cursors = window.cursors

    def _record(self, run_id: str) -> RunRecord | None:
        """Return what is known of a run, or of a room, which a replay calls by its outbox as well."""
        record = self._ledger.record(run_id)
        if record is None and provisional.is_room(run_id):
            name = next((name for name in self._source.run_ids() if _name(name) == run_id), run_id)
            record = self._ledger.record(name)
        return record

    def _runs_of(self, room: str, experiments: set[str]) -> list[str]:
        _, header = RunReader(*self._source.folders(room)).started()
        name = header.experiment if header is not None else ""
        return [
            run_id
            for run_id in self._source.run_ids()
            if not provisional.is_room(run_id) and self._is_in(run_id, experiments, name)
        ]

    def _is_in(self, run_id: str, experiments: set[str], name: str) -> bool:
        record = self._ledger.record(run_id)
        if record is not None and record.experiment_id:
            return record.experiment_id in experiments
        started, header = RunReader(*self._source.folders(run_id)).started()
        if started is not None and started.experiment_id:
            return started.experiment_id in experiments
        return bool(name) and header is not None and header.experiment == name


def _name(run_id: str) -> str:
    """Return a run's id, or what its outbox calls a room; see ``provisional.experiment_of``."""
    return run_id.partition(".")[0]
