"""What a data profile, an experiment's result and a session's final state become in MLflow.

Three pure functions return a ``RunContent`` each; the tracker logs it. Objects are read structurally (attributes or
mapping access), so that any of a session's classes will do, and nothing that they raise gets out: a missing field is
not logged, an unreadable one is listed in ``RunContent.refused``, and all the others are logged.

===============  ==============================================  =======================================================
run              params, metrics, tags                           artifacts
===============  ==============================================  =======================================================
data_profile     n_rows, n_columns, n_numeric_features,          data_profile.json
                 n_categorical_features, target_column,
                 target_type; total_missing_values
<experiment>     model_type, iteration, model_<param>,           the code file, reasoning.txt, error.txt when it failed
                 preprocessing_missing, preprocessing_scaling,
                 preprocessing_encoding; its metrics when it
                 succeeded, execution_time, success; tags
                 hypothesis, success
final_summary    total_iterations, successful_experiments,       final_state.json
                 total_time_seconds, best_metric; tags
                 best_experiment, termination_reason, phase
===============  ==============================================  =======================================================
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import inspect
import math
import numbers
import os
from collections.abc import Callable, Mapping
from typing import Any, Final

from mlflow_outbox import times
from mlflow_outbox.jsontext import Reader

#: Characters of a hypothesis that its tag shows; the whole text is usually part of the reasoning.
HYPOTHESIS_CHARS: Final = 250
PROFILE_RUN: Final = "data_profile"
SUMMARY_RUN: Final = "final_summary"

#: A time given as a number is in seconds up to here (the year 5138), and in milliseconds above (from March 1973).
_MOST_SECONDS: Final = 1e11
#: Milliseconds at the end of the year 9999; MLflow refuses times before 1970.
_MOST_MS: Final = 253_402_300_799_999
_FALSE_WORDS: Final = frozenset({"", "0", "false", "no", "none"})


@dataclasses.dataclass(frozen=True)
class RunContent:
    """All that one run gets, as arguments of the calls of ``Run``.

    Attributes:
        run_name: its name.
        params: text by name.
        metrics: values as the session gave them; one that is no number is left for ``Run`` to refuse.
        tags: text by name.
        texts: artifact files by name, with their text.
        files: pairs of a file's path and the artifact folder it goes to, None for the root.
        status: "FINISHED", or "FAILED" for an experiment that failed: that is an outcome, too.
        start_time_ms: milliseconds since the epoch; None means the time of the call. The same for ``end_time_ms``.
        refused: what could not be read, and why.
    """

    run_name: str
    params: dict[str, object] = dataclasses.field(default_factory=dict)
    metrics: dict[str, object] = dataclasses.field(default_factory=dict)
    tags: dict[str, str] = dataclasses.field(default_factory=dict)
    texts: dict[str, str] = dataclasses.field(default_factory=dict)
    files: list[tuple[str, str | None]] = dataclasses.field(default_factory=list)
    status: str = "FINISHED"
    start_time_ms: int | None = None
    end_time_ms: int | None = None
    refused: list[tuple[str, str]] = dataclasses.field(default_factory=list)


def of_profile(profile: Any) -> RunContent:
    """Return what a DataProfile becomes: the run ``data_profile``.

    Args:
        profile: any object with the fields of a profile.

    Raises:
        TypeError: it is nothing that could have fields.
    """
    _check(profile)
    reader = Reader()
    content = RunContent(PROFILE_RUN, refused=reader.refused)
    fields = {
        "n_rows": reader.field(profile, "n_rows"),
        "n_columns": reader.field(profile, "n_columns"),
        "n_numeric_features": _count(reader, profile, "numeric_columns"),
        "n_categorical_features": _count(reader, profile, "categorical_columns"),
        "target_column": reader.field(profile, "target_column"),
        "target_type": reader.field(profile, "target_type"),
    }
    _put_texts(reader, content.params, fields)
    missing = reader.field(profile, "missing_values")
    _put(content.metrics, {"total_missing_values": None if missing is None else _total(reader, missing)})
    _put(content.texts, {"data_profile.json": reader.json_text(profile, "data_profile.json")})
    return content


def of_experiment(result: Any) -> RunContent:
    """Return what an ExperimentResult becomes: a run of the experiment's name.

    It starts at ``timestamp`` less ``execution_time`` and ends at ``timestamp``; both are that time when only
    ``timestamp`` is there. A result that does not say whether it succeeded did when it has no error message. The file
    at ``model_path`` and ``preprocessing.target_transform`` are not logged: a model belongs to MLflow's model calls,
    and the transform is part of the generated code and of the final state.

    Args:
        result: any object with the fields of a result.

    Raises:
        TypeError: it is nothing that could have fields.
    """
    _check(result)
    reader = Reader()
    iteration = _text_field(reader, result, "iteration")
    success, error = _outcome(reader, result)
    execution_time = reader.attempt("execution_time", times.seconds, reader.field(result, "execution_time"))
    start_ms, end_ms = _span(reader, result, execution_time)
    name = _text_field(reader, result, "experiment_name")
    content = RunContent(
        run_name=name or (f"experiment_{iteration}" if iteration else "experiment"),
        status="FINISHED" if success else "FAILED",
        start_time_ms=start_ms,
        end_time_ms=end_ms,
        refused=reader.refused,
    )
    _put_params(reader, content.params, result, iteration)
    if success:
        metrics = reader.items(reader.field(result, "metrics"), "metrics")
        _put(content.metrics, {key: value for key, value in metrics.items() if value is not None})
    _put(content.metrics, {"execution_time": execution_time, "success": int(success)})
    hypothesis = _text_field(reader, result, "hypothesis")
    _put(content.tags, {"hypothesis": hypothesis and hypothesis[:HYPOTHESIS_CHARS], "success": str(success)})
    reasoning = _text_field(reader, result, "reasoning")
    _put(content.texts, {"reasoning.txt": reasoning, "error.txt": None if success else error})
    code_path = reader.field(result, "code_path")
    code_file = None if code_path is None else reader.attempt("code_path", os.fsdecode, code_path)
    if code_file:
        content.files.append((code_file, None))
    return content


def of_summary(state: Any) -> RunContent:
    """Return what a final ExperimentState becomes: the run ``final_summary``.

    Args:
        state: any object with the fields of a state.

    Raises:
        TypeError: it is nothing that could have fields.
    """
    _check(state)
    reader = Reader()
    content = RunContent(SUMMARY_RUN, refused=reader.refused)
    experiments = reader.field(state, "experiments")
    results = None if experiments is None else reader.attempt("experiments", _results, experiments)
    metrics = {
        "total_iterations": reader.field(state, "current_iteration"),
        "successful_experiments": None if results is None else sum(_outcome(reader, result)[0] for result in results),
        "total_time_seconds": _elapsed(reader, state),
        "best_metric": reader.field(state, "best_metric"),
    }
    _put(content.metrics, metrics)
    best = _worded(reader, state, "best_experiment", "none")
    if not isinstance(best, str):  # sessions keep the name, or the whole result
        best = reader.field(best, "experiment_name", default=best, what="best_experiment")
    tags = {
        "best_experiment": best,
        "termination_reason": _worded(reader, state, "termination_reason", "completed"),
        "phase": reader.field(state, "phase"),
    }
    _put_texts(reader, content.tags, tags)
    _put(content.texts, {"final_state.json": reader.json_text(state, "final_state.json")})
    return content


def _check(thing: Any) -> None:
    """Raise a TypeError for what has no fields at all, of which a run would say that all is well."""
    is_list = isinstance(thing, (list, tuple, set, frozenset)) and not hasattr(thing, "_fields")
    is_scalar = thing is None or isinstance(thing, (str, bytes, bytearray, int, float, type))
    if is_list or is_scalar or inspect.isawaitable(thing) or inspect.isgenerator(thing) or inspect.isroutine(thing):
        msg = f"it is a {type(thing).__name__}; give an object, or a mapping, that has the fields"
        raise TypeError(msg)


def _results(experiments: Any) -> list[Any]:
    return list(experiments.values() if isinstance(experiments, Mapping) else experiments)


def _put(target: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Add the values that are there."""
    target.update((key, value) for key, value in values.items() if value is not None)


