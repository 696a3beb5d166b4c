"""From the events of one run to the fewest requests that keep its meaning.

* Metric points travel in batches of up to 1000, with tags beside them.
* Params travel apart from metrics: MLflow refuses a whole batch for one conflicting param (facts, 2a). Of two values
  for a key the first goes with the others, the second alone, so that MLflow itself gives the answer that becomes a
  dead letter.
* A point whose step or time has more than 64 bits (an earlier version's journal can hold one) goes alone: MLflow's
  server answers a batch with such a number in it with 200, and drops what follows in it.
* Of several values of a tag, contents of an artifact path, or statuses only the last is sent; a value that another
  writer has overtaken already is not sent at all.
* Tags with which a run begins are in MLflow since its creation. Unless it was made just now they are sent again, for
  the case that they were taken away since; but for those that only a creation can set: MLflow would refuse or cut them.
* The status goes last, so that a run is not shown as finished before it is complete.
* A request of MLflow's own (a deleted tag, a logged model) is a barrier: it goes after all that precedes it, before
  all that follows. Those of points that name a model or a dataset travel together where they follow each other.

Pure: no I/O, no clock.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Final, NamedTuple

from mlflow_outbox import linked
from mlflow_outbox.spool.events import (
    INT64_MAX,
    INT64_MIN,
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
from mlflow_outbox.validation import is_ordinary_tag
from mlflow_outbox.views import Register, RunView, wins
from mlflow_outbox_worker.sink import MetricPoint

#: Entities in one request; MLflow's limits (mlflow/utils/validation.py).
MAX_POINTS: Final = 1000
MAX_PARAMS: Final = 100
MAX_TAGS: Final = 100
MAX_ENTITIES: Final = 1000


@dataclasses.dataclass(frozen=True)
class Batch:
    """One log_batch request.

    Attributes:
        time_ms: of its first event, for a dead letter.
        tag_times: when its tags were set, for the same: of several values of one the later counts, sent again or not.
    """

    points: Sequence[MetricPoint]
    params: dict[str, str]
    tags: dict[str, str]
    time_ms: int
    tag_times: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.points) + len(self.params) + len(self.tags)

    def halves(self) -> tuple[Batch, Batch]:
        """Split into two batches of about the same size."""
        items = [*self._singles()]
        middle = len(items) // 2
        return self._of(items[:middle]), self._of(items[middle:])

    def _of(self, items: Sequence[Batch]) -> Batch:
        return dataclasses.replace(_joined(items), tag_times=self.tag_times)

    def _singles(self) -> Iterator[Batch]:
        for point in self.points:
            yield Batch([point], {}, {}, self.time_ms)
        for key, value in self.params.items():
            yield Batch((), {key: value}, {}, self.time_ms)
        for key, value in self.tags.items():
            yield Batch((), {}, {key: value}, self.time_ms)

    def event(self) -> Event:
        """Return the one event that a batch of a single entity is."""
        for point in self.points:
            return Metric(point.key, point.value, point.time_ms, point.step)
        times = [self.tag_times.get(key, self.time_ms) for key in self.tags]
        return Params(self.params, self.time_ms) if self.params else Tags(self.tags, max(times, default=self.time_ms))


class Upload(NamedTuple):
    """One artifact to store."""

    artifact: Artifact


class SetStatus(NamedTuple):
    """The run's status, and when it ended."""

    status: str
    end_time_ms: int | None
    time_ms: int


class Call(NamedTuple):
    """A request of MLflow's own, made in its place."""

    request: Request


class Linked(NamedTuple):
    """Requests of points that name a model or a dataset, which are made as one."""

    requests: tuple[Request, ...]


class UploadFor(NamedTuple):
    """A file of something that is no run."""

    file: FileFor


Step = Batch | Upload | SetStatus | Call | Linked | UploadFor


class Plan(NamedTuple):
    """Requests in the order in which to make them, and whether the run counts as ended behind them."""

    steps: list[Step]
    ended: bool | None


def plan(
    events: Sequence[tuple[str, Event]], view: RunView, *, batch_points: int = MAX_POINTS, made_now: bool = False
) -> Plan:
    """Return the requests for some events of one run.

    Args:
        events: (writer, event) pairs in order.
        view: the run as delivered before these events; not changed.
        batch_points: metric points in one request, at most 1000.
        made_now: the run was created for these events, with the tags with which it begins.
    """
    if not any(type(event) in {Request, FileFor} for _, event in events):
        return _plan(events, view, batch_points, made_now)
    steps: list[Step] = []
    ended: bool | None = None
    # What was decided before a barrier holds after it: a scratch view knows all but points.
    owners = {event.owner for _, event in events if isinstance(event, FileFor)}
    scratch = RunView(
        status=view.status,
        params=dict(view.params),
        tags=dict(view.tags),
        artifacts=dict(view.artifacts),
        files={owner: dict(view.files.get(owner, {})) for owner in owners},
    )
    begin = 0
    for index, (writer, event) in enumerate([*events, ("", None)]):
        if event is not None and not isinstance(event, (Request, FileFor)):
            continue
        part = _plan(events[begin:index], scratch, batch_points, made_now)
        steps += part.steps
        ended = part.ended if part.ended is not None else ended
        for earlier_writer, earlier in events[begin:index]:
            if isinstance(earlier, (Params, Tags, Artifact, RunStarted, RunEnded)):
                scratch.fold(earlier, earlier_writer)
        if isinstance(event, Request):
            steps.append(Call(event))
            scratch.fold(event, writer)
        elif event is not None:
            held = scratch.files[event.owner].get(event.path)
            if held is None or wins(held, event.time_ms, writer):
                steps.append(UploadFor(event))
            scratch.fold(event, writer)
        begin = index + 1
    return Plan([*_together(steps, batch_points)], ended)


