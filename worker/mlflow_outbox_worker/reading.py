"""Runs as a reader sees them: MLflow's answer with what has not arrived folded in, or without MLflow the local one.

So a program reads its own writes, whether MLflow is up, down, or was never there, and each run says where it comes
from.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Final, TypeVar

from mlflow_outbox.counters import described
from mlflow_outbox.errors import LedgerUnavailable, OutboxError, OutboxUnusable, TrackingUnavailable
from mlflow_outbox.interrupts import forward
from mlflow_outbox.solelock import SoleLock
from mlflow_outbox.spool import provisional
from mlflow_outbox.spool.disk import is_foreign
from mlflow_outbox.spool.events import Event, RunStarted
from mlflow_outbox.spool.reader import RunReader
from mlflow_outbox.spool.window import Cursor
from mlflow_outbox.views import Latest, Register, RunView
from mlflow_outbox_worker import aside
from mlflow_outbox_worker.ledger import Ledger
from mlflow_outbox_worker.mlflow_sink import open_client, open_sink, prepare
from mlflow_outbox_worker.sink import RUN_ID_TAG, RemoteRun, Sink, SinkError

if TYPE_CHECKING:
    from mlflow_outbox.outbox import Outbox
    from mlflow_outbox_worker.records import RunRecord

T = TypeVar("T")

#: Seconds that a reader waits for MLflow before it answers from the disk.
_DEADLINE: Final = 10.0
#: Times as long as that a database may take for an answer of many pages.
_PAGES: Final = 6
#: Seconds that the ledger is waited for, at least and at most; a query takes milliseconds.
_LEDGER_PATIENCE: Final = (1.0, 5.0)
#: What a ledger raises that is locked, or that is not safe to use: answers come from the journals alone then.
_UNREADABLE: Final = (LedgerUnavailable, OutboxUnusable)


class LocalRun:
    """A run as the outbox has it: what was delivered (its view), and what was not.

    Attributes:
        view: delivered and pending events together.
        base: how far delivery was when it was read.
        cursors: how far it was read.
        pending: (writer, event) pairs that MLflow does not have yet.
    """

    def __init__(self, run_id: str, experiment: str, record: RunRecord | None, view: RunView) -> None:
        self.run_id = run_id
        self.experiment = experiment
        self.remote_id = record.remote_id if record is not None else ""
        self.view = view
        self.pending: list[tuple[str, Event]] = []
        self.base: dict[str, Cursor] = {}
        self.cursors: dict[str, Cursor] = {}

    def as_dict(self) -> dict[str, Any]:
        """Return the run in the form of ``get_all_runs``."""
        return _entry(self.remote_id or self.run_id, self.view, "outbox")


class Reading:
    """Reads the runs of one outbox and its destination.

    Args:
        outbox: the outbox.
    """

    def __init__(self, outbox: Outbox) -> None:
        self._directory = outbox.directory
        self._counters = outbox.counters
        self._destination = outbox.destination
        self._key = (outbox.destination.secret_uri or outbox.destination.uri, outbox.destination.artifact_root)
        self._ledger_path = outbox.directory.ledger_in(outbox.settings.ledger_dir)
        self._timeout = min(_DEADLINE, outbox.settings.request_timeout)
        least, most = _LEDGER_PATIENCE
        self._patience = min(most, max(least, outbox.settings.create_timeout))

    def local_id(self, remote_id: str) -> str | None:
        """Return the outbox's id of a run of MLflow, or None."""
        with self._ledger() as ledger:
            return ledger.local_id(remote_id) if ledger is not None else None
        return None

    def experiment_id(self, name: str) -> str:
        """Return MLflow's id of an experiment, which is made when there is none.

        Raises:
            TrackingUnavailable: MLflow cannot be reached now.
        """
        try:
            return self._asked(lambda sink: sink.experiment_id(name))
        except SinkError as error:
            forward(error)
            raise self._unavailable("the id of an experiment is known to MLflow alone", error) from None

    def client(self) -> Any:
        """Return an ``mlflow.MlflowClient`` for the destination.

        Raises:
            TrackingUnavailable: MLflow cannot be reached now.
        """

        def opened() -> Any:
            with _opening(self._key), _importing():
                return open_client(self._key[0], artifact_root=self._key[1] or None)

        try:
            return self._in_time(opened)
        except (SinkError, TrackingUnavailable) as error:
            forward(error)
            raise self._unavailable("MLflow's client asks MLflow alone", error) from None

    def runs(self, experiment: str) -> list[dict[str, Any]]:
        """Return all runs of an experiment, newest first; see ``MLflowTracker.get_all_runs``."""
        local = self.local_runs(experiment, filed=False)  # first, so that what is filed meanwhile is in one of both
        try:
            found = self._asked(lambda sink: sink.find_experiment(experiment))
            remote = self._asked(lambda sink: sink.search_runs(str(found)), _PAGES) if found is not None else []
        except SinkError as error:
            forward(error)  # a time limit of the program's may have ended while MLflow was asked
            local += self.local_runs(experiment, besides={run.run_id for run in local})
            entries = [run.as_dict() for run in local]
        else:
            entries = _merged(remote, local)
        entries.sort(key=lambda entry: entry["start_time"], reverse=True)
        return entries

    def local_runs(
        self, experiment: str | None = None, *, filed: bool = True, besides: Collection[str] = ()
    ) -> list[LocalRun]:
        """Return the runs that the outbox still has on disk; one that the disk does not give is left out, and said.

        Args:
            experiment: only those of this experiment; None means all. Of the others no event is read.
            filed: those too that are filed as delivered, which may be thousands, and of which nothing waits.
            besides: those that are left out.
        """
        with self._ledger() as ledger:
            on_disk = self._on_disk(filed=filed)
            ids = [run_id for run_id in on_disk if run_id not in besides and not provisional.is_room(run_id)]
            found = (self._readable_run(run_id, ledger, experiment) for run_id in ids)
            return [run for run in found if run is not None and experiment in {None, run.experiment}]
        return []

    def local_run(self, run_id: str, since: LocalRun | None = None) -> LocalRun | None:
        """Return one run as the outbox has it, or None when it has nothing of it.

        Args:
            run_id: the outbox's id of the run, which is MLflow's when it existed there first.
            since: what was returned before. If nothing was delivered since, only what is new is read and added to it,
                and ``pending`` is that alone.
        """
        run = None
        with self._ledger() as ledger:
            run = self._local_run(run_id, ledger, since)
        known = (self._directory.runs / run_id).is_dir() or (self._directory.delivered / run_id).is_dir()
        # Of a run that was retired there is no more than its ids.
        return run if run is not None and (known or (run.remote_id and run.base)) else None

    @contextlib.contextmanager
    def _ledger(self) -> Iterator[Ledger | None]:
        """Yield the ledger, or None where it cannot be read; a block in which it no longer can ends there."""
        ledger: Ledger | None = None
        with contextlib.suppress(*_UNREADABLE):
            ledger = Ledger.open(self._ledger_path, timeout=self._patience, read_only=True)
        try:
            with contextlib.suppress(*_UNREADABLE):
                yield ledger
        finally:
            if ledger is not None:
                with contextlib.suppress(LedgerUnavailable):
                    ledger.close()

    def meta(self, name: str) -> str:
        """Return a text that the worker noted in the ledger, or ""."""
        with self._ledger() as ledger:
            return (ledger.meta(name) or b"").decode() if ledger is not None else ""
        return ""

    def reached(self, run_id: str) -> dict[str, int]:
        """Return, for each writer of a run or room, the number of its first event that was not delivered."""
        with self._ledger() as ledger:
            record = ledger.record(run_id) if ledger is not None else None
            return {writer: cursor.seq for writer, cursor in record.cursors.items()} if record is not None else {}
        return {}

    def remote_id(self, run_id: str) -> str:
        """Return MLflow's id of a run of this outbox, or "" while it has none."""
        with self._ledger() as ledger:
            record = ledger.record(run_id) if ledger is not None else None
            return record.remote_id if record is not None else ""
        return ""

    def _on_disk(self, *, filed: bool) -> dict[str, None]:
        """Return the ids of the runs on disk, as far as it lists them; that it does not is counted and said."""
        found = dict[str, None]()
        for ids in (self._directory.run_ids, self._directory.delivered_ids)[: 2 if filed else 1]:
            try:
                found.update(dict.fromkeys(ids()))
            except OSError as error:
                if is_foreign(error):
                    raise
                self._counters.add("runs_not_read")
                what = f"runs in {self._directory.path} that have not arrived are not shown, as the disk lists none"
                self._counters.warn_once(("unread", ""), f"mlflow-outbox: {what}: {described(error)}")
        return found

    def _readable_run(self, run_id: str, ledger: Ledger | None, experiment: str | None) -> LocalRun | None:
        """Return one of several runs; None for another experiment's, and, counted and said, where the disk fails."""
        reader = self._reader(run_id)
        try:
            _, header = reader.started()
            if header is not None and experiment not in {None, header.experiment}:
                return None
            return self._local_run(run_id, ledger, reader=reader)
        except OutboxUnusable:
            raise
        except OSError as error:
            if is_foreign(error):
                raise
            self._counters.add("runs_not_read")
            what = f"what of run {run_id} has not arrived is not shown, as the disk does not give it"
            self._counters.warn_once(("unread", run_id), f"mlflow-outbox: {what}: {described(error)}")
        return None

    def _reader(self, run_id: str) -> RunReader:
        # Both places: what is filed while this reads may be behind the cursors that were read.
        return RunReader(self._directory.run(run_id), self._directory.delivered / run_id)

    def _local_run(
        self,
        run_id: str,
        ledger: Ledger | None,
        since: LocalRun | None = None,
        reader: RunReader | None = None,
    ) -> LocalRun | None:
        record, view = None, None
        with contextlib.suppress(*_UNREADABLE):
            if ledger is not None:
                record, view = ledger.record(run_id), ledger.view(run_id)
        pending = reader or self._reader(run_id)
        _, header = pending.started()
        experiment = header.experiment if header is not None else record.experiment if record is not None else ""
        run = LocalRun(run_id, experiment, record, view or RunView())
        if record is not None and view is None:
            record = None  # the ledger was lost in part: read everything
        run.base = run.cursors = dict(record.cursors) if record is not None else {}
        if since is not None and since.base == run.base:
            since.remote_id, since.pending = run.remote_id, []
            run = since
        while True:
            window = pending.window(run.cursors, points=100_000, items=100_000)
            for writer, event in window.events:
                run.view.fold(event, writer)
            run.pending += window.events
            run.cursors = window.cursors
            if not window.more:
                return run

    def _sink(self) -> Sink:
        held = _sinks.get(self._key)
        if held is not None:
            return held
        with _opening(self._key):
            if self._key not in _sinks:
                with _importing():
                    uri, root = self._key
                    _sinks[self._key] = open_sink(uri, artifact_root=root or None, timeout=self._timeout)
            return _sinks[self._key]

    def _asked(self, question: Callable[[Sink], T], times: int = 1) -> T:
        return self._in_time(lambda: question(self._sink()), times)

    def _in_time(self, question: Callable[[], T], times: int = 1) -> T:
        """Put a question to MLflow, in a thread of its own if nothing else ends the wait for an answer.

        Raises:
            SinkError: there was none.
        """
        if not aside.is_needed(self._destination.scheme):
            return question()
        if self._key not in _sinks:
            with _importing():  # here, for no other thread should
                prepare(self._key[0])
        return aside.ask(question, self._timeout * times)

    def _unavailable(self, what: str, error: Exception) -> TrackingUnavailable:
        msg = f"{what}, and {self._destination.uri} cannot be asked now: {error}"
        return TrackingUnavailable(msg)


