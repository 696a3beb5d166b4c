"""Filed runs of which the ledger does not know that: MLflow is asked whether it holds them.

A run is filed once it was delivered and read back, and only the ledger says so. It may have been lost, set aside or set
back since, or be that of another machine than the one that has filed the run, on a shared file system. Without it
nothing of the run would ever be reclaimed, and an outbox that is full of such runs would refuse new events for good. So
they are looked at one after the other while there is nothing to send: found in MLflow as any run is, and compared with
it as any run is at its end (``finish``). What MLflow holds the ledger knows again, and it is kept for one retention
time more.

Nothing is sent here, nothing made and nothing moved. A run that MLflow does not have any more, or of which it lacks
something, stays where it is, and this worker does not ask for it again: who deleted it did not ask for it, and
``replay --again`` sends it. Rooms stay too: of an experiment that began offline only they say what it was called.
"""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from typing import Final

from mlflow_outbox.counters import Counters
from mlflow_outbox.destination import Destination
from mlflow_outbox.settings import Settings
from mlflow_outbox.spool import provisional
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox.spool.reader import RunReader
from mlflow_outbox.views import RunView
from mlflow_outbox_worker.ledger import Ledger
from mlflow_outbox_worker.presence import absent_store
from mlflow_outbox_worker.records import RunRecord
from mlflow_outbox_worker.sink import RemoteRun, Sink, SinkError
from mlflow_outbox_worker.verification import altered_artifacts, differences

#: Events read in one step, between two of which the loop sees to what is to be sent.
_WINDOW: Final = 10_000
#: Seconds until the next step after MLflow did not answer, or refused to.
_AGAIN: Final = 60.0


class Recollection:
    """Has the ledger know again what was filed before it was lost.

    Args:
        directory: the outbox; None when nothing of it is filed or reclaimed.
        destination: where it delivers to.
        settings: what is read back.
        counters: counts "runs_known_again".
        now_ms: wall-clock milliseconds since the epoch.
        clock: seconds of a clock that never goes back.
    """

    def __init__(
        self,
        directory: OutboxDirectory | None,
        destination: Destination,
        settings: Settings,
        counters: Counters,
        *,
        now_ms: Callable[[], int],
        clock: Callable[[], float],
    ) -> None:
        self._directory = directory
        self._destination = destination
        self._settings = settings
        self._counters = counters
        self._now_ms = now_ms
        self._clock = clock
        self._unknown: list[str] = []
        #: Those that MLflow did not say it holds, and one at which something unforeseen was raised.
        self._left: set[str] = set()
        self._begun: _Begun | None = None
        self._due = float("-inf")

    def __repr__(self) -> str:
        return f"<Recollection of {len(self._unknown)} runs>"

    def begin(self, ledger: Ledger) -> None:
        """Find the filed runs of which a ledger does not know that they are.

        Raises:
            LedgerUnavailable: it cannot be read now.
        """
        directory, self._begun = self._directory, None
        self._unknown = [
            run_id
            for run_id in (directory.delivered_ids() if directory is not None else ())
            if not provisional.is_room(run_id) and run_id not in self._left and _is_unknown(directory, ledger, run_id)
        ]

    def is_due(self) -> bool:
        """Return whether there is such a run, and MLflow may be asked: a store that is not there is not to be made."""
        return bool(self._unknown) and self._clock() >= self._due and absent_store(self._destination) is None

    def step(self, sink: Sink, ledger: Ledger) -> bool:
        """Read on in one run, or ask MLflow for one that was read; return whether the ledger has come to know it.

        Args:
            sink: the tracking store.
            ledger: of the worker.

        Raises:
            LedgerUnavailable: it cannot be used now.
        """
        assert self._directory is not None  # noqa: S101 - for the type checker: no run is unknown without one
        run_id = self._unknown[-1]
        self._left.add(run_id)
        begun = self._begun = self._begun or _Begun(run_id, RunReader(self._directory.delivered / run_id))
        known = False
        try:
            if begun.read_on():
                return False
            known = _is_unknown(self._directory, ledger, run_id) and self._is_held(begun, sink, ledger)
        except SinkError as error:
            if error.status != HTTPStatus.NOT_FOUND and error.code != "RESOURCE_DOES_NOT_EXIST":
                self._put_off(run_id)
                return False
        except OSError:  # it cannot be read, or was deleted meanwhile
            known = False
        self._unknown.pop()
        self._begun = None
        if known:
            self._left.discard(run_id)
            self._counters.add("runs_known_again")
        return known

    def _put_off(self, run_id: str) -> None:
        """Have a run's turn come again, after all others: MLflow is away, or refuses to be asked."""
        self._due = self._clock() + _AGAIN
        self._left.discard(run_id)
        self._unknown.insert(0, self._unknown.pop())
        self._begun = None

    def _is_held(self, begun: _Begun, sink: Sink, ledger: Ledger) -> bool:
        """Note in the ledger that MLflow holds a run, if it does, and return whether."""
        remote = begun.found(sink)
        if remote is None:
            return False
        record, view = begun.record, begun.view
        letters = [*ledger.dead_letters(record.run_id), *ledger.settled_letters(record.run_id)]
        if differences(sink, remote.run_id, view, letters, self._settings.verify, reader=begun.reader):
            return False
        if self._settings.verify != "off" and any(
            one.absent for one in altered_artifacts(sink, remote.run_id, view, letters)
        ):
            return False
        record.remote_id, record.experiment_id = remote.run_id, remote.experiment_id
        record.state, record.verified_at_ms = "done", self._now_ms()
        known = ledger.record(record.run_id)
        if known is not None:  # what was refused before is among what was read
            record.dead, record.refused = known.dead, known.refused
            record.delivered = max(known.delivered, record.delivered - known.refused)
            record.cursors = {**known.cursors, **record.cursors}
        view.trim()
        ledger.commit(record, view=view)
        return True