def _put_texts(reader: Reader, target: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Add the values that are there, as MLflow writes them."""
    _put(target, {key: reader.text(value, key) for key, value in values.items() if value is not None})


def _put_params(reader: Reader, target: dict[str, Any], result: Any, iteration: str | None) -> None:
    _put(target, {"model_type": _text_field(reader, result, "model_type"), "iteration": iteration})
    for key, value in reader.items(reader.field(result, "model_params"), "model_params").items():
        if f"model_{key}" in target:
            reader.refuse(f"model_params.{key}", f"the param model_{key} holds the model's own {key}")
        else:  # here None is a value: max_depth=None is a choice
            _put(target, {f"model_{key}": reader.text(value, f"model_params.{key}")})
    preprocessing = reader.field(result, "preprocessing")
    for key, name in (("missing", "missing_values"), ("scaling", "scaling"), ("encoding", "encoding")):
        value = reader.field(preprocessing, name, what=f"preprocessing.{name}")
        _put_texts(reader, target, {f"preprocessing_{key}": value})


def _text_field(reader: Reader, thing: Any, name: str) -> str | None:
    """Return a field as text, or None when it is missing, unreadable or empty."""
    value = reader.field(thing, name)
    return None if value is None else reader.text(value, name) or None


def _worded(reader: Reader, thing: Any, name: str, without: str) -> Any:
    """Return a field, or the word for its absence, also where it is an empty text."""
    found = reader.field(thing, name, default=without)
    return without if isinstance(found, str) and not found else found


def _total(reader: Reader, missing: Any) -> int | None:
    """Return how many values are missing: counts by column, or their sum."""
    if isinstance(missing, numbers.Number):
        return _int(reader, lambda: missing)
    before = len(reader.refused)
    counts = reader.items(missing, "missing_values").values()
    if not counts and len(reader.refused) > before:
        return None
    return _int(reader, lambda: sum(counts))


def _int(reader: Reader, number: Callable[[], Any]) -> int | None:
    found: int | None = reader.attempt("missing_values", lambda: int(number()))
    return found


def _count(reader: Reader, thing: Any, name: str) -> int | None:
    names = reader.field(thing, name)
    return None if names is None else reader.attempt(name, len, names)


def _outcome(reader: Reader, result: Any) -> tuple[bool, str | None]:
    """Return whether an experiment succeeded, and its error message; a message alone says that it failed."""
    error = _text_field(reader, result, "error_message")
    said = reader.field(result, "success")
    if said is not None:
        said = reader.attempt("success", _truth, said)
    return (not error if said is None else said), error


def _truth(value: Any) -> bool:
    """Return a bool, numpy's too, or the word for one as CSV and JSON files have it."""
    return value.strip().lower() not in _FALSE_WORDS if isinstance(value, str) else bool(value)


def _elapsed(reader: Reader, state: Any) -> Any:
    """Return seconds from the state's own clock, else from its start to its end."""
    method = reader.field(state, "get_elapsed_time")
    elapsed = reader.attempt("get_elapsed_time", method) if callable(method) else None
    if elapsed is not None:
        return reader.attempt("get_elapsed_time", times.seconds, elapsed)
    start, end = _time_field(reader, state, "start_time"), _time_field(reader, state, "end_time")
    return None if start is None or end is None else (end - start) / 1000


def _span(reader: Reader, result: Any, execution_time: Any) -> tuple[int | None, int | None]:
    """Return when an experiment started and ended, in milliseconds since the epoch."""
    end_ms = _time_field(reader, result, "timestamp")
    if end_ms is None or execution_time is None:
        return end_ms, end_ms
    duration_ms = reader.attempt("execution_time", lambda: float(execution_time) * 1000)
    if duration_ms is None or not 0 <= duration_ms <= end_ms:  # NaN is neither
        return end_ms, end_ms
    return end_ms - round(duration_ms), end_ms


def _time_field(reader: Reader, thing: Any, name: str) -> int | None:
    value = reader.field(thing, name)
    answer = None if value is None else reader.attempt(name, time_ms, value)
    return None if answer is None else int(answer)


def time_ms(value: Any) -> int:
    """Return a point in time as milliseconds since the epoch.

    Args:
        value: a datetime (without a zone: local time), a date, an ISO 8601 text, a numpy time, or a number of
            seconds, or of milliseconds when it is larger than 1e11.

    Raises:
        ValueError: it lies outside the years 1970 to 9999, or is a text that is no time.
        TypeError: it is none of these.
    """
    if isinstance(value, bool):
        msg = f"{value} is no time"
        raise TypeError(msg)
    if isinstance(value, str) or times.is_numpy_time(value):
        value = _parsed_time(str(value).strip())
    if isinstance(value, dt.datetime):
        milliseconds = times.wall_clock(value).timestamp() * 1000
    elif isinstance(value, dt.date):
        milliseconds = dt.datetime.combine(value, dt.time.min).timestamp() * 1000
    else:
        number = float(value)
        milliseconds = number if abs(number) > _MOST_SECONDS else number * 1000
    if not (math.isfinite(milliseconds) and 0 <= milliseconds <= _MOST_MS):
        msg = "the time is outside the years 1970 to 9999"
        raise ValueError(msg)
    return round(milliseconds)


def _parsed_time(text: str) -> dt.datetime | float:
    """Parse a number, or ISO 8601."""
    try:
        return float(text)
    except ValueError:
        return times.parsed(text)
