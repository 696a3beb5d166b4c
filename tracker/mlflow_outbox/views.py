"""Events folded into what a reader of runs sees: the same answer that MLflow gives once everything has arrived.

The rules are MLflow's own: a param keeps its first value, a tag and a path of an artifact the last, the latest point
of a metric is the one with the largest (step, time, value). "Last" across several writers of one run (ranks, a resumed
job) means the later wall-clock time; within one writer it means the order of its calls, whatever its clock did.

The worker reads and writes a view whole with each window, so nothing in it may grow with what passes through and is
not asked for afterwards: of traces, which an experiment's room sees without an end, it keeps only the files of the
latest, and of points that name a model or a dataset the latest too (``linked``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

import msgspec

from mlflow_outbox.linked import OPERATION as LINKED_OPERATION
from mlflow_outbox.linked import points_in
from mlflow_outbox.spool.events import (
    GOING_ON,
    NAME_TAG,
    Artifact,
    Event,
    FileFor,
    Metric,
    Metrics,
    Params,
    Request,
    RunEnded,
    RunStarted,
    Tags,
    argument_of,
)

#: Requests that readers fold themselves (``plugin.reads``), or that the end of a delivery asks for (``twins``). All
#: others are folded at once or are of traces, of which a room sees any number and no reader asks the outbox.
_KEPT: Final = frozenset(
    {"log_inputs", "log_outputs", "log_batch"}
    | {"create_experiment", "set_experiment_tag", "delete_experiment_tag"}
    | {"rename_experiment", "delete_experiment", "restore_experiment"}
    | {"create_logged_model", "finalize_logged_model", "set_logged_model_tags", "delete_logged_model_tag"}
    | {"log_logged_model_params", "delete_logged_model"}
)
#: Owners of delivered files that are no model, which are traces: the outbox answers for so many of them, the latest,
#: while the server is away.
TRACES: Final = 256
#: Requests of points of models and datasets, of which it answers for the latest.
LINKED: Final = 1000


class Register(msgspec.Struct, array_like=True):
    """A value of which the last one wins: the value, its time in ms, its writer."""

    value: str
    time_ms: int
    writer: str


class Latest(msgspec.Struct, array_like=True):
    """The latest point of a metric, and how many points there are."""

    value: float
    step: int
    time_ms: int
    points: int


class File(msgspec.Struct, array_like=True):
    """An artifact as it was logged.

    Attributes:
        sha256, size: digest and bytes of the content.
        placed: the directory in which the call has put it itself.
        settled: MLflow has been seen to hold a file there, which is not to be sent once more.
    """

    sha256: str
    size: int
    time_ms: int
    placed: str = ""
    writer: str = ""
    settled: bool = False


class Kept(msgspec.Struct, array_like=True):
    """A request that readers fold themselves: operation, arguments as JSON, time in ms, id that MLflow gave."""

    operation: str
    arguments: bytes
    time_ms: int
    known: str


class RunView(msgspec.Struct):
    """One run as its events so far describe it; ``status`` is RUNNING until an event says otherwise.

    Attributes:
        lifecycle: "active" or "deleted".
        files: of models and traces, by owner and path.
        linked: of requests that were forgotten, the latest point of each metric.
        requests: in order; what they mean is known to who reads them.
    """

    name: str = ""
    user: str = ""
    start_time_ms: int = 0
    end_time_ms: int | None = None
    status: Register = msgspec.field(default_factory=lambda: Register("RUNNING", 0, ""))
    params: dict[str, str] = {}
    tags: dict[str, Register] = {}
    metrics: dict[str, Latest] = {}
    artifacts: dict[str, File] = {}
    lifecycle: str = "active"
    files: dict[str, dict[str, File]] = {}
    requests: list[Kept] = []
    experiment_id: str = ""
    linked: dict[str, Latest] = {}

    def __post_init__(self) -> None:
        """Leave out what an earlier version kept; the next window's view is small again."""
        if any(kept.operation not in _KEPT for kept in self.requests):
            self.requests = [kept for kept in self.requests if kept.operation in _KEPT]

    @property
    def title(self) -> str:
        """What the run is called now: a name that it was given later is a tag alone."""
        held = self.tags.get(NAME_TAG)
        return held.value if held is not None else self.name

    def trim(self) -> None:
        """Forget what was delivered and the outbox does not answer for: traces and linked points but the latest."""
        traces = [owner for owner in self.files if owner.startswith("uri:")]
        for owner in traces[:-TRACES]:
            del self.files[owner]
        many = [kept for kept in self.requests if kept.operation == LINKED_OPERATION][:-LINKED]
        for kept in many:
            for point in points_in(kept.arguments):
                _count(self.linked, point.key, point.value, point.time_ms, point.step)
        if many:
            gone = set(map(id, many))
            self.requests = [kept for kept in self.requests if id(kept) not in gone]

    def fold(self, event: Event, writer: str) -> None:
        """Take one event of a writer into account; events of one writer must come in their order."""
        kind = type(event)  # of the many points it is compared, which is faster than to ask isinstance
        if kind is Metric:
            _count(self.metrics, event.key, event.value, event.time_ms, event.step)  # type: ignore[union-attr]  # by its kind
        elif kind is Metrics:
            for key, value in event.values.items():  # type: ignore[union-attr]  # by its kind
                _count(self.metrics, key, value, event.time_ms, event.step)  # type: ignore[union-attr, arg-type]  # by its kind
        elif isinstance(event, Params):
            for key, text in event.values.items():
                self.params.setdefault(key, text)
        elif isinstance(event, Tags):
            for key, text in event.values.items():
                self.set_tag(key, text, event.time_ms, writer)
        elif isinstance(event, Artifact):
            _stored(self.artifacts, event, writer)
        elif isinstance(event, RunStarted):
            self._started(event, writer)
        elif isinstance(event, Request):
            self._requested(event, writer)
        elif isinstance(event, FileFor):
            _stored(self.files.setdefault(event.owner, {}), event, writer)
        elif isinstance(event, RunEnded) and wins(self.status, event.time_ms, writer):
            self.status = Register(event.status, event.time_ms, writer)
            self.end_time_ms = event.end_time_ms if event.status not in GOING_ON else None

    def fold_points(self, events: Iterable[Metric | Metrics]) -> list[Metric]:
        """Take points into account as ``fold`` does; return the latest of each metric, which say as much of a run."""
        some = RunView()
        for event in events:
            some.fold(event, "")
        for key, latest in some.metrics.items():
            _count(self.metrics, key, latest.value, latest.time_ms, latest.step)
            self.metrics[key].points += latest.points - 1
        return [Metric(key, one.value, one.time_ms, one.step) for key, one in some.metrics.items()]

    def _requested(self, event: Request, writer: str) -> None:
        if event.operation in _KEPT:
            self.requests.append(Kept(event.operation, event.arguments, event.time_ms, event.known))
        elif event.operation == "delete_run":
            self.lifecycle = "deleted"
        elif event.operation == "restore_run":
            self.lifecycle = "active"
        elif event.operation == "delete_tag":
            gone = self.tags.pop(argument_of(event.arguments, "key"), None)
            if gone is not None and argument_of(event.arguments, "key") == NAME_TAG:
                self.name = gone.value  # which MLflow keeps
        elif event.operation == "update_run_info":
            self.name = argument_of(event.arguments, "run_name") or self.name
            self.set_tag(NAME_TAG, self.name, event.time_ms, writer)

    def set_tag(self, key: str, value: str, time_ms: int, writer: str) -> bool:
        """Set a tag unless another writer set it later; return whether it was set."""
        held = self.tags.get(key)
        if held is not None and not wins(held, time_ms, writer):
            return False
        self.tags[key] = Register(value, time_ms, writer)
        return True

    def _started(self, event: RunStarted, writer: str) -> None:
        if not event.resumed:
            self.start_time_ms = event.start_time_ms
            self.name = event.run_name or self.name
            self.user = event.user or self.user
            self.experiment_id = event.experiment_id or self.experiment_id
        elif wins(self.status, event.time_ms, writer):
            self.status = Register("RUNNING", event.time_ms, writer)
            self.end_time_ms = None
        for key, text in event.tags.items():
            self.set_tag(key, text, event.time_ms, writer)


def _count(metrics: dict[str, Latest], key: str, value: float, time_ms: int, step: int) -> None:
    held = metrics.get(key)
    if held is None:
        metrics[key] = Latest(value, step, time_ms, 1)
        return
    held.points += 1
    if (step, time_ms) > (held.step, held.time_ms) or (
        step == held.step and time_ms == held.time_ms and _order(value) >= _order(held.value)
    ):
        held.value, held.step, held.time_ms = value, step, time_ms


def wins(held: Register | File, time_ms: int, writer: str) -> bool:
    """Return whether a new value is later than the held one."""
    return writer == held.writer or time_ms >= held.time_ms


def _stored(files: dict[str, File], event: Artifact | FileFor, writer: str) -> None:
    held = files.get(event.path)
    if held is None or wins(held, event.time_ms, writer):
        files[event.path] = File(event.sha256, event.size, event.time_ms, event.placed, writer)


def _order(value: float) -> float:
    return 0.0 if math.isnan(value) else value  # MLflow's SQL stores hold NaN as 0 with a flag
