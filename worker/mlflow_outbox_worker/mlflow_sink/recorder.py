"""The ``Sink`` for every store that MLflow reaches: each method is one question to the store, asked once."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any, Concatenate, Final, ParamSpec, TypeVar
from urllib.parse import urlsplit

from mlflow.entities import ExperimentTag, Metric, Param, Run, RunStatus, RunTag, ViewType
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_USER

from mlflow_outbox.counters import printable
from mlflow_outbox.living import Living
from mlflow_outbox.spool.events import NOBODY, STATUSES
from mlflow_outbox_worker.forking import using_store
from mlflow_outbox_worker.mlflow_sink import calls
from mlflow_outbox_worker.mlflow_sink.boundary import translate, translated
from mlflow_outbox_worker.mlflow_sink.directory import Directory
from mlflow_outbox_worker.mlflow_sink.rest import ServerStore
from mlflow_outbox_worker.mlflow_sink.stores import OpenStore
from mlflow_outbox_worker.sink import RUN_ID_TAG, MetricPoint, RemoteModel, RemoteRun, SinkError

#: Runs in one page of a search; their params can make a run megabytes large.
RUNS_PER_PAGE = 200
#: Points in one page of a metric's history. Always asked for: some servers page without an end when it is left open.
POINTS_PER_PAGE = 25_000
_REPEATED: Final = "the server repeats a page of its answer"
#: Where the login goes along with a file.
_WITH_LOGIN: Final = frozenset({"http", "https", "mlflow-artifacts"})
#: Runs whose artifact URI is remembered, which saves one request for each file.
_REMEMBERED_RUNS = 1024

_P = ParamSpec("_P")
_T = TypeVar("_T")


def _translated(method: Callable[Concatenate[Recorder, _P], _T]) -> Callable[Concatenate[Recorder, _P], _T]:
    """Make a method raise nothing but SinkError."""

    @functools.wraps(method)
    def call(self: Recorder, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        with self._turn, self._held(), translated():
            self._opened.check()
            return method(self, *args, **kwargs)

    return call


class Recorder:
    """The sink of one open store; see ``sink.Sink`` for its methods."""

    def __init__(self, opened: OpenStore) -> None:
        self._opened = opened
        self._store = opened.store
        self.deduplicates_metrics = opened.deduplicates_metrics
        self.takes_repeats = opened.takes_repeats
        self.parallel = opened.parallel
        self._artifact_uris: OrderedDict[str, str] = OrderedDict()
        self._lock = threading.Lock()
        # An embedded store is a file: whatever the caller does, one request at a time touches it.
        self._turn: contextlib.AbstractContextManager[Any] = (
            contextlib.nullcontext() if self.parallel else threading.RLock()
        )
        self._held: Callable[[], contextlib.AbstractContextManager[Any]] = (
            contextlib.nullcontext if self.parallel else using_store
        )
        if not self.parallel:
            _embedded.add(self)

    def __repr__(self) -> str:
        return f"<Recorder {type(self._store).__name__}>"

    @_translated
    def admits(self) -> bool:
        """Return whether the store answers who asks for nothing in particular, and can be written to as a whole."""
        self._store.search_experiments(max_results=1)
        return all(os.access(place, os.W_OK) for place in self._opened.places)

    @_translated
    def experiment_id(self, name: str) -> str:
        """Return the id of the experiment called name, which is created when there is none."""
        found = self._store.get_experiment_by_name(name)
        if found is None:
            try:
                return _present(self._store.create_experiment(name, artifact_location=None, tags=[]), "experiment")
            except MlflowException as error:
                said = translate(error)
                if said.status == HTTPStatus.BAD_REQUEST and said.code != "RESOURCE_ALREADY_EXISTS":
                    msg = (  # a database's columns are shorter than the names that MLflow takes, for one
                        f"the experiment {printable(name, 60)!r} ({len(name)} characters) cannot be made: {said}; "
                        "another one takes the run: mlflow-outbox replay DIR --experiment NAME"
                    )
                    raise SinkError(msg, kind="answer", status=said.status, code=said.code) from None
                if said.code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = self._store.get_experiment_by_name(name)  # somebody else was faster
        if found is None or found.lifecycle_stage != "active":
            msg = f"the experiment {name!r} is deleted in MLflow: restore it there, or rename it"
            raise SinkError(msg, kind="answer", status=400, code="INVALID_STATE")
        return _present(found.experiment_id, "experiment")

    @_translated
    def find_experiment(self, name: str) -> str | None:
        """Return the id of the active experiment called name, or None; never creates one."""
        found = self._store.get_experiment_by_name(name)
        return found.experiment_id if found is not None and found.lifecycle_stage == "active" else None

    @_translated
    def create_run(
        self, experiment_id: str, *, run_name: str | None, start_time_ms: int, user: str, tags: Mapping[str, str]
    ) -> str:
        """Create a run and return its id; twice called, two runs. MLflow chooses a name when there is none."""
        # What MLflow shows is this tag, which its clients set; the user is in the run's record alone.
        shown = {MLFLOW_USER: user, **tags} if user else tags
        run_tags = [RunTag(key, value) for key, value in shown.items()]
        run = self._store.create_run(experiment_id, user or NOBODY, start_time_ms, run_tags, run_name)
        return str(self._remembered(run).info.run_id)

    @_translated
    def find_runs(self, experiment_id: str, local_id: str) -> list[str]:
        """Return the ids of all runs, deleted ones too, whose RUN_ID_TAG is local_id, the one to go on with first.

        A second one, of a create whose answer was lost, is deleted when it is found, or stays empty: whoever comes
        later, without the ledger that knew it, must not take it for the run. Else the oldest comes first. Runs of one
        local id start at the same logged time, so their ids decide between them: any reader finds the same order.
        """
        if not re.fullmatch(r"[\w.-]+", local_id):
            return []  # it cannot be quoted in a filter, and no outbox makes such an id
        if isinstance(self._store, Directory):
            found = [(info, False) for info in self._store.tagged_runs(experiment_id, local_id)]
        else:
            condition = f"tags.`{RUN_ID_TAG}` = '{local_id}'"
            runs = self._search(experiment_id, condition, ViewType.ALL)
            found = [(run.info, not (run.data.metrics or run.data.params)) for run in runs]

        def rank(one: tuple[Any, bool]) -> tuple[bool, bool, int, str]:
            info, is_empty = one
            return info.lifecycle_stage != "active", is_empty, info.start_time or 0, info.run_id

        return [info.run_id for info, _ in sorted(found, key=rank)]

    @_translated
    def get_run(self, run_id: str) -> RemoteRun:
        """Return what the store holds of a run."""
        return _remote(self._remembered(self._store.get_run(run_id)))

    @_translated
    def search_runs(self, experiment_id: str) -> list[RemoteRun]:
        """Return every active run of an experiment, newest first."""
        found = self._search(experiment_id, "", ViewType.ACTIVE_ONLY)
        # One that begins between two pages moves the last run of the first to the second, where it comes again.
        return [*{run.info.run_id: _remote(run) for run in found}.values()]

    @_translated
    def log_batch(
        self, run_id: str, points: Sequence[MetricPoint], params: Mapping[str, str], tags: Mapping[str, str]
    ) -> None:
        """Send at most 1000 points, 100 params and 100 tags (1000 in all) in one request."""
        if isinstance(self._store, ServerStore):
            self._store.send_batch(run_id, points, params, tags)
            return
        self._store.log_batch(
            run_id,
            metrics=[Metric(point.key, point.value, point.time_ms, point.step) for point in points],
            params=[Param(key, value) for key, value in params.items()],
            tags=[RunTag(key, value) for key, value in tags.items()],
        )

    @_translated
    def update_run(self, run_id: str, *, status: str, end_time_ms: int | None) -> None:
        """Set a run's status and its end time; MLflow keeps an end time that it has when there is no new one."""
        if status not in STATUSES:
            msg = f"{status!r} is no status of a run"
            raise ValueError(msg)
        self._store.update_run_info(run_id, RunStatus.from_string(status), end_time_ms, None)

    @_translated
    def upload(
        self, run_id: str, file: Path, artifact_path: str, *, is_replaced: Callable[[Path], bool] = lambda _: False
    ) -> None:
        """Store the content of file as artifact_path (file name included), replacing what was there."""
        try:
            self._opened.artifacts.upload(self._artifact_uri(run_id), file, artifact_path, is_replaced)
        except Exception:  # raised again: the files may have been moved elsewhere, and the run says where to
            with self._lock:
                self._artifact_uris.pop(run_id, None)
            raise

    @_translated
    def create_experiment(self, name: str, artifact_location: str | None, tags: Mapping[str, str]) -> str:
        """Return the id of the experiment called name, which is created with location and tags when there is none."""
        if self._store.get_experiment_by_name(name) is None:
            self._check_location(name, artifact_location or "")
            labels = [ExperimentTag(key, value) for key, value in tags.items()]
            try:
                made = self._store.create_experiment(name, artifact_location=artifact_location or None, tags=labels)
                return _present(made, "experiment")
            except MlflowException as error:
                if translate(error).code != "RESOURCE_ALREADY_EXISTS":
                    raise
        return self.experiment_id(name)

    def _check_location(self, name: str, location: str) -> None:
        """Refuse to make an experiment whose files, and the login with them, go to another host than the server.

        A journal says so, which may be one that somebody else wrote (see ``trace_places``). One that a person has made
        is taken.

        Raises:
            SinkError: they do.
        """
        parts = urlsplit(location)
        host = parts.netloc.rpartition("@")[2].lower()
        own = self._opened.host.netloc.lower() if self._opened.host is not None else ""
        if parts.scheme in _WITH_LOGIN and host not in {"", own}:
            msg = (
                f"the experiment {printable(name, 60)!r} is to keep its files at another host, {printable(host)}, "
                "which would get the login for this one; if that is meant, make the experiment by hand"
            )
            raise SinkError(msg, kind="answer", status=400, code="INVALID_PARAMETER_VALUE", sent=False)

    @_translated
    def call(self, operation: str, arguments: str) -> str:
        """Call a method of the store with arguments in JSON; return the id of what it created, or ""."""
        return calls.call(self._store, operation, arguments, self._opened.artifacts)

    @_translated
    def find_models(self, experiment_id: str, local_id: str) -> dict[str, RemoteModel]:
        """Return by their ids the logged models whose ``mlflow_outbox.model_id`` tag is local_id."""
        return calls.find_models(self._store, experiment_id, local_id)

    @_translated
    def model_params(self, model_id: str) -> Mapping[str, str]:
        """Return the params of a logged model."""
        return dict(self._store.get_logged_model(model_id).params)

    @_translated
    def artifact_location(self, kind: str, subject: str) -> str:
        """Return the artifact URI of a "run", a "model" or an "experiment"."""
        return self._place(kind, subject)

    @_translated
    def upload_for(
        self,
        kind: str,
        owner: str,
        file: Path,
        artifact_path: str,
        *,
        is_replaced: Callable[[Path], bool] = lambda _: False,
    ) -> None:
        """Store the content of file under a model's artifacts (kind "model") or an artifact URI (kind "uri")."""
        self._opened.artifacts.upload(self._place(kind, owner), file, artifact_path, is_replaced)

    @_translated
    def takes(self, kind: str, owner: str, file: Path | None) -> bool:
        """Return whether a file is taken now beside the artifacts of a "run", a "model" or an artifact URI ("uri")."""
        return self._opened.artifacts.takes(self._place(kind, owner), file)

    @_translated
    def metric_history(self, run_id: str, key: str) -> list[MetricPoint]:
        """Return every point of one metric."""
        points, token = self.metric_page(run_id, key, None)
        while token:
            some, token = self.metric_page(run_id, key, token)
            points += some
        return points

    @_translated
    def metric_page(self, run_id: str, key: str, token: str | None) -> tuple[list[MetricPoint], str | None]:
        """Return some points of one metric, and what to ask for the next ones with; None when these are the last."""
        if isinstance(self._store, Directory) and (points := self._store.points(run_id, key)) is not None:
            return points, None
        some = self._store.get_metric_history(run_id, key, max_results=POINTS_PER_PAGE, page_token=token)
        if some.token and some.token == token:
            raise SinkError(_REPEATED, kind="not_mlflow")
        return [_point(metric) for metric in some], some.token or None

    @_translated
    def download(self, run_id: str, artifact_path: str, target: Path, size: int) -> None:
        """Store the content of an artifact, which should have a size in bytes, as the new file target."""
        self._opened.artifacts.download(self._artifact_uri(run_id), artifact_path, target, size)

    @_translated
    def list_artifacts(self, run_id: str, folder: str) -> dict[str, int | None]:
        """Return path and size in bytes of the files directly in one folder ("" is the root) of a run's artifacts."""
        return self._opened.artifacts.list_folder(run_id, self._artifact_uri(run_id), folder)

    @_translated
    def delete_run(self, run_id: str) -> None:
        """Mark a run deleted; used only for an empty second run left by a create whose answer was lost."""
        self._store.delete_run(run_id)

    def close(self) -> None:
        """Give back connections; the sink is not used afterwards."""
        with contextlib.suppress(SinkError), self._held(), translated():  # there is nothing left to do for who closes
            self._opened.close()

    def _search(self, experiment_id: str, condition: str, view: int) -> list[Run]:
        order = ["attributes.start_time DESC"]

        def page(token: str | None) -> Any:
            return self._store.search_runs([experiment_id], condition, view, RUNS_PER_PAGE, order, token)

        return _all_pages(page)

    def _place(self, kind: str, owner: str) -> str:
        if kind == "uri":
            return owner
        return self._artifact_uri(owner) if kind == "run" else calls.artifact_location(self._store, kind, owner)

    def _artifact_uri(self, run_id: str) -> str:
        with self._lock:
            known = self._artifact_uris.get(run_id)
        return known or str(self._remembered(self._store.get_run(run_id)).info.artifact_uri)

    def _remembered(self, run: Run) -> Run:
        run_id = _present(run.info.run_id, "run")
        if run.info.artifact_uri:
            with self._lock:
                self._artifact_uris[run_id] = run.info.artifact_uri
                self._artifact_uris.move_to_end(run_id)
                while len(self._artifact_uris) > _REMEMBERED_RUNS:
                    self._artifact_uris.popitem(last=False)
        return run