class _Begun:
    """One such run, as far as it was read.

    Args:
        run_id: its id.
        reader: of what was filed of it.
    """

    def __init__(self, run_id: str, reader: RunReader) -> None:
        self.reader = reader
        self.record = RunRecord(run_id)
        self.view = RunView()

    def read_on(self) -> bool:
        """Read some more of it; return whether there is more yet.

        Raises:
            OSError: it cannot be read.
        """
        record = self.record
        window = self.reader.window(record.cursors, points=_WINDOW, items=_WINDOW)
        for writer, event in window.events:
            self.view.fold(event, writer)
        record.cursors = window.cursors
        record.delivered += len(window.events)
        record.quarantined += len(window.broken)
        record.missing += window.missing
        record.ended = self.view.end_time_ms is not None
        return window.more

    def found(self, sink: Sink) -> RemoteRun | None:
        """Return the run in MLflow, or None.

        Raises:
            SinkError: MLflow could not be asked, or does not have it.
        """
        started, header = self.reader.started()
        if header is None:
            return None
        self.record.experiment = header.experiment
        if header.remote:  # it was gone on with here
            return sink.get_run(self.record.run_id)
        given = "" if started is None else started.experiment_id
        experiment: str | None = given
        if not given or provisional.is_provisional(given):
            experiment = sink.find_experiment(header.experiment) if header.experiment else None
        twins = sink.find_runs(experiment, self.record.run_id) if experiment else []
        return sink.get_run(twins[0]) if twins else None


def _is_unknown(directory: OutboxDirectory | None, ledger: Ledger, run_id: str) -> bool:
    """Return whether a filed run does not go on, and the ledger does not know that it is done."""
    if directory is None or directory.run(run_id).exists():
        return False
    record = ledger.record(run_id)
    return record is None or record.state != "done" or not record.verified_at_ms
