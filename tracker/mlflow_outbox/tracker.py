"""The API that autopilot sessions call, and the way to runs of one's own.

Making a tracker checks its outbox directory and does nothing else: no network, no thread, no import of mlflow.
Everything that logs goes to the journal; the three calls that ask MLflow something (``experiment_id``, ``client``,
``get_*``) say clearly when they cannot reach it.
"""

from __future__ import annotations

import getpass
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, get_args

from mlflow_outbox import autopilot, delivery, handles, sessions
from mlflow_outbox.counters import Counters, shown
from mlflow_outbox.destination import as_mlflow_reads, resolve
from mlflow_outbox.errors import EventRefused, InvalidEvent, InvalidSettings, OutboxUnusable, TrackingUnavailable
from mlflow_outbox.forklock import ForkLock
from mlflow_outbox.living import Living
from mlflow_outbox.outbox import FlushResult, Outbox
from mlflow_outbox.outboxes import shared
from mlflow_outbox.refusals import Refusals
from mlflow_outbox.run import Run, Time
from mlflow_outbox.settings import Settings, WorkerKind, tracking_uri_from_environment, workspace_from_environment
from mlflow_outbox.spool.directory import OutboxDirectory, is_run_id
from mlflow_outbox.spool.identity import RunIdentity, in_full
from mlflow_outbox.spool.reader import RunReader
from mlflow_outbox.validation import checked_experiment_name, checked_mapping

if TYPE_CHECKING:
    from typing_extensions import Self

    from mlflow_outbox.spool.journal import Journal

_DEFAULT_ROOT: Final = ".mlflow-outbox"
_SUMMARY: Final = "final_summary"
#: Held while the run of a summary is started, of whichever tracker; a fork waits for that.
_summarizing: Final = ForkLock(patience=1.0)