#: Opening an embedded store costs a second, and an experiment asks more than once.
_sinks: dict[tuple[str, str], Sink] = {}
#: Held while one is opened, by destination: one that is silent holds up no other.
_locks: dict[tuple[str, str], SoleLock] = {}


def _after_fork_in_child() -> None:
    _locks.clear()  # the child makes its own: they may be held by threads that are not there


os.register_at_fork(after_in_child=_after_fork_in_child)


def _opening(key: tuple[str, str]) -> AbstractContextManager[None]:
    """Open a store once, whoever asks; a signal handler that asks while this thread opens it gets a SinkError."""
    msg = "the call that was interrupted is still opening its store"
    return _locks.setdefault(key, SoleLock()).held(lambda: SinkError(msg, kind="connection", sent=False))


@contextlib.contextmanager
def _importing() -> Iterator[None]:
    """Raise a SinkError where MLflow cannot be imported: it is not there, or a library does not fit the others."""
    try:
        yield
    except (SinkError, OutboxError):
        raise
    except Exception as error:  # noqa: BLE001 - protobuf raises a TypeError, NumPy others; the answer says so
        forward(error)
        msg = f"MLflow cannot be imported: {described(error)}"
        raise SinkError(msg, kind="not_mlflow", sent=False) from None


def _merged(remote: Iterable[RemoteRun], local: list[LocalRun]) -> list[dict[str, Any]]:
    by_remote = {run.remote_id: run for run in local if run.remote_id}
    by_local = {run.run_id: run for run in local}
    entries = []
    seen: set[str] = set()
    for run in remote:
        own = by_remote.get(run.run_id) or by_local.get(run.tags.get(RUN_ID_TAG, "")) or by_local.get(run.run_id)
        if own is None or not own.pending:
            entries.append(_entry(run.run_id, _view_of(run), "mlflow"))
        else:
            view = _view_of(run)
            for writer, event in own.pending:
                if not isinstance(event, RunStarted) or event.resumed:
                    view.fold(event, writer)
            entries.append(_entry(run.run_id, view, "mlflow+outbox"))
        if own is not None:
            seen.add(own.run_id)
    # A run that MLflow was given and does not list any more was deleted there; it is shown only if something waits
    # for it.
    entries += [run.as_dict() for run in local if run.run_id not in seen and (run.pending or not run.remote_id)]
    return entries


def _view_of(run: RemoteRun) -> RunView:
    view = RunView(name=run.run_name, start_time_ms=run.start_time_ms, end_time_ms=run.end_time_ms)
    view.status = Register(run.status, 0, "")
    view.params = dict(run.params)
    view.tags = {key: Register(value, 0, "") for key, value in run.tags.items()}
    view.metrics = {key: Latest(p.value, p.step, p.time_ms, 1) for key, p in run.metrics.items()}
    return view


def _entry(run_id: str, view: RunView, source: str) -> dict[str, Any]:
    return {
        "run_id": run_id,
        "run_name": view.title,
        "metrics": {key: latest.value for key, latest in view.metrics.items()},
        "params": dict(view.params),
        "tags": {key: register.value for key, register in view.tags.items() if key != RUN_ID_TAG},
        "status": view.status.value,
        "start_time": view.start_time_ms,
        "end_time": view.end_time_ms,
        "source": source,
    }
