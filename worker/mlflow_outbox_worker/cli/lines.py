"""Events as lines: JSON for programs, words for people."""

from __future__ import annotations

import json
import math
from typing import Any

import msgspec

from mlflow_outbox.counters import printable
from mlflow_outbox.spool.events import (
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
)
from mlflow_outbox_worker import wording

_KINDS: dict[type, str] = {
    RunStarted: "run_started",
    Metric: "metric",
    Metrics: "metrics",
    Params: "params",
    Tags: "tags",
    Artifact: "artifact",
    RunEnded: "run_ended",
    Request: "request",
    FileFor: "file_for",
}


def kind_of(event: Event) -> str:
    """Return the name of an event's kind."""
    return _KINDS.get(type(event), type(event).__name__)


def as_data(event: Event) -> dict[str, Any]:
    """Return an event as JSON can hold it; NaN and infinities, which JSON does not know, are texts."""
    fields: dict[str, Any] = {name: _plain(getattr(event, name)) for name in event.__struct_fields__}
    if isinstance(event, Request):
        fields["arguments"] = _decoded(event.arguments)
    return {"kind": kind_of(event), **fields}


def as_json(event: Event, **more: Any) -> str:
    """Return an event, with further fields, as one line of JSON."""
    return json.dumps({**as_data(event), **more}, allow_nan=False)


def dumps(data: Any, *, indent: int | None = None) -> str:
    """Return data as JSON; NaN and infinities, which JSON does not know, become texts."""
    return json.dumps(_plain(data), allow_nan=False, indent=indent)


def in_words(event: Event) -> str:
    """Return an event as a line for people."""
    if isinstance(event, Metric):
        return f"metric {printable(event.key)} = {event.value:g} at step {event.step}"
    if isinstance(event, Metrics):
        values = ", ".join(f"{printable(key)} = {value:g}" for key, value in event.values.items())
        return f"metrics {values} at step {event.step}"
    if isinstance(event, (Params, Tags)):
        name = "param" if isinstance(event, Params) else "tag"
        return f"{name} " + ", ".join(
            f"{printable(key)} = {printable(value, 60)}" for key, value in event.values.items()
        )
    if isinstance(event, Artifact):
        return f"artifact {printable(event.path)} ({wording.size(event.size)})"
    if isinstance(event, FileFor):
        return f"file {printable(event.path)} of {printable(event.owner)} ({wording.size(event.size)})"
    if isinstance(event, RunStarted):
        name = f" as {printable(event.run_name)}" if event.run_name else ""
        return ("run goes on" if event.resumed else "run begins") + name
    if isinstance(event, RunEnded):
        return f"run ends {printable(event.status)}"
    if isinstance(event, Request):
        return f"request {printable(event.operation)} {printable(event.arguments.decode(errors='replace'), 60)}"
    return kind_of(event)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _decoded(arguments: bytes) -> Any:
    try:
        return _plain(msgspec.json.decode(arguments))
    except (ValueError, RecursionError):  # no JSON, no UTF-8, nested too deeply
        return arguments.decode(errors="replace")
