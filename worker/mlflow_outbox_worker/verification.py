"""Reading back: does MLflow hold what the run's events say?

"latest" compares what one request tells (status, params, tags, the latest point of each metric) and lists the
artifacts with their sizes; "full" compares every point of every metric too. What others did to the run in the
meantime is no difference: a later point, another value of a tag, further params, what a program has added to a file in
its place (``placement``). What MLflow changes by rule is none
either: it cuts long values, and its SQL stores hold infinities as the largest finite number (facts, 2a), and zero
without its sign.

Artifacts are told apart from the rest. Delivery goes on only when an upload was answered with success, so one that is
absent or another later was changed by others, or lost by the store: nothing there says which. What becomes of either is
decided by ``finish``.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import posixpath
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from mlflow_outbox.counters import printable
from mlflow_outbox.settings import VerifyLevel
from mlflow_outbox.spool import placement
from mlflow_outbox.spool.artifact_path import stored_names
from mlflow_outbox.spool.events import (
    MAX_PARAM_CHARS,
    Artifact,
    Event,
    Metric,
    Metrics,
    Params,
    RunEnded,
    Tags,
    decode,
)
from mlflow_outbox.spool.reader import RunReader
from mlflow_outbox.spool.window import Cursor
from mlflow_outbox.views import File, Latest, RunView
from mlflow_outbox_worker.outcome import classify
from mlflow_outbox_worker.records import DeadLetter
from mlflow_outbox_worker.sink import MetricPoint, RemoteRun, Sink, SinkError

#: Differences named in one message.
_NAMED: Final = 5
_CHUNK: Final = 1024 * 1024
#: What makes two points of a metric one: value, time and step.
_Identity = tuple[str, int, int]


def differences(
    sink: Sink,
    remote_id: str,
    view: RunView,
    letters: Collection[DeadLetter],
    level: VerifyLevel,
    *,
    reader: RunReader,
) -> list[str]:
    """Return what MLflow lacks of a run, its artifacts aside, one sentence each; empty when it holds everything.

    Args:
        sink: the tracking store.
        remote_id: the run's id there.
        view: the run as its events describe it.
        letters: its dead letters, which MLflow is not expected to hold.
        level: how deep to look.
        reader: the run's segments, for "full", and for what else there is of metrics with dead letters.

    Raises:
        SinkError: MLflow could not be asked.
    """
    if level == "off":
        return []
    run = sink.get_run(remote_id)
    excused = _excused(letters)
    points = _excused_points(letters)
    found = [*_of_run(run, view, _expected_metrics(view, reader, points), excused)]
    if level == "full":
        found += _of_history(sink, remote_id, reader, points)
    return found


class Altered(NamedTuple):
    """An artifact that MLflow does not hold as it was stored there, and that in a sentence."""

    path: str
    absent: bool
    sentence: str


def altered_artifacts(sink: Sink, remote_id: str, view: RunView, letters: Collection[DeadLetter]) -> list[Altered]:
    """Return which artifacts are absent or have another size than was logged.

    Args:
        sink: the tracking store.
        remote_id: the run's id there.
        view: the run as its events describe it.
        letters: its dead letters.

    Raises:
        SinkError: MLflow could not be asked.
    """
    excused = _excused(letters)
    folders: dict[str, dict[str, int | None]] = {}
    found = []
    for path, file in view.artifacts.items():
        if ("artifact", path) in excused:
            continue
        folder = posixpath.dirname(path)
        if folder not in folders:
            folders[folder] = sink.list_artifacts(remote_id, folder)
        held = next((name for name in stored_names(path) if name in folders[folder]), None)
        if held is None:
            found.append(Altered(path, absent=True, sentence=f"the artifact {printable(path)!r} is missing"))
            continue
        size = folders[folder][held]
        if size is not None and size != file.size and not placement.is_recent(file.placed):
            sentence = f"the artifact {printable(path)!r} has {size} bytes, not {file.size}"
            found.append(Altered(path, absent=False, sentence=sentence))
    return found


def settled_artifacts(view: RunView, altered: Collection[Altered], letters: Collection[DeadLetter]) -> dict[str, File]:
    """Return the artifacts that MLflow holds, in whatever form, marked so that they are not sent once more.

    Args:
        view: the run as its events describe it.
        altered: what ``altered_artifacts`` has found.
        letters: the run's dead letters; their events are sent again.
    """
    excused = _excused(letters)
    absent = {found.path for found in altered if found.absent}
    return {
        path: msgspec.structs.replace(file, settled=True)
        for path, file in view.artifacts.items()
        if path not in absent and ("artifact", path) not in excused
    }


def wrong_contents(sink: Sink, remote_id: str, view: RunView, letters: Collection[DeadLetter]) -> list[str]:
    """Return which artifacts MLflow holds with another content than was logged, one sentence each; downloads them all.

    What delivery itself changes (an ``MLmodel``, in which it puts MLflow's ids) is passed over.

    Args:
        sink: the tracking store.
        remote_id: the run's id there.
        view: the run as its events describe it.
        letters: its dead letters.

    Raises:
        SinkError: MLflow could not be asked, for another reason than that the file is not there.
        OSError: there is no room for the largest of the files.
    """
    excused = _excused(letters)
    found = []
    for path, file in view.artifacts.items():
        if ("artifact", path) in excused or posixpath.basename(path) == "MLmodel":
            continue
        with tempfile.TemporaryDirectory(prefix="mlflow-outbox-") as private:
            copy = Path(private, "artifact")
            try:
                sink.download(remote_id, path, copy, file.size)
            except SinkError as error:
                if classify(error, "download").kind == "retry":
                    raise
                found.append(f"the artifact {printable(path)!r} cannot be read back: {error}")
                continue
            with copy.open("rb") as content:
                digest = hashlib.sha256()
                for chunk in iter(lambda: content.read(_CHUNK), b""):
                    digest.update(chunk)
        if digest.hexdigest() != file.sha256:
            found.append(f"the artifact {printable(path)!r} has another content than was logged")
    return found


def summary(found: list[str]) -> str:
    """Return differences as one sentence."""
    rest = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return "; ".join(found[:_NAMED]) + rest


def _excused(letters: Collection[DeadLetter]) -> set[tuple[str, str]]:
    return {name for event in _events_of(letters) for name in _names(event)}


def _excused_points(letters: Collection[DeadLetter]) -> dict[str, set[_Identity]]:
    """Return the points of dead letters by metric: of a metric of which one was refused, MLflow has all others."""
    result: dict[str, set[_Identity]] = {}
    for event in _events_of(letters):
        for key, point in _points(event):
            result.setdefault(key, set()).add(point)
    return result


def _events_of(letters: Collection[DeadLetter]) -> Iterator[Event]:
    for letter in letters:
        with contextlib.suppress(msgspec.DecodeError):  # of a newer version: what it is about cannot be told
            yield decode(letter.payload)


def _names(event: Event) -> Iterator[tuple[str, str]]:
    if isinstance(event, Params):
        yield from (("param", key) for key in event.values)
    elif isinstance(event, Tags):
        yield from (("tag", key) for key in event.values)
    elif isinstance(event, Artifact):
        yield "artifact", event.path
    elif isinstance(event, RunEnded):
        yield "status", ""


def _points(event: Event) -> Iterator[tuple[str, _Identity]]:
    if isinstance(event, Metric):
        yield event.key, _identity(event.value, event.time_ms, event.step)
    elif isinstance(event, Metrics):
        for key, value in event.values.items():
            yield key, _identity(value, event.time_ms, event.step)


def _expected_metrics(
    view: RunView, reader: RunReader, excused: Mapping[str, Collection[_Identity]]
) -> dict[str, Latest]:
    """Return the latest point of each metric that MLflow is expected to hold.

    The view has the latest of all. Where that may be a dead letter, the others are looked for in the journals: once
    through, with one point of each such metric in memory.
    """
    if not excused:
        return view.metrics
    rest = RunView()
    for writer, event in _events(reader):
        for key, point in _points(event):
            if key in excused and point not in excused[key]:
                value = event.value if isinstance(event, Metric) else event.values[key]
                rest.fold(Metric(key, value, event.time_ms, event.step), writer)
    return {key: latest for key, latest in view.metrics.items() if key not in excused} | rest.metrics


def _of_run(
    run: RemoteRun, view: RunView, metrics: Mapping[str, Latest], excused: set[tuple[str, str]]
) -> Iterator[str]:
    status = view.status.value
    if view.end_time_ms is not None and run.status != status and ("status", "") not in excused:
        yield f"the status is {run.status}, not {status}"
    for key, value in view.params.items():
        if ("param", key) in excused:
            continue
        held = run.params.get(key)
        if held is None:
            yield f"the param {printable(key)!r} is missing"
        elif held != value and not (len(value) > MAX_PARAM_CHARS and value.startswith(held)):
            yield f"the param {printable(key)!r} is {printable(held, 40)!r}, not {printable(value, 40)!r}"
    for key in view.tags:
        if key not in run.tags and ("tag", key) not in excused:
            yield f"the tag {printable(key)!r} is missing"
    for key, latest in metrics.items():
        point = run.metrics.get(key)
        if point is None:
            yield f"the metric {printable(key)!r} is missing"
        elif not _as_late(point, latest):
            yield f"the metric {printable(key)!r} ends at step {point.step}, not {latest.step}"


def _as_late(point: MetricPoint, latest: Latest) -> bool:
    if (point.step, point.time_ms) != (latest.step, latest.time_ms):
        return (point.step, point.time_ms) > (latest.step, latest.time_ms)
    # NaN is before and behind every number: which of them a file store shows depends on which came first.
    unordered = math.isnan(latest.value) or math.isnan(point.value)
    return unordered or _same(point.value, latest.value) or point.value > latest.value


def _same(held: float, logged: float) -> bool:
    if math.isnan(logged):
        return math.isnan(held) or held == 0.0
    if math.isinf(logged):
        return held in {logged, math.copysign(sys.float_info.max, logged)} or abs(held) > 1e308  # noqa: PLR2004 - the largest double, as a database prints it
    return held == logged


def _of_history(
    sink: Sink, remote_id: str, reader: RunReader, excused: Mapping[str, Collection[_Identity]]
) -> Iterator[str]:
    """Compare every point; identical ones (value, time and step) are one, as MLflow has it."""
    logged: dict[str, set[_Identity]] = {}
    for _, event in _events(reader):
        for key, point in _points(event):
            logged.setdefault(key, set()).add(point)
    for key, points in logged.items():
        expected = points.difference(excused.get(key, ()))
        held = {_identity(point.value, point.time_ms, point.step) for point in sink.metric_history(remote_id, key)}
        if missing := len(expected - held):
            yield f"of the metric {printable(key)!r} {missing} of {len(expected)} points are missing"


def _events(reader: RunReader) -> Iterator[tuple[str, Metric | Metrics]]:
    """Yield the points of a run with their writers, from the journals on disk."""
    cursors: dict[str, Cursor] = {}
    more = True
    while more:
        window = reader.window(cursors, points=100_000, items=100_000)
        yield from ((writer, event) for writer, event in window.events if isinstance(event, (Metric, Metrics)))
        cursors, more = window.cursors, window.more


def _identity(value: float, time_ms: int, step: int) -> _Identity:
    if math.isnan(value):
        return "nan", time_ms, step
    if abs(value) > 1e308:  # noqa: PLR2004 - infinities, which SQL stores hold as the largest double
        return ("inf" if value > 0 else "-inf"), time_ms, step
    return repr(value + 0.0), time_ms, step  # SQLite keeps zero without its sign
