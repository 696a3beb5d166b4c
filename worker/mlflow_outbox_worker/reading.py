"""Runs as a reader sees them: MLflow's answer with what has not arrived folded in, or without MLflow the local one.

So a program reads its own writes, whether MLflow is up, down, or was never there, and each run says where it comes
from.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Final, TypeVar

from mlflow_outbox.counters import described
from mlflow_outbox.errors import OutboxError, TrackingUnavailable
from mlflow_outbox.interrupts import forward
from mlflow_outbox.solelock import SoleLock
from mlflow_outbox.spool.events import RunStarted
from mlflow_outbox.views import Latest, Register, RunView
from mlflow_outbox_worker import aside
from mlflow_outbox_worker.mlflow_sink import open_client, open_sink, prepare
from mlflow_outbox_worker.ondisk import LocalRun, OnDisk, entry_of
from mlflow_outbox_worker.sink import RUN_ID_TAG, RemoteRun, Sink, SinkError

if TYPE_CHECKING:
    from mlflow_outbox.outbox import Outbox

T = TypeVar("T")

#: Seconds that a reader waits for MLflow before it answers from the disk.
_DEADLINE: Final = 10.0
#: Times as long as that a database may take for an answer of many pages.
_PAGES: Final = 6


class Reading(OnDisk):
    """Reads the runs of one outbox and its destination.

    Args:
        outbox: the outbox.
    """

    def __init__(self, outbox: Outbox) -> None:
        super().__init__(outbox)
        self._destination = outbox.destination
        self._key = (outbox.destination.secret_uri or outbox.destination.uri, outbox.destination.artifact_root)
        self._timeout = min(_DEADLINE, outbox.settings.request_timeout)

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
            entries.append(entry_of(run.run_id, _view_of(run), "mlflow"))
        else:
            view = _view_of(run)
            for writer, event in own.pending:
                if not isinstance(event, RunStarted) or event.resumed:
                    view.fold(event, writer)
            entries.append(entry_of(run.run_id, view, "mlflow+outbox"))
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