def _together(steps: Iterable[Step], batch_points: int) -> Iterator[Step]:
    """Yield steps with the requests of points that follow each other as one."""

    def goes_with_others(step: Step) -> bool:
        return isinstance(step, Call) and linked.is_linked(step.request)

    for are_linked, some in itertools.groupby(steps, goes_with_others):
        if not are_linked:
            yield from some
            continue
        for group in linked.groups([step.request for step in some if isinstance(step, Call)], batch_points):
            yield Linked(group) if len(group) > 1 else Call(group[0])


def _plan(  # noqa: PLR0912 - one branch per kind of event, and what the last one of each kind leaves
    events: Sequence[tuple[str, Event]],
    view: RunView,
    batch_points: int,
    made_now: bool,  # noqa: FBT001 - handed on by plan alone
) -> Plan:
    points: list[MetricPoint] = []
    params: dict[str, str] = {}
    alone: list[Batch] = []
    tags: dict[str, Register] = {}
    created: dict[str, str] = {}
    files: dict[str, tuple[Register, Artifact]] = {}
    status: Register | None = None
    end_time: int | None = None
    first_ms: int | None = None
    for writer, event in events:
        kind = type(event)
        if kind is Metric:
            points.append(MetricPoint(event.key, event.value, event.time_ms, event.step))  # type: ignore[union-attr]  # by its kind
            continue
        if first_ms is None:
            first_ms = getattr(event, "time_ms", None)
        if isinstance(event, Metrics):
            points += [MetricPoint(key, value, event.time_ms, event.step) for key, value in event.values.items()]
        elif isinstance(event, Params):
            for key, text in event.values.items():
                first = params.get(key, view.params.get(key, text))
                if first == text:
                    params[key] = text
                else:
                    alone.append(Batch((), {key: text}, {}, event.time_ms))
        elif isinstance(event, Artifact):
            latest = files[event.path][0] if event.path in files else view.artifacts.get(event.path)
            if latest is None or wins(latest, event.time_ms, writer):
                files.pop(event.path, None)
                files[event.path] = Register(event.sha256, event.time_ms, writer), event
        else:
            if isinstance(event, RunStarted) and not event.resumed:
                created |= {k: text for k, text in event.tags.items() if made_now or not is_ordinary_tag(k, text)}
            if isinstance(event, (Tags, RunStarted)):
                for key, text in (event.values if isinstance(event, Tags) else event.tags).items():
                    held = tags.get(key) or view.tags.get(key)
                    if held is None or wins(held, event.time_ms, writer):
                        tags[key] = Register(text, event.time_ms, writer)
            if isinstance(event, RunEnded) or (isinstance(event, RunStarted) and event.resumed):
                held = status or view.status
                if wins(held, event.time_ms, writer):
                    how, ended_ms = (
                        ("RUNNING", None) if isinstance(event, RunStarted) else (event.status, event.end_time_ms)
                    )
                    status = Register(how, event.time_ms, writer)
                    end_time = ended_ms if how not in {"RUNNING", "SCHEDULED"} else None
    time_ms = first_ms if first_ms is not None else (points[0].time_ms if points else 0)
    steps: list[Step] = []
    labels = {key: held for key, held in tags.items() if created.get(key) != held.value}
    steps += _batches(points, params, labels, time_ms, batch_points)
    steps += alone
    steps += [Upload(artifact) for _, artifact in files.values()]
    if status is not None:
        steps.append(SetStatus(status.value, end_time, status.time_ms))
    return Plan(steps, None if status is None else end_time is not None)


def _batches(
    points: list[MetricPoint], params: dict[str, str], tags: dict[str, Register], time_ms: int, batch_points: int
) -> Iterator[Batch]:
    if any(_beyond(map(itemgetter(field), points)) for field in (2, 3)):  # the time and the step of each
        yield from (Batch([point], {}, {}, point.time_ms) for point in points if not fits(point))
        points = [point for point in points if fits(point)]
    names = list(params)
    for start in range(0, len(names), MAX_PARAMS):
        yield Batch((), {name: params[name] for name in names[start : start + MAX_PARAMS]}, {}, time_ms)
    labels = list(tags)
    for start in range(0, len(points), batch_points):
        some = points[start : start + batch_points]
        room = min(MAX_TAGS, MAX_ENTITIES - len(some))
        beside, labels = labels[:room], labels[room:]
        yield _labelled(some, {label: tags[label] for label in beside}, time_ms)
    for start in range(0, len(labels), MAX_TAGS):
        yield _labelled((), {label: tags[label] for label in labels[start : start + MAX_TAGS]}, time_ms)


def _labelled(points: Sequence[MetricPoint], tags: dict[str, Register], time_ms: int) -> Batch:
    values = {key: held.value for key, held in tags.items()}
    return Batch(points, {}, values, time_ms, {key: held.time_ms for key, held in tags.items()})


def fits(point: MetricPoint) -> bool:
    """Return whether a point can be said in MLflow's protocol, and kept by its stores."""
    return not _beyond((point.time_ms, point.step))


def _beyond(numbers: Iterable[int]) -> bool:
    some = sorted(numbers)
    return bool(some) and not INT64_MIN <= some[0] <= some[-1] <= INT64_MAX


def _joined(items: Sequence[Batch]) -> Batch:
    points = [point for item in items for point in item.points]
    params = {key: value for item in items for key, value in item.params.items()}
    tags = {key: value for item in items for key, value in item.tags.items()}
    return Batch(points, params, tags, items[0].time_ms if items else 0)
