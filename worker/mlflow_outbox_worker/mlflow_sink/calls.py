"""Calls of the tracking store's own methods, with arguments from a journal."""

from __future__ import annotations

import re
from typing import Any

from mlflow.tracing.utils.otlp import MLFLOW_EXPERIMENT_ID_HEADER, OTLP_TRACES_PATH, resource_to_otel_proto
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from mlflow_outbox.plugin import codec
from mlflow_outbox.spool.provisional import MODEL_ID_TAG
from mlflow_outbox_worker.mlflow_sink import trace_files
from mlflow_outbox_worker.mlflow_sink.artifacts import LEAST_UPLOAD_RATE, Artifacts
from mlflow_outbox_worker.mlflow_sink.rest import DatabricksStore, ServerStore, checked
from mlflow_outbox_worker.sink import OPERATIONS, RemoteModel

#: What a tracking server answers to spans that it does not take; MLflow's client has them in a file there, too. The
#: words of 501 are of one whose own store keeps none, those of 404 are Flask's, which has no such address: they come
#: from a server before 3.4, and from any that gunicorn or waitress serves.
_NO_SPANS = {501: b"span logging is not supported", 404: b"The requested URL was not found on the server"}


def call(store: Any, operation: str, arguments: str, artifacts: Artifacts | None = None) -> str:
    """Call one method; return the id of the model that it created, or "".

    Args:
        store: MLflow's.
        operation: the method.
        arguments: as JSON.
        artifacts: where spans go that the store keeps as files; None where that is not asked for.

    Raises:
        ValueError: the operation is not one that a journal may ask for, or its arguments cannot be read.
    """
    if operation not in OPERATIONS:
        msg = f"{operation!r} is no operation that a journal may ask for"
        raise ValueError(msg)
    given = codec.loads(arguments)
    if operation == "log_spans" and isinstance(store, ServerStore):
        _log_spans(store, artifacts, **given)
        return ""
    try:
        if operation == "log_spans" and isinstance(store, DatabricksStore):
            raise NotImplementedError  # MLflow's store takes spans for a table of Unity Catalog, not an experiment
        answer = getattr(store, operation)(**given)
    except NotImplementedError as error:  # raised by MLflow's file store, which has no traces of this kind
        msg = f"the store has no {operation}"
        raise ValueError(msg) from error
    except (AttributeError, LookupError) as error:  # MLflow's own stores take apart whatever they are given
        if isinstance(store, ServerStore):
            raise
        msg = f"{operation} with such arguments: {type(error).__name__}: {error}"
        raise ValueError(msg) from error
    return str(answer.model_id) if operation == "create_logged_model" else ""


def find_models(store: Any, experiment_id: str, local_id: str) -> dict[str, RemoteModel]:
    """Return by their ids the logged models that carry the outbox's id for one."""
    if not re.fullmatch(r"[\w.-]+", local_id):
        return {}
    found = store.search_logged_models([experiment_id], filter_string=f"tags.`{MODEL_ID_TAG}` = '{local_id}'")
    return {str(model.model_id): RemoteModel(str(model.status), model.source_run_id or "") for model in found}


def artifact_location(store: Any, kind: str, subject: str) -> str:
    """Return the artifact URI of a "run", a "model" or an "experiment"."""
    if kind == "run":
        return str(store.get_run(subject).info.artifact_uri)
    if kind == "model":
        return str(store.get_logged_model(subject).artifact_location)
    return str(store.get_experiment(subject).artifact_location)


def _log_spans(store: ServerStore, artifacts: Artifacts | None, location: str, spans: list[Any]) -> None:
    """Send spans in one attempt; MLflow's own store asks for the server's version first and then tries for minutes."""
    request = ExportTraceServiceRequest()
    resource = request.resource_spans.add()
    resource.resource.CopyFrom(resource_to_otel_proto(getattr(spans[0]._span, "resource", None)))
    resource.scope_spans.add().spans.extend(span.to_otel_proto() for span in spans)
    content = request.SerializeToString()
    answer = store.transport.request(
        store.get_host_creds(),
        "POST",
        OTLP_TRACES_PATH,
        allowance=len(content) / LEAST_UPLOAD_RATE,
        data=content,
        extra_headers={"Content-Type": "application/x-protobuf", MLFLOW_EXPERIMENT_ID_HEADER: location},
    )
    words = _NO_SPANS.get(answer.status)
    if words is not None and words in answer.body and artifacts is not None:
        trace_files.keep(store, artifacts, location, spans)
    elif answer.status >= 300:
        checked(answer, f"POST {OTLP_TRACES_PATH}")
