"""MLflow's entities as JSON and back, for the arguments of calls that travel through the journal.

An entity is written as ``{"$": <class>, "v": <content>}``, and so are a float that JSON has no number for and an
object that looks like one of these itself. Content is the JSON form of the protobuf message that
MLflow itself sends, so it is complete and compatible between MLflow's versions; only metrics (floats that JSON has no
word for) and spans, whose message does not hold their trace's id, have a form of their own, a span's with what
OpenTelemetry says of the program (its resource) beside MLflow's; what people put into spans
and assessments may hold such floats too. Of a trace the message cuts texts, and of an assessment it knows neither the
run nor whole numbers, all of which a database takes: these are written as they are.

Only the classes named here are ever made from what is read.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from typing import Any, Final

from google.protobuf.json_format import (  # type: ignore[import-untyped]  # no stubs
    MessageToDict,
    ParseDict,
    ParseError,
    SerializeToJsonError,
)
from mlflow.entities import (
    DatasetInput,
    ExperimentTag,
    LoggedModelInput,
    LoggedModelOutput,
    LoggedModelParameter,
    LoggedModelTag,
    Metric,
    Param,
    RunTag,
    Span,
    TraceInfo,
)
from mlflow.entities.logged_model_status import LoggedModelStatus
from mlflow.protos import service_pb2
from opentelemetry.sdk.resources import Resource

_MESSAGES: Final[dict[str, tuple[Any, Any]]] = {
    "DatasetInput": (DatasetInput, service_pb2.DatasetInput),
    "LoggedModelInput": (LoggedModelInput, service_pb2.ModelInput),
    "LoggedModelOutput": (LoggedModelOutput, service_pb2.ModelOutput),
    "LoggedModelParameter": (LoggedModelParameter, service_pb2.LoggedModelParameter),
    "LoggedModelTag": (LoggedModelTag, service_pb2.LoggedModelTag),
}
_PAIRS: Final[dict[str, Any]] = {"RunTag": RunTag, "ExperimentTag": ExperimentTag, "Param": Param}
#: Bytes; arguments up to this are short.
_SHORT: Final = 4096
_MARKS: Final = {"$", "v"}
#: What OpenTelemetry says of itself with each span, and no store keeps.
_OF_THE_SDK: Final = "telemetry.sdk."
#: Of what else it says, bytes are left out: there is no word for them in JSON, and no store shows them.
_PLAIN: Final = (str, bool, int, float)
_METRIC: Final = ("key", "value", "timestamp", "step", "model_id", "dataset_name", "dataset_digest", "run_id")


def dumps(arguments: dict[str, Any]) -> bytes:
    """Return the arguments of a call as JSON.

    Raises:
        TypeError: a value is of a kind that cannot be written.
        ValueError: it holds itself, is too deep, or is none that MLflow's message takes.
    """
    try:
        return json.dumps({key: _encoded(value) for key, value in arguments.items()}, allow_nan=False).encode()
    except (ParseError, SerializeToJsonError) as error:  # which are no ValueErrors
        raise ValueError(str(error)) from None


def short(arguments: dict[str, Any]) -> bytes:
    """Return those of the arguments that are short, as JSON: ids and names, which say what the call is about."""
    parts = {key: json.dumps(_encoded(value), allow_nan=False) for key, value in arguments.items()}
    return json.dumps({key: json.loads(part) for key, part in parts.items() if len(part) <= _SHORT}).encode()


def loads(data: bytes | str) -> dict[str, Any]:
    """Return the arguments of a call from JSON.

    Raises:
        ValueError: it is no JSON, or not that of arguments.
    """
    try:
        return {key: _decoded(value) for key, value in json.loads(data).items()}
    except (TypeError, LookupError, AttributeError, RecursionError, ParseError) as error:
        msg = f"the arguments of a call are a JSON object with entities of MLflow in it, not this: {error}"
        raise ValueError(msg) from None


def _encoded(value: Any) -> Any:
    if isinstance(value, LoggedModelStatus):  # a string too
        return {"$": "LoggedModelStatus", "v": value.name}
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$": "float", "v": repr(value)}
    if isinstance(value, (list, tuple)):
        return [_encoded(item) for item in value]
    if isinstance(value, dict):
        content = {str(key): _encoded(item) for key, item in value.items()}
        return content if content.keys() != _MARKS else {"$": "dict", "v": content}
    return {"$": _name(value), "v": _content(value)}


def _name(value: Any) -> str:
    for base in type(value).__mro__:
        if base.__name__ in _NAMES:
            return base.__name__
    msg = f"a {type(value).__name__} cannot be written to the journal"
    raise TypeError(msg)


def _content(value: Any) -> Any:
    name = _name(value)
    if name == "Metric":
        return {field: _encoded(getattr(value, field, None)) for field in _METRIC}
    if name in _PAIRS:
        return {"key": value.key, "value": value.value}
    if name == "Span":
        return _encoded(_with_resource(value))
    if name == "TraceInfo":
        return _encoded(_uncut(value))
    if name == "Assessment":
        return _encoded(_as_given(value))
    return MessageToDict(value.to_proto(), preserving_proto_field_name=True)


def _with_resource(span: Span) -> dict[str, Any]:
    """MLflow's own form leaves out what databases make tags of the trace of: the name of the service, say."""
    form: dict[str, Any] = span.to_dict()
    resource = getattr(getattr(span, "_span", None), "resource", None)
    given = {
        key: value
        for key, value in (resource.attributes.items() if resource is not None else ())
        if not key.startswith(_OF_THE_SDK)
        and all(isinstance(one, _PLAIN) for one in (value if isinstance(value, tuple) else (value,)))
    }
    return {**form, "resource": given} if given else form