#: Those of embedded stores. A thread of the parent may have had its turn at a fork that could not wait for it.
_embedded: Living[Recorder] = Living()


def _after_fork_in_child() -> None:
    for recorder in _embedded.members():
        recorder._turn = threading.RLock()  # noqa: SLF001 - one class with its fork handler


os.register_at_fork(after_in_child=_after_fork_in_child)


def _all_pages(page: Callable[[str | None], Any]) -> list[Any]:
    """Return what all pages hold; a server that gives the same page again is not followed forever."""
    found: list[Any] = []
    token: str | None = None
    while True:
        some = page(token)
        found.extend(some)
        if not some.token:
            return found
        if some.token == token:
            raise SinkError(_REPEATED, kind="not_mlflow")
        token = some.token


def _present(identifier: Any, what: str) -> str:
    if not identifier:
        msg = f"the answer names no {what}, so it is not MLflow's"
        raise SinkError(msg, kind="not_mlflow")
    return str(identifier)


def _point(metric: Metric) -> MetricPoint:
    return MetricPoint(metric.key, float(metric.value), int(metric.timestamp), int(metric.step))


def _remote(run: Run) -> RemoteRun:
    info, data = run.info, run.data
    return RemoteRun(
        run_id=info.run_id,
        experiment_id=str(info.experiment_id),
        run_name=info.run_name or "",
        status=info.status,
        start_time_ms=info.start_time or 0,
        end_time_ms=info.end_time,
        lifecycle=info.lifecycle_stage,
        artifact_uri=info.artifact_uri or "",
        params=dict(data.params),
        tags=dict(data.tags),
        metrics={metric.key: _point(metric) for metric in data._metric_objs},  # noqa: SLF001 - the public dict has no steps
    )
