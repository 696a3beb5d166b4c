"""What readers see: the server's answer with what has not arrived folded in, or what the outbox has without one.

The pending events are read before the server is asked. So an event that is delivered in between is folded in twice,
which changes nothing, and never missed.

MLflow's databases have no infinities: they keep the largest number there is. Where one is behind the outbox
(``bounded``), a point that waits is shown as it will be.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from mlflow.entities import (
    Experiment,
    ExperimentTag,
    LifecycleStage,
    LoggedModel,
    LoggedModelInput,
    LoggedModelOutput,
    LoggedModelStatus,
    Metric,
    Param,
    Run,
    RunData,
    RunInfo,
    RunInputs,
    RunOutputs,
    RunTag,
)

from mlflow_outbox.linked import points_in
from mlflow_outbox.plugin import codec
from mlflow_outbox.spool import provisional
from mlflow_outbox.spool.events import NAME_TAG, NOBODY, Event, Request, RunStarted, argument_of, arguments_of
from mlflow_outbox.spool.events import Metric as MetricEvent
from mlflow_outbox.spool.events import Metrics as MetricsEvent
from mlflow_outbox.views import Kept, Latest, Register, RunView

if TYPE_CHECKING:
    from mlflow_outbox_worker.ondisk import LocalRun


def view_of(run: Run) -> RunView:
    """Return MLflow's answer as a view that events can be folded into."""
    view = RunView(
        name=run.info.run_name or "",
        user=run.info.user_id or "",
        start_time_ms=run.info.start_time or 0,
        end_time_ms=run.info.end_time,
        lifecycle=run.info.lifecycle_stage,
        experiment_id=run.info.experiment_id,
    )
    view.status = Register(run.info.status, 0, "")
    view.params = dict(run.data.params)
    view.tags = {key: Register(value, 0, "") for key, value in run.data.tags.items()}
    view.metrics = {m.key: Latest(m.value, m.step, m.timestamp, 1) for m in run.data._metric_objs}
    return view


def run_of(view: RunView, run_id: str, artifact_uri: str, theirs: Run | None = None, *, bounded: bool = False) -> Run:
    """Return a view as MLflow's entity.

    Args:
        view: the run.
        run_id: the id that it is to have.
        artifact_uri: where its files are, for readers.
        theirs: the server's answer, if there is one, for inputs and outputs.
        bounded: show infinities as a database does.
    """
    name = view.tags.get(NAME_TAG)
    info = RunInfo(
        run_id=run_id,
        experiment_id=view.experiment_id or "0",
        user_id=view.user or NOBODY,
        status=view.status.value,
        start_time=view.start_time_ms,
        end_time=view.end_time_ms,
        lifecycle_stage=LifecycleStage.DELETED if view.lifecycle == "deleted" else LifecycleStage.ACTIVE,
        artifact_uri=artifact_uri,
        run_name=name.value if name is not None else view.name,
    )
    data = RunData(
        metrics=[
            Metric(key, _shown(held.value, bounded), held.time_ms, held.step) for key, held in view.metrics.items()
        ],
        params=[Param(key, value) for key, value in view.params.items()],
        tags=[RunTag(key, held.value) for key, held in view.tags.items() if key != provisional.RUN_ID_TAG],
    )
    inputs, outputs = links(view.requests, theirs)
    return Run(info, data, inputs, outputs)


def folded(
    run: Run, pending: Iterable[tuple[str, Event]], run_id: str, artifact_uri: str, *, bounded: bool = False
) -> Run:
    """Return the server's answer with pending events in it; see ``run_of``."""
    view = view_of(run)
    for writer, event in pending:
        if not isinstance(event, RunStarted) or event.resumed:
            view.fold(event, writer)
            if isinstance(event, Request) and event.operation == "log_batch":
                fold_batch(view, event.arguments)
    return run_of(view, run_id, artifact_uri, run, bounded=bounded)


def local_run_of(
    local: LocalRun, run_id: str, artifact_uri: str, *, theirs: Run | None = None, bounded: bool = False
) -> Run:
    """Return what the outbox has of a run; see ``run_of``."""
    for key, held in local.view.linked.items():
        local.view.fold(MetricEvent(key, held.value, held.time_ms, held.step), "")
    requests = local.view.requests
    for request in requests[local.linked :]:  # those before are in it since it was shown last
        if request.operation == "log_batch":
            fold_batch(local.view, request.arguments)
    local.linked = len(requests)
    return run_of(local.view, run_id, artifact_uri, theirs, bounded=bounded)


def fold_batch(view: RunView, arguments: bytes) -> None:
    """Take metrics into account that were logged with a link to a model or dataset."""
    for point in points_in(arguments):
        view.fold(point, "")


