"""The runs of the plugin's store: made online first, then written to the journal."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from typing import Any, Final

from mlflow.entities import LoggedModelOutput, Metric, Run, RunInfo, RunStatus, RunTag
from mlflow.exceptions import MlflowException
from mlflow.protos import service_pb2
from mlflow.protos.databricks_pb2 import BAD_REQUEST, RESOURCE_DOES_NOT_EXIST
from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_MODELS, MLFLOW_RUN_NAME, MLFLOW_USER
from mlflow.utils.name_utils import _generate_random_name
from mlflow.utils.validation import (
    _validate_batch_log_data,
    _validate_batch_log_limits,
    _validate_dataset_inputs,
    _validate_metric,
    _validate_param,
    _validate_param_keys_unique,
    _validate_tag,
)

from mlflow_outbox.plugin import links, model_points, reads
from mlflow_outbox.plugin.base import LATER, not_active
from mlflow_outbox.plugin.ids import NotYet
from mlflow_outbox.plugin.journals import OpenRun, now_ms, say_once
from mlflow_outbox.plugin.run_reads import RunReads
from mlflow_outbox.plugin.wrapped import Away
from mlflow_outbox.spool import provisional
from mlflow_outbox.spool.events import Metric as MetricEvent
from mlflow_outbox.spool.events import Metrics, Params, RunEnded, RunStarted, Tags

_GOING_ON: Final = frozenset({"RUNNING", "SCHEDULED"})


class Runs(RunReads):
    """Runs of one tracking URI."""

    # -- life

    def create_run(
        self, experiment_id: str, user_id: str, start_time: int, tags: Sequence[Any], run_name: str | None
    ) -> Run:
        """Create a run: by the server if it answers in time, else here, with a provisional id.

        The tags are for the server to judge: at a creation MLflow's stores keep keys and lengths that they refuse, or
        cut, in a tag that is set later.

        Raises:
            TypeError: a tag is no text, and MLflow's client sends nothing else.
            MlflowException: the server said no, the experiment is known to be deleted, or the run has two names.
        """
        experiment_id = str(experiment_id)
        if start_time is not None:
            start_time = self.integers.whole(start_time, service_pb2.CreateRun, "start_time")
        given = list(tags or ())
        if not self.integers.embedded:
            for tag in given:
                tag.to_proto()
        named = next((tag.value for tag in given if tag.key == MLFLOW_RUN_NAME), None)
        if run_name and named and run_name != named:
            raise MlflowException.invalid_parameter_value(
                "Both 'run_name' argument and 'mlflow.runName' tag are specified, but with different values "
                f"(run_name='{run_name}', mlflow.runName='{named}')."
            )
        if self.is_gone(experiment_id):  # which the server may not have heard of yet
            raise not_active("experiment", experiment_id)
        local = provisional.new_run_id()
        attempted = False
        try:
            remote = self.ids.remote(experiment_id)
            sent = [RunTag(tag.key, self.ids.outgoing(tag.value)) for tag in given]
            sent.append(RunTag(provisional.RUN_ID_TAG, local))
            run = self.server.ask(
                lambda store: store.create_run(remote, user_id, start_time, sent, run_name), quick=True
            )
        except NotYet:
            pass
        except Away as away:
            attempted = away.sent
        else:
            return self._adopted(run, experiment_id)
        self.refuse_deleted(experiment_id)
        return self._begun_here(local, experiment_id, start_time, given, run_name or named, attempted=attempted)

    def _adopted(self, run: Run, experiment_id: str) -> Run:
        """Begin the journal of a run that the server made."""
        run_id = run.info.run_id
        self.ids.remember(run_id)
        opened = self.journals.open(run_id, self.experiment_name(experiment_id))
        tags = {key: _text(value) for key, value in run.data.tags.items() if key != provisional.RUN_ID_TAG}
        opened.append(
            RunStarted(
                now_ms(),
                run.info.run_name,
                tags.get(MLFLOW_USER, ""),
                tags,
                False,
                run.info.experiment_id,
                given_ms=run.info.start_time or None,
            )
        )
        run.data._tags.pop(provisional.RUN_ID_TAG, None)
        run.info._artifact_uri = self.shown_uri("run", run_id, run.info.artifact_uri)
        return run

    def _begun_here(
        self,
        local: str,
        experiment_id: str,
        start_time: int | None,
        tags: list[Any],
        name: str | None,
        *,
        attempted: bool,
    ) -> Run:
        name = name or _generate_random_name()
        texts = {str(tag.key): _text(tag.value) for tag in tags}
        texts.setdefault(MLFLOW_RUN_NAME, name)
        opened = self.journals.open(local, self.experiment_name(experiment_id))
        opened.begun = RunStarted(
            now_ms(),
            name,
            texts.get(MLFLOW_USER, ""),
            texts,
            False,
            experiment_id,
            attempted,
            start_time or None,
        )
        opened.append(opened.begun)
        say_once(
            self.outbox,
            "provisional",
            f"{self.server.uri} does not answer, so the run {name} begins offline as {local}; "
            "it is delivered under an id of the server's, and both ids are accepted here for ever",
        )
        return self.get_run(local)

    def update_run_info(self, run_id: str, run_status: Any, end_time: int | None, run_name: str | None) -> RunInfo:
        """Set status, end time and name.

        Raises:
            TypeError: the time is none that MLflow takes.
            MlflowException: there is no such run.
        """
        if end_time is not None:
            end_time = self.integers.whole(end_time, service_pb2.UpdateRun, "end_time")
        run = self.active(run_id)
        if run_name:
            run.request("update_run_info", run_id=run.run_id, run_status=None, end_time=None, run_name=run_name)
        if run_status is not None:
            status = RunStatus.to_string(run_status)
            run.append(RunEnded(status, now_ms(), end_time or None))
            if status not in _GOING_ON:
                self.journals.close(run.run_id)
        local = self.local_run(run.run_id)
        if local is None:  # nothing could be written, which was said
            return RunInfo(
                run_id, "0", "", "RUNNING", now_ms(), None, "active", self._uri(run.run_id), run_name=run_name
            )
        if run_status is not None and status not in _GOING_ON and local.view.experiment_id:
            with contextlib.suppress(NotYet):  # it has no address yet
                experiment = self.ids.remote(local.view.experiment_id)
                links.show(self.server.uri, experiment, self.ids.remote(run.run_id), local.view)
        return reads.local_run_of(local, run_id, self._uri(run.run_id)).info

    def delete_run(self, run_id: str) -> None:
        """Mark a run deleted.

        Raises:
            MlflowException: there is no such run.
        """
        run = self.writable(run_id)
        run.request("delete_run", run_id=run.run_id)
        self._deleted.add(run.run_id)

    def restore_run(self, run_id: str) -> None:
        """Restore a deleted run.

        Raises:
            MlflowException: there is no such run.
        """
        run = self.writable(run_id)
        run.request("restore_run", run_id=run.run_id)

    # -- writing

    def log_batch(self, run_id: str, metrics: Sequence[Metric], params: Sequence[Any], tags: Sequence[Any]) -> None:
        """Log metrics, params and tags.

        Raises:
            MlflowException: there is no such run, one of the items is none that MLflow takes, or a param has another
                value.
        """
        try:
            metrics = [self.integers.point(metric, service_pb2.Metric) for metric in metrics]
        except MlflowException:
            _validate_batch_log_data(metrics, params, tags)  # as a rule it refuses the same, and says which of them
            raise
        checked = _validate_batch_log_data(metrics, params, tags)
        metrics, params, tags = checked if checked is not None else (metrics, params, tags)
        _validate_batch_log_limits(metrics, params, tags)
        _validate_param_keys_unique(params)
        self._log(run_id, metrics, params, tags)

    def _log(self, run_id: str, metrics: Sequence[Metric], params: Sequence[Any], tags: Sequence[Any]) -> None:
        """Log what was validated, which says each time what it cuts."""
        run = self.active(run_id)
        for model_id in {model_id for metric in metrics if (model_id := getattr(metric, "model_id", None))}:
            self.name_of_model_home(model_id)  # refuses one that is not there
        self._check_params(run, params)
        if params:
            values = {param.key: str(param.value) for param in params}
            run.params.update(values)
            run.append(Params(values, now_ms()))
        self._log_points(run, metrics)
        if tags:
            run.append(Tags({tag.key: str(tag.value) for tag in tags}, now_ms()))

    @staticmethod
    def _check_params(run: OpenRun, params: Sequence[Any]) -> None:
        for param in params:
            held = run.params.get(param.key)
            if held is not None and held != str(param.value):
                raise MlflowException.invalid_parameter_value(
                    f"Changing param values is not allowed. Param with key='{param.key}' was already logged with "
                    f"value='{held}' for run ID='{run.run_id}'. Attempted logging new value '{param.value}'."
                )

    def _log_points(self, run: OpenRun, metrics: Sequence[Metric]) -> None:
        linked: list[Metric] = []
        groups: dict[tuple[int, int], dict[str, float]] = {}
        for metric in metrics:
            if model_points.is_linked(metric):
                linked.append(model_points.with_float(metric))
                continue
            group = groups.setdefault((metric.timestamp, metric.step), {})
            if metric.key in group:
                run.append(MetricEvent(metric.key, float(metric.value), metric.timestamp, metric.step))
            else:
                group[metric.key] = float(metric.value)
        for (time_ms, step), values in groups.items():
            if len(values) == 1:
                ((key, value),) = values.items()
                run.append(MetricEvent(key, value, time_ms, step))
            else:
                run.append(Metrics(values, time_ms, step))
        if linked:
            self._models_have_metrics = True
            keeps_all = self.outbox.destination.scheme == "file"
            taken = linked if keeps_all else model_points.taken(run, linked)
            run.request("log_batch", run_id=run.run_id, metrics=taken, params=[], tags=[])

    def log_metric(self, run_id: str, metric: Metric) -> None:
        """Log one metric point; see ``log_batch``."""
        try:
            metric = self.integers.point(metric, service_pb2.LogMetric)
        except MlflowException:
            _validate_metric(metric.key, metric.value, metric.timestamp, metric.step)  # as above
            raise
        _validate_metric(metric.key, metric.value, metric.timestamp, metric.step)
        run = self.active(run_id)
        if model_points.is_linked(metric):
            if metric.model_id:
                self.name_of_model_home(metric.model_id)  # refuses one that is not there
            self._log_points(run, [metric])
        else:  # what a training loop does all the time
            run.append(MetricEvent(metric.key, float(metric.value), metric.timestamp, metric.step))

    def log_param(self, run_id: str, param: Any) -> Any:
        """Log one param; see ``log_batch``."""
        self._log(run_id, [], [_validate_param(param.key, param.value)], [])
        return param

    def set_tag(self, run_id: str, tag: Any) -> None:
        """Set one tag; see ``log_batch``."""
        self._log(run_id, [], [], [_validate_tag(tag.key, tag.value)])

    def delete_tag(self, run_id: str, key: str) -> None:
        """Delete a tag.

        Raises:
            MlflowException: the run has no such tag.
        """
        local_id = self.writable(run_id).run_id
        try:
            found = self.run_as_known(run_id)
        except MlflowException as error:
            if error.error_code != LATER:
                raise
        else:
            self._check_active(found)
            # Somebody may have set it meanwhile where it cannot be asked for, nor is all of the run on disk.
            is_known = not self.server.was_away() or self.began_here("run", local_id)
            if key not in found.data.tags and is_known:
                msg = f"No tag with name: {key} in run with id {run_id}"
                raise MlflowException(msg, error_code=RESOURCE_DOES_NOT_EXIST)
        run = self.active(run_id)
        run.request("delete_tag", run_id=run.run_id, key=key)

    def log_inputs(self, run_id: str, datasets: Any = None, models: Any = None) -> None:
        """Log datasets and models that a run reads.

        Raises:
            MlflowException: one of them is none that MLflow takes.
        """
        if datasets:
            _validate_dataset_inputs(datasets)
            if self.outbox.destination.scheme != "file":  # which keeps the last one
                _check_tags_of_datasets(datasets)
        run = self.active(run_id)
        run.request("log_inputs", run_id=run.run_id, datasets=list(datasets or ()), models=list(models or ()))

    def log_outputs(self, run_id: str, models: Any) -> None:
        """Log models that a run makes.

        Raises:
            MlflowException: it is known to have made one of them already, which a database does not take twice.
        """
        made = [
            LoggedModelOutput(model.model_id, self.integers.whole(model.step, service_pb2.ModelOutput, "step"))
            for model in models
        ]
        run = self.active(run_id)
        ids = [model.model_id for model in made]
        if self.outbox.destination.scheme != "file" and (len({*ids}) < len(ids) or run.outputs & {*ids}):
            msg = f"Run with ID='{run.run_id}' has one of these models as an output already: {', '.join(ids)}."
            raise MlflowException(msg, error_code=BAD_REQUEST)
        run.request("log_outputs", run_id=run.run_id, models=made)
        run.outputs.update(ids)

    def record_logged_model(self, run_id: str, mlflow_model: Any) -> None:
        """Add a model to the run's history of models, which is a tag."""
        held = self.get_run(run_id).data.tags.get(MLFLOW_LOGGED_MODELS)
        history = [*(json.loads(held) if held else ()), mlflow_model.get_tags_dict()]
        self.set_tag(run_id, RunTag(MLFLOW_LOGGED_MODELS, json.dumps(history)))


def _check_tags_of_datasets(datasets: Any) -> None:
    """Refuse two tags of one name, which a database does not take: of a dataset that is named twice the first counts.

    Raises:
        MlflowException: there are such.
    """
    first = {(one.dataset.name, one.dataset.digest): one for one in reversed(list(datasets))}
    for one in first.values():
        keys = [tag.key for tag in one.tags or ()]
        if len({*keys}) < len(keys):
            msg = f"The dataset '{one.dataset.name}' has two tags of one name: {', '.join(keys)}."
            raise MlflowException(msg, error_code=BAD_REQUEST)


def _text(value: Any) -> str:
    return "" if value is None else str(value)