def _uncut(info: TraceInfo) -> dict[str, Any]:
    bare = copy.copy(info)
    bare.assessments = []
    whole: dict[str, Any] = bare.to_dict()
    for name in ("tags", "trace_metadata"):
        whole[name] = {key: str(text) for key, text in getattr(info, name).items()}
    whole["assessments"] = [_as_given(one) for one in info.assessments]
    return whole


def _as_given(assessment: Any) -> dict[str, Any]:
    try:
        given: dict[str, Any] = assessment.to_dictionary()
    except SerializeToJsonError:  # of a number that JSON has no word for, which a database takes
        given = _without_number(assessment).to_dictionary()
    for kind in ("feedback", "expectation"):
        if "value" in given.get(kind, ()):
            given[kind]["value"] = getattr(assessment, kind).value
    return given if assessment.run_id is None else {**given, "run_id": assessment.run_id}


def _without_number(assessment: Any) -> Any:
    found = copy.copy(assessment)
    for kind in ("feedback", "expectation"):
        held = getattr(found, kind)
        if held is not None:
            setattr(found, kind, dataclasses.replace(held, value=0.0))
    return found


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() != _MARKS:
        return {key: _decoded(item) for key, item in value.items()}
    return _made(value["$"], value["v"])


def _made(name: str, content: Any) -> Any:
    if name == "float":
        return float(content)
    if name == "dict":
        return {key: _decoded(item) for key, item in content.items()}
    if name == "Metric":
        return Metric(**{field: _decoded(content[field]) for field in _METRIC if field in content})
    if name in _PAIRS:
        return _PAIRS[name](content["key"], content["value"])
    if name == "Span":
        form = _decoded(content)
        span = Span.from_dict(form)
        if form.get("resource"):
            span._span._resource = Resource(form["resource"])
        return span
    if name == "LoggedModelStatus":
        return LoggedModelStatus[content]
    if name == "TraceInfo":
        info = TraceInfo.from_dict(_decoded(content))
        for assessment, given in zip(info.assessments, content.get("assessments") or (), strict=True):
            assessment.run_id = given.get("run_id")
        return info
    if name == "Assessment":
        from mlflow.entities import Assessment

        assessment = Assessment.from_dictionary(_decoded(content))
        assessment.run_id = content.get("run_id")
        return assessment
    if name in _MESSAGES:
        entity, message = _MESSAGES[name]
        return entity.from_proto(ParseDict(content, message(), ignore_unknown_fields=True))
    msg = f"{name!r} is no entity that a journal holds"
    raise ValueError(msg)


_NAMES: Final = frozenset({*_MESSAGES, *_PAIRS, "Metric", "Span", "LoggedModelStatus", "TraceInfo", "Assessment"})