def links(requests: Iterable[Kept], theirs: Run | None) -> tuple[RunInputs, RunOutputs]:
    """Return inputs and outputs: the server's, and those that are pending."""
    mine = getattr(theirs, "inputs", None)
    sets = mine.dataset_inputs if mine is not None else ()
    datasets = _Distinct(sets, lambda one: (one.dataset.name, one.dataset.digest))
    read = _Distinct((mine.model_inputs or ()) if mine is not None else (), lambda one: one.model_id)
    outputs = theirs.outputs if theirs is not None else None
    made = _Distinct(outputs.model_outputs if outputs is not None else (), lambda one: one.model_id)
    for request in requests:
        if request.operation == "log_inputs":
            given = codec.loads(request.arguments)
            datasets.add(given.get("datasets"))
            read.add(given.get("models"))
        elif request.operation == "log_outputs":
            made.add(codec.loads(request.arguments).get("models"))
    return RunInputs(dataset_inputs=datasets.held, model_inputs=read.held), RunOutputs(model_outputs=made.held)


class _Distinct:
    """Things of which each is there once; one request may name the same several times, as the metrics of it do."""

    def __init__(self, held: Iterable[Any], identity: Callable[[Any], object]) -> None:
        self.held = list(held)
        self._identity = identity
        self._seen = {identity(one) for one in self.held}

    def add(self, given: Iterable[Any] | None) -> None:
        """Add those that are not there."""
        for one in given or ():
            if self._identity(one) not in self._seen:
                self._seen.add(self._identity(one))
                self.held.append(one)


def named(run: Run, names: Mapping[str, str]) -> None:
    """Call the models that a run read and made as readers do, each of them once; see ``ids``."""
    read = dict.fromkeys(names.get(m.model_id, m.model_id) for m in run.inputs.model_inputs)
    made = {names.get(m.model_id, m.model_id): m.step for m in run.outputs.model_outputs}
    run._inputs = RunInputs(run.inputs.dataset_inputs, [LoggedModelInput(model_id) for model_id in read])
    run._outputs = RunOutputs([LoggedModelOutput(model_id, step) for model_id, step in made.items()])


def points(events: Iterable[tuple[str, Event]], key: str, *, bounded: bool = False) -> list[Metric]:
    """Return the points of a metric among events, linked to nothing, as a server shows them; see ``run_of``.

    MLflow copies to a model that is logged what a history shows as linked to none.
    """
    found: list[Metric] = []
    for _, event in events:
        if isinstance(event, MetricEvent) and event.key == key:
            found.append(Metric(key, event.value, event.time_ms, event.step))
        elif isinstance(event, MetricsEvent) and key in event.values:
            found.append(Metric(key, event.values[key], event.time_ms, event.step))
        elif isinstance(event, Request) and event.operation == "log_batch":
            linked = codec.loads(event.arguments).get("metrics") or ()
            found += [Metric(key, m.value, m.timestamp, m.step) for m in linked if m.key == key]
    for metric in found:
        metric._value = _shown(metric.value, bounded)
    return found


def _shown(value: float, bounded: bool) -> float:
    return math.copysign(sys.float_info.max, value) if bounded and math.isinf(value) else value


def merged_points(server: Iterable[Metric], pending: Iterable[Metric], *, as_logged: bool = False) -> list[Metric]:
    """Return the points of both, an identical one once, in the order in which MLflow gives them.

    Args:
        server: what the store has.
        pending: what it does not have yet.
        as_logged: as a file store gives them; a database sorts them.
    """
    found = list({_identity(metric): metric for metric in [*server, *pending]}.values())
    return found if as_logged else sorted(found, key=lambda metric: (metric.timestamp, metric.step, metric.value))


def unseen_points(server: Iterable[Metric], pending: Iterable[Metric]) -> list[Metric]:
    """Return those of the pending points that the server does not have."""
    held = {_identity(metric) for metric in server}
    return [metric for metric in pending if _identity(metric) not in held]


def _identity(metric: Metric) -> tuple[str, int, int]:
    return repr(metric.value + 0.0), metric.timestamp, metric.step  # a database has no -0.0


def model_of(requests: Iterable[Kept], model_id: str, theirs: LoggedModel | None, location: str) -> LoggedModel | None:
    """Return a logged model: the server's answer, if there is one, with requests folded in.

    Without one its metrics are those in this journal, which is that of its own run: any other may have some too.

    Args:
        requests: of the journal that the model is in.
        model_id: as it is called there.
        theirs: the server's answer.
        location: its artifact URI, when the server has not said.
    """
    found: dict[str, Any] | None = None
    if theirs is not None:
        found = {
            "experiment_id": theirs.experiment_id, "model_id": theirs.model_id, "name": theirs.name,
            "artifact_location": theirs.artifact_location, "creation_timestamp": theirs.creation_timestamp,
            "last_updated_timestamp": theirs.last_updated_timestamp, "model_type": theirs.model_type,
            "source_run_id": theirs.source_run_id, "status": theirs.status, "tags": dict(theirs.tags),
            "params": dict(theirs.params), "metrics": theirs.metrics,
        }  # fmt: skip
    name = json.dumps(model_id)[1:-1].encode()
    for request in requests:
        if name not in request.arguments:  # another model's; reading its arguments takes a hundred times as long
            continue
        given = codec.loads(request.arguments)
        if request.operation == "log_batch" and theirs is None and found is not None:
            found["metrics"] += _points_of_model(given, model_id)
        if given.get("model_id") != model_id:
            continue
        if request.operation == "create_logged_model" and found is None:
            found = {
                "experiment_id": given["experiment_id"], "model_id": model_id, "name": given["name"],
                "artifact_location": location, "creation_timestamp": request.time_ms,
                "last_updated_timestamp": request.time_ms, "model_type": given.get("model_type"),
                "source_run_id": given.get("source_run_id"), "status": LoggedModelStatus.PENDING,
                "tags": {t.key: t.value for t in given.get("tags") or ()},
                "params": {p.key: p.value for p in given.get("params") or ()}, "metrics": [],
            }  # fmt: skip
        elif found is not None:
            _fold_model(found, request.operation, given, request.time_ms)
    if found is None:
        return None
    found["tags"].pop(provisional.MODEL_ID_TAG, None)
    return LoggedModel(**found)