class MLflowTracker(handles.Handle):
    """Logs runs of one experiment through a durable outbox.

    Args:
        experiment_name: name of the MLflow experiment; made at the first delivery.
        tracking_uri: where to deliver; None means ``MLFLOW_TRACKING_URI``, else the local ``mlruns`` directory.
        outbox_dir: directory under which outboxes are made, one per destination; None means the setting ``root``
            (``MLFLOW_OUTBOX_DIR`` without ``settings``), else ``./.mlflow-outbox``.
        worker: "thread" delivers in the background of this process, "process" in one of its own that outlives this
            one, "none" only writes: offline, to be delivered later; None is the setting ``worker``, a thread.
        settings: the options; None reads them from the environment. Options made by ``Settings(...)`` take the place of
            all environment variables, those by ``Settings.from_environment(...)`` only of some.

    Raises:
        InvalidSettings: an option, an environment variable or the experiment's name is wrong.
        DestinationError: the tracking URI is none.
        OutboxUnusable: only with ``Settings(strict=True)``; otherwise ``disabled`` becomes true, with a warning.
    """

    def __init__(
        self,
        experiment_name: str,
        tracking_uri: str | os.PathLike[str] | None = None,
        *,
        outbox_dir: str | os.PathLike[str] | None = None,
        worker: WorkerKind | None = None,
        settings: Settings | None = None,
    ) -> None:
        if worker is not None and worker not in get_args(WorkerKind):
            msg = f"worker={worker!r} must be one of {', '.join(map(repr, get_args(WorkerKind)))}"
            raise InvalidSettings(msg)
        self.experiment_name = checked_experiment_name(experiment_name)
        self._settings = Settings.from_environment() if settings is None else settings
        default, workspace = tracking_uri_from_environment(), workspace_from_environment()
        self._destination = resolve(tracking_uri, default=default, workspace=workspace)
        self._begin(self._open(outbox_dir, worker or self._settings.worker))

    def _begin(self, outbox: Outbox | None) -> None:
        self._summary: Run | None = None
        self._journals: Living[Journal] = Living()
        self._outbox = outbox
        self._counters = self._outbox.counters if self._outbox is not None else Counters()
        self._refusals = Refusals(self._counters, strict=self._settings.strict)

    def _open(self, outbox_dir: str | os.PathLike[str] | None, worker: WorkerKind) -> Outbox | None:
        if self._settings.disabled:
            return None
        root = Path(outbox_dir) if outbox_dir is not None else self._settings.root or Path(_DEFAULT_ROOT)
        try:
            directory = OutboxDirectory.create(root, self._destination, now_ms=time.time_ns() // 1_000_000)
        except OutboxUnusable as error:
            if self._settings.strict:
                raise
            counters = Counters()
            counters.warn_once("disabled", f"mlflow-outbox: tracking is disabled, nothing can be kept: {error}")
            return None
        outbox = shared(directory, self._destination, self._settings, worker)
        if worker == "thread":
            delivery.prepare(outbox)
        return outbox

    def __repr__(self) -> str:
        state = "disabled" if self.disabled else str(self.outbox_path)
        return f"<MLflowTracker {self.experiment_name!r} to {self.tracking_uri!r}, {state}>"

    def __reduce__(self) -> tuple[Callable[..., MLflowTracker], tuple[Any, ...]]:
        path = str(self.outbox_path or "")
        if self._outbox is not None:
            self._outbox.hand_out()
        note = handles.noted(self._settings)
        return _reopened, (self.experiment_name, self._destination.uri, path, note, self._summary)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- what it is

    @property
    def tracking_uri(self) -> str:
        """Where events are delivered to, without credentials."""
        return as_mlflow_reads(self._destination.uri)

    @property
    def outbox_path(self) -> Path | None:
        """The outbox's directory; None when the tracker is disabled."""
        return self._outbox.directory.path if self._outbox is not None else None

    @property
    def disabled(self) -> bool:
        """Whether nothing can be kept: the directory is unusable, or ``MLFLOW_OUTBOX_DISABLED`` is set."""
        return self._outbox is None

    @property
    def counters(self) -> dict[str, int]:
        """Refusals, losses and delays of this process so far, by reason."""
        return self._counters.snapshot()

    @property
    def experiment_id(self) -> str:
        """MLflow's id of the experiment, which is made when there is none.

        Raises:
            TrackingUnavailable: MLflow cannot be reached now.
        """
        return str(self._reading().experiment_id(self.experiment_name))

    @property
    def client(self) -> Any:
        """An ``mlflow.MlflowClient`` for the destination.

        Raises:
            TrackingUnavailable: MLflow cannot be reached now.
        """
        return self._reading().client()

    def _reading(self) -> Any:
        if self._outbox is None:
            msg = "the tracker is disabled, so it asks MLflow nothing; see the warning at its creation"
            raise TrackingUnavailable(msg)
        return delivery.reading(self._outbox)

    # -- runs

    def start_run(
        self,
        run_name: str | None = None,
        *,
        run_id: str | None = None,
        tags: Mapping[str, Any] | None = None,
        start_time: Time | None = None,
    ) -> Run:
        """Start a run, or go on with one.

        Args:
            run_name: its name, also for one that is gone on with; None lets MLflow choose one. Of one that a database
                does not take (PostgreSQL: more than 250 characters) the beginning becomes the name.
            run_id: a run of this outbox (also one of an earlier process, offline too, and by as much of its id as a
                terminal shows) or an existing run of MLflow to go on with.
            tags: its first tags.
            start_time: wall-clock time in milliseconds since the epoch, or a datetime; None is now.

        Raises:
            EventRefused: only with ``Settings(strict=True)``.
        """
        counters = self._counters
        if self._outbox is None:
            counters.add("disabled_runs")
            known = run_id if run_id is not None and is_run_id(run_id) else uuid.uuid4().hex
            return Run(None, known, self._settings, counters)
        if run_id is not None and not is_run_id(run_id):
            counters.add("refused_bad_run_id")
            msg = f"the run id {shown(run_id)} is none; a new run is started instead"
            if self._settings.strict:
                raise InvalidEvent("bad_run_id", msg)
            counters.warn_once(("run id", shown(run_id)), f"mlflow-outbox: {msg}")
            run_id = None
        first: dict[Any, Any] = {} if run_id else _source_tags()
        first.update(self._tags(tags))
        identity = self._identity(run_id) if run_id else RunIdentity(uuid.uuid4().hex, self.experiment_name)
        journal = self._outbox.journal(identity)
        self._journals.add(journal)
        run = Run(journal, identity.run_id, self._settings, counters)
        run.begin(run_name, _user(), first, start_time, resumed=run_id is not None)
        return run

    def _tags(self, tags: Mapping[str, Any] | None) -> dict[Any, Any]:
        try:
            return checked_mapping(tags, "start_run(tags=...)") if tags is not None else {}
        except EventRefused as refused:
            self._refusals.refuse(refused, "tags")
            return {}

    def _identity(self, run_id: str) -> RunIdentity:
        """Find out what a run id belongs to; where that cannot be told now, by whether anything is there."""
        assert self._outbox is not None  # noqa: S101 - for the type checker; the caller returned otherwise
        directory = self._outbox.directory
        try:
            return self._resumed(run_id, directory)
        except Exception as error:  # noqa: BLE001 - start_run never raises into the experiment; counted and said
            self._refusals.failed(error, run_id)
        is_here = any(os.path.lexists(parent / run_id) for parent in (directory.runs, directory.delivered))
        return RunIdentity(run_id, self.experiment_name, remote=not is_here)

    def _resumed(self, run_id: str, directory: OutboxDirectory) -> RunIdentity:
        """Find out what a run id belongs to: a run of this outbox, under either of its ids, or one of MLflow."""
        known = run_id
        if not (directory.runs / run_id).is_dir() and not (directory.delivered / run_id).is_dir():
            known = in_full(run_id, (one for ids in (directory.run_ids, directory.delivered_ids) for one in ids()))
            if known == run_id:
                known = self._reading().local_id(run_id) or run_id
        for parent in (directory.runs, directory.delivered):
            for held in RunReader(parent / known).segments().values():
                return RunIdentity(known, held[0].header.experiment, held[0].header.remote)
        return RunIdentity(known, self.experiment_name, remote=known == run_id)

    # -- autopilot sessions

    def log_data_profile(self, profile: Any) -> None:
        """Log a dataset's profile as the run ``data_profile``.

        Args:
            profile: a DataProfile: any object or mapping with its fields.
        """
        self._log("a data profile", lambda: autopilot.of_profile(profile))

    def log_experiment(self, result: Any) -> None:
        """Log one experiment as a run of its own; a failed one ends FAILED.

        Args:
            result: an ExperimentResult: any object or mapping with its fields.
        """
        self._log("an experiment", lambda: autopilot.of_experiment(result))

    def log_final_summary(self, state: Any) -> None:
        """Log the session's outcome as the run ``final_summary``.

        Args:
            state: an ExperimentState: any object or mapping with its fields.
        """
        self._log("the final summary", lambda: autopilot.of_summary(state), run=self._summary_run)

    def log_visualizations(self, plot_paths: Iterable[str | os.PathLike[str]]) -> None:
        """Log plots as artifacts of the run ``final_summary``, before or after ``log_final_summary``.

        Args:
            plot_paths: image files; one that does not exist is skipped with a warning.
        """
        if self.disabled:
            return
        paths = sessions.paths_of(plot_paths, self._refusals)
        if paths is None:
            return
        run = self._summary_run(None)
        try:
            for path in paths:
                run.log_artifact(path)
        finally:
            run.end()

    def _summary_run(self, start_time: int | None) -> Run:
        with _summarizing.alone():
            if self._summary is None:
                self._summary = self.start_run(_SUMMARY, start_time=start_time)
            return self._summary

    def _log(
        self, what: str, read: Callable[[], autopilot.RunContent], run: Callable[[int | None], Run] | None = None
    ) -> None:
        if self.disabled:
            return
        content = sessions.content_of(what, read, self._counters, strict=self._settings.strict)
        if content is not None:
            start = content.start_time_ms
            sessions.log(content, run(start) if run else self.start_run(content.run_name, start_time=start))

    # -- reading

    def get_best_run(self, metric_name: str, ascending: bool = True) -> dict[str, Any] | None:  # noqa: FBT001, FBT002 - documented API
        """Return the run with the lowest (or highest) value of a metric, or None when no run has it.

        Args:
            metric_name: the metric.
            ascending: True when lower values are better.
        """
        runs = [run for run in self.get_all_runs() if _is_number(run["metrics"].get(metric_name))]
        runs.sort(key=lambda run: run["metrics"][metric_name], reverse=not ascending)
        return runs[0] if runs else None

    def get_all_runs(self) -> list[dict[str, Any]]:
        """Return all runs of the experiment, newest first, what has not arrived in MLflow yet included.

        Each is a dict of ``run_id`` (MLflow's when it has one), ``run_name``, ``metrics``, ``params``, ``tags``,
        ``status``, ``start_time`` and ``end_time`` (milliseconds since the epoch; None while it goes on), and
        ``source``: "mlflow", "outbox", or "mlflow+outbox" when the outbox knows more than MLflow. Where MLflow cannot
        be asked, those that are on disk are returned.
        """
        if self._outbox is None:
            return []
        runs: list[dict[str, Any]] = self._reading().runs(self.experiment_name)
        return runs

    # -- the end

    def flush(self, timeout: float | None = None) -> FlushResult:
        """Deliver what has been logged until now.

        Args:
            timeout: seconds to wait; None waits until nothing is pending, as long as somebody delivers. With
                ``worker="none"`` nothing is waited for.

        Returns:
            Counts of events; true when nothing is left but dead letters.
        """
        return self._outbox.flush(timeout) if self._outbox is not None else FlushResult()

    def close(self, timeout: float | None = None) -> FlushResult:
        """Deliver within a bounded time and let go; what is left stays on disk. Logging afterwards still works.

        What the disk has not taken by then, of what this tracker logged, is given up; it is counted, and pending in the
        result.

        Args:
            timeout: seconds for delivery; None means the setting ``close_timeout``. A worker in the middle of a request
                that hangs is waited for a second longer.
        """
        if self._outbox is None:
            return FlushResult()
        seconds = self._settings.close_timeout if timeout is None else timeout
        return self._outbox.close(seconds, self._journals.members())


def _reopened(
    experiment_name: str, tracking_uri: str, path: str, note: dict[str, Any], summary: Run | None = None
) -> MLflowTracker:
    tracker = MLflowTracker.__new__(MLflowTracker)
    tracker.experiment_name, tracker._settings = experiment_name, handles.settings_of(note)  # noqa: SLF001 - its own class's
    tracker._destination = resolve(tracking_uri, default="")  # noqa: SLF001 - as above
    tracker._begin(handles.reopened(path, tracker._settings))  # noqa: SLF001 - as above
    tracker._summary = summary  # noqa: SLF001 - as above
    return tracker


def create_tracker(
    session_id: str,
    dataset_name: str,
    tracking_uri: str | os.PathLike[str] | None = None,
    *,
    outbox_dir: str | os.PathLike[str] | None = None,
    worker: WorkerKind | None = None,
    settings: Settings | None = None,
) -> MLflowTracker:
    """Return a tracker whose experiment is called ``autopilot_<dataset_name>_<session_id>``.

    Args:
        session_id: the session.
        dataset_name: the data set.
        tracking_uri: MLflow's, as for ``MLflowTracker``.
        outbox_dir: the directory of the outbox, as for ``MLflowTracker``.
        worker: where delivery runs, as for ``MLflowTracker``.
        settings: as for ``MLflowTracker``.

    Raises:
        OutboxError: as for ``MLflowTracker``.
    """
    return MLflowTracker(
        f"autopilot_{dataset_name}_{session_id}", tracking_uri, outbox_dir=outbox_dir, worker=worker, settings=settings
    )


def _is_number(value: object) -> bool:
    return isinstance(value, float) and value == value  # noqa: PLR0124 - NaN is the best of nothing


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a user id without a name, as containers have it
        return str(os.geteuid())


def _source_tags() -> dict[str, str]:
    """Return what MLflow's own client says about where a run comes from."""
    return {"mlflow.source.name": sys.argv[0] if sys.argv and sys.argv[0] else "python", "mlflow.source.type": "LOCAL"}
