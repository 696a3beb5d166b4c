"""Runs as the disk of one outbox has them: what the ledger keeps of what was delivered, with what is behind that.

Each look at the ledger opens and checks its file, which takes a millisecond; who asks about many runs asks once.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, TypeVar

from mlflow_outbox.counters import described
from mlflow_outbox.errors import LedgerUnavailable, OutboxUnusable
from mlflow_outbox.spool import provisional
from mlflow_outbox.spool.disk import is_foreign
from mlflow_outbox.spool.events import Event, Metric, Metrics
from mlflow_outbox.spool.reader import RunReader
from mlflow_outbox.spool.window import Cursor
from mlflow_outbox.views import RunView
from mlflow_outbox_worker.ledger import Ledger
from mlflow_outbox_worker.sink import RUN_ID_TAG

if TYPE_CHECKING:
    from mlflow_outbox.outbox import Outbox
    from mlflow_outbox_worker.records import RunRecord

    _Held = tuple[RunRecord | None, RunView | None]

T = TypeVar("T")

#: Seconds that the ledger is waited for, at least and at most; a query takes milliseconds.
_LEDGER_PATIENCE: Final = (1.0, 5.0)
#: What a ledger raises that is locked, or that is not safe to use: answers come from the journals alone then.
_UNREADABLE: Final = (LedgerUnavailable, OutboxUnusable)
#: Runs of which the ledger is asked at once, their views included.
_AT_ONCE: Final = 100
#: What the ledger has of a run of which it has nothing, or where it cannot be read.
_NOTHING: Final[_Held] = (None, None)


class LocalRun:
    """A run as the outbox has it: what was delivered (its view), and what was not.

    Attributes:
        view: delivered and pending events together.
        base: how far delivery was when it was read.
        cursors: how far it was read.
        pending: (writer, event) pairs that MLflow does not have yet; of points, of which an outage leaves millions,
            those that may be a metric's latest.
        waits: more may come of what was read without a segment's growing: the beginning of a frame was on its way.
        sizes: bytes of its segments when they were read by ``read_on``; None where that says nothing.
        linked: how many of the view's requests were looked through for points; see ``plugin.reads``.
    """

    def __init__(self, run_id: str, experiment: str, record: RunRecord | None, view: RunView) -> None:
        self.run_id = run_id
        self.experiment = experiment
        self.remote_id = record.remote_id if record is not None else ""
        self.view = view
        self.pending: list[tuple[str, Event]] = []
        self.base: dict[str, Cursor] = {}
        self.cursors: dict[str, Cursor] = {}
        self.waits = False
        self.sizes: dict[str, int] | None = None
        self.linked = 0

    def as_dict(self) -> dict[str, Any]:
        """Return the run in the form of ``get_all_runs``."""
        return entry_of(self.remote_id or self.run_id, self.view, "outbox")


class OnDisk:
    """Reads what is on disk of the runs of one outbox.

    Args:
        outbox: the outbox.
    """

    def __init__(self, outbox: Outbox) -> None:
        self._directory = outbox.directory
        self._counters = outbox.counters
        self._ledger_path = outbox.directory.ledger_in(outbox.settings.ledger_dir)
        least, most = _LEDGER_PATIENCE
        self._patience = min(most, max(least, outbox.settings.create_timeout))

    def local_id(self, remote_id: str) -> str | None:
        """Return the outbox's id of a run of MLflow, or None."""
        with self._ledger() as ledger:
            return ledger.local_id(remote_id) if ledger is not None else None
        return None

    def local_runs(
        self,
        experiment: str | None = None,
        *,
        filed: bool = True,
        besides: Collection[str] = (),
        among: Callable[[str], bool] = lambda _: True,
    ) -> list[LocalRun]:
        """Return the runs that the outbox still has on disk; one that the disk does not give is left out, and said.

        Args:
            experiment: only those of this experiment; None means all. Of the others no event is read.
            filed: those too that are filed as delivered, which may be thousands, and of which nothing waits.
            besides: those that are left out.
            among: says of the id of an experiment, as a run has it that began through ``outbox+``, whether it is meant.
        """
        with self._ledger() as ledger:
            on_disk = self._on_disk(filed=filed)
            ids = [run_id for run_id in on_disk if run_id not in besides and not provisional.is_room(run_id)]
            found: list[LocalRun | None] = []
            for start in range(0, len(ids), _AT_ONCE):
                readers = {run_id: self._reader(run_id) for run_id in ids[start : start + _AT_ONCE]}
                meant = [one for one in readers if self._readable(one, _is_of, readers[one], experiment, among)]
                held = self._held(meant, ledger)
                found += [
                    self._readable(one, self._local_run, one, ledger, None, readers[one], held.get(one, _NOTHING))
                    for one in meant
                ]
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
        return run if run is not None and self._has(run) else None

    def _has(self, run: LocalRun) -> bool:
        """Return whether there is anything of a run: of one that was retired there is no more than its ids."""
        known = any((parent / run.run_id).is_dir() for parent in (self._directory.runs, self._directory.delivered))
        return known or bool(run.remote_id and run.base)

    def read_on(self, before: Mapping[str, LocalRun | None], told: Callable[[LocalRun], object]) -> None:
        """Read those of several runs and rooms that there are, as ``local_run`` does, with few looks at the ledger.

        Args:
            before: what was read before, by id, and None of those that are read for the first time. Of one whose
                segments have not grown since no segment is opened.
            told: is given each as soon as it was read: what waits of all of them may be more than memory holds.
        """
        ids = list(before)
        with self._ledger() as ledger:
            for start in range(0, len(ids), _AT_ONCE):
                some = ids[start : start + _AT_ONCE]
                held = self._held(some, ledger, before)
                for one in some:
                    run = self._read_on(one, ledger, before[one], held.get(one, _NOTHING))
                    if self._has(run):
                        told(run)

    def _read_on(self, run_id: str, ledger: Ledger | None, since: LocalRun | None, held: _Held) -> LocalRun:
        sizes, record = self._sizes(run_id), held[0]
        if since is not None and sizes is not None and since.sizes == sizes and since.base == _base(record):
            since.remote_id, since.pending = record.remote_id if record is not None else "", []
            return since
        run = self._local_run(run_id, ledger, since, None, held)
        run.sizes = None if run.waits else sizes
        return run

    def _sizes(self, run_id: str) -> dict[str, int] | None:
        """Return the bytes of a run's segments; None on a network file system, which may say late that they have grown.

        Raises:
            OSError: the disk does not tell.
        """
        if self._directory.network:
            return None
        found: dict[str, int] = {}
        for parent in (self._directory.runs, self._directory.delivered):
            with contextlib.suppress(FileNotFoundError), os.scandir(parent / run_id) as entries:
                for entry in entries:
                    if entry.name.endswith(".log"):
                        found[entry.path] = entry.stat(follow_symlinks=False).st_size
        return found

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

    def metas(self, names: Collection[str]) -> dict[str, str]:
        """Return texts as ``meta`` does, of those names that have one."""
        with self._ledger() as ledger:
            held = ledger.metas(names) if ledger is not None else {}
            return {name: value.decode() for name, value in held.items() if value}
        return {}

    def reached(self, run_id: str) -> dict[str, int]:
        """Return, for each writer of a run or room, the number of its first event that was not delivered."""
        with self._ledger() as ledger:
            record = ledger.record(run_id) if ledger is not None else None
            return {writer: cursor.seq for writer, cursor in record.cursors.items()} if record is not None else {}
        return {}

    def delivered(self, run_id: str) -> dict[str, Cursor]:
        """Return how far each writer of a run was delivered."""
        with self._ledger() as ledger:
            return _base(ledger.record(run_id) if ledger is not None else None)
        return {}

    def remote_id(self, run_id: str) -> str:
        """Return MLflow's id of a run of this outbox, or "" while it has none."""
        with self._ledger() as ledger:
            record = ledger.record(run_id) if ledger is not None else None
            return record.remote_id if record is not None else ""
        return ""

    def remote_ids(self, run_ids: Collection[str]) -> dict[str, str]:
        """Return MLflow's ids of several runs of this outbox, of those that have one."""
        with self._ledger() as ledger:
            held = ledger.held(run_ids) if ledger is not None else {}
            return {run_id: record.remote_id for run_id, (record, _) in held.items() if record and record.remote_id}
        return {}

    def _held(
        self, run_ids: Collection[str], ledger: Ledger | None, before: Mapping[str, LocalRun | None] | None = None
    ) -> dict[str, _Held]:
        """Return the record and the view of runs; a view that was read before where the record stands as it stood."""
        with contextlib.suppress(*_UNREADABLE):
            if ledger is not None:
                again = {one: run for one in run_ids if (run := (before or {}).get(one)) is not None}
                known: dict[str, _Held] = {
                    one: (record, again[one].view)
                    for one, (record, _) in ledger.held(again).items()
                    if again[one].base == _base(record)
                }
                return known | ledger.held([one for one in run_ids if one not in known], views=True)
        return {}

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

    def _readable(self, run_id: str, read: Callable[..., T], *arguments: Any) -> T | None:
        """Return what is read of one of several runs; None, counted and said, where the disk fails."""
        try:
            return read(*arguments)
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
        held: _Held | None = None,
    ) -> LocalRun:
        if held is None:
            held = self._held((run_id,), ledger, {run_id: since}).get(run_id, _NOTHING)
        record, view = held
        pending = reader or self._reader(run_id)
        _, header = pending.started()
        experiment = header.experiment if header is not None else record.experiment if record is not None else ""
        run = LocalRun(run_id, experiment, record, view or RunView())
        if record is not None and view is None:
            record = None  # the ledger was lost in part: read everything
        run.base = run.cursors = _base(record)
        if since is not None and since.base == run.base:
            since.remote_id, since.pending = run.remote_id, []
            run = since
        while True:
            window = pending.window(run.cursors, points=100_000, items=100_000)
            points: list[Metric | Metrics] = []
            for writer, event in window.events:
                if isinstance(event, (Metric, Metrics)):
                    points.append(event)
                else:
                    run.view.fold(event, writer)
                    run.pending.append((writer, event))
            run.pending += [("", point) for point in run.view.fold_points(points)]
            run.cursors, run.waits = window.cursors, window.waits
            if not window.more:
                return run


def _base(record: RunRecord | None) -> dict[str, Cursor]:
    return dict(record.cursors) if record is not None else {}


def _is_of(reader: RunReader, experiment: str | None, among: Callable[[str], bool]) -> bool:
    """Return whether a run may be one of an experiment's, by how it began; it is not if that says otherwise."""
    started, header = reader.started()
    if header is not None and experiment not in {None, header.experiment}:
        return False
    return started is None or not started.experiment_id or among(started.experiment_id)


def entry_of(run_id: str, view: RunView, source: str) -> dict[str, Any]:
    """Return a run in the form of ``get_all_runs``; ``source`` says who has it so."""
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