def models_of(requests: Iterable[Kept]) -> list[LoggedModel]:
    """Return the models that requests make and do not delete, as ``model_of`` does, but without their places.

    Each request is looked at once, for the models that it names: a journal may have hundreds of them.
    """
    made: list[str] = []
    about: dict[str, list[Kept]] = {}
    for request in requests:
        named = _models_named(request)
        if request.operation == "create_logged_model":
            made += named
        for model_id in named:
            about.setdefault(model_id, []).append(request)
    found = (model_of(about[one], one, None, "") for one in dict.fromkeys(made) if not is_deleted(about[one], one))
    return [model for model in found if model is not None]


def _models_named(request: Kept) -> list[str]:
    if request.operation != "log_batch":
        model_id = argument_of(request.arguments, "model_id")
        return [model_id] if model_id else []
    try:
        linked = [metric["v"].get("model_id") for metric in arguments_of(request.arguments).get("metrics") or ()]
    except (ValueError, TypeError, LookupError, AttributeError):  # as in ``linked``
        return []
    return list(dict.fromkeys(str(model_id) for model_id in linked if model_id))


def _points_of_model(given: dict[str, Any], model_id: str) -> list[Metric]:
    return [
        Metric(
            *(one.key, one.value, one.timestamp, one.step, model_id),
            dataset_name=one.dataset_name,
            dataset_digest=one.dataset_digest,
            run_id=given["run_id"],
        )
        for one in given.get("metrics") or ()
        if one.model_id == model_id
    ]


def is_deleted(requests: Iterable[Kept], model_id: str) -> bool:
    """Return whether a logged model is deleted by one of the requests; there is no way back."""
    return any(
        request.operation == "delete_logged_model" and codec.loads(request.arguments)["model_id"] == model_id
        for request in requests
    )


def _fold_model(found: dict[str, Any], operation: str, given: dict[str, Any], time_ms: int) -> None:
    if operation == "finalize_logged_model":
        found["status"] = given["status"]
    elif operation == "set_logged_model_tags":
        found["tags"].update({tag.key: tag.value for tag in given["tags"]})
    elif operation == "delete_logged_model_tag":
        found["tags"].pop(given["key"], None)
    elif operation == "log_logged_model_params":
        found["params"].update({param.key: param.value for param in given["params"]})
    else:
        return
    found["last_updated_timestamp"] = max(time_ms, found["last_updated_timestamp"])


def experiment_of(
    requests: Iterable[Kept], theirs: Experiment | None, experiment_id: str, location: str
) -> Experiment | None:
    """Return an experiment: the server's answer, if there is one, with requests of its room folded in."""
    name = theirs.name if theirs is not None else None
    tags = dict(theirs.tags) if theirs is not None else {}
    stage = theirs.lifecycle_stage if theirs is not None else LifecycleStage.ACTIVE
    created = theirs.creation_time if theirs is not None else None
    location = theirs.artifact_location if theirs is not None else location
    for request in requests:
        given = codec.loads(request.arguments)
        if request.operation == "create_experiment":
            if name is None:
                name, created = given["name"], request.time_ms
                tags = {**given.get("tags", {}), **tags}
        elif request.operation == "set_experiment_tag":
            tags[given["tag"].key] = given["tag"].value
        elif request.operation == "delete_experiment_tag":
            tags.pop(given["key"], None)
        elif request.operation == "rename_experiment":
            name = given["new_name"]
        elif request.operation == "delete_experiment":
            stage = LifecycleStage.DELETED
        elif request.operation == "restore_experiment":
            stage = LifecycleStage.ACTIVE
    if name is None:
        return None
    return Experiment(
        experiment_id=experiment_id,
        name=name,
        artifact_location=location,
        lifecycle_stage=stage,
        tags=[ExperimentTag(key, value) for key, value in tags.items()],
        creation_time=created,
        last_update_time=getattr(theirs, "last_update_time", None) or created,
    )
