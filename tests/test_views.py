"""Events folded as MLflow would: several writers, clocks that jump."""

from __future__ import annotations

import inspect
import itertools
import math
from typing import Any

import msgspec
import pytest

from mlflow_outbox.plugin import reads
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
from mlflow_outbox.views import TRACES, Kept, RunView, wins
from mlflow_outbox_worker.sink import OPERATIONS


def folded(*events: tuple[str, Event]) -> RunView:
    """A run after some events of writers."""
    view = RunView()
    for writer, event in events:
        view.fold(event, writer)
    return view


@pytest.mark.parametrize(
    ("points", "latest"),
    [
        ([(1.0, 10, 1), (2.0, 11, 2)], 2.0),
        ([(1.0, 10, 2), (2.0, 99, 1)], 1.0),
        ([(1.0, 11, 1), (2.0, 10, 1)], 1.0),
        ([(2.0, 10, 1), (1.0, 10, 1)], 2.0),
        ([(math.nan, 10, 1), (-1.0, 10, 1)], math.nan),
        ([(1.0, 10, 1), (math.nan, 10, 1)], 1.0),
        ([(1.0, 10, 1), (math.inf, 10, 1)], math.inf),
        ([(1.0, 10, -5), (2.0, 10, -6)], 1.0),
        ([(1.0, 10, 2**53), (2.0, 10, 2**53 + 1)], 2.0),
    ],
)
def test_the_latest_point_is_that_of_the_largest_step_then_time_then_value(
    points: list[tuple[float, int, int]], latest: float
) -> None:
    """MLflow's rule, in whatever order the points arrive; NaN counts as 0, as in its SQL stores."""
    for order in itertools.permutations(points):
        found = folded(*(("w", Metric("k", value, time, step)) for value, time, step in order)).metrics["k"]
        assert (str(latest), len(points)) == (str(found.value), found.points)


def test_points_of_one_call_count_like_points_of_many() -> None:
    """log_metrics and log_metric."""
    one = folded(("w", Metrics({"a": 1.0, "b": 2.0}, 5, 1)))
    two = folded(("w", Metric("a", 1.0, 5, 1)), ("w", Metric("b", 2.0, 5, 1)))
    assert one.metrics == two.metrics


def test_a_param_keeps_its_first_value() -> None:
    """From whichever writer."""
    assert {"k": "1", "l": "3"} == folded(
        ("w", Params({"k": "1"}, 9)), ("v", Params({"k": "2", "l": "3"}, 1)), ("w", Params({"k": "4"}, 10))
    ).params


@pytest.mark.parametrize(
    ("sets", "value"),
    [
        ([("w", "a", 1), ("w", "b", 2)], "b"),
        ([("w", "a", 10), ("w", "b", 2)], "b"),  # the writer's clock went back; its own order counts
        ([("w", "a", 10), ("v", "b", 2)], "a"),  # another writer, earlier
        ([("w", "a", 2), ("v", "b", 10)], "b"),
        ([("w", "a", 5), ("v", "b", 5)], "b"),
        ([("w", "a", 10), ("v", "b", 2), ("w", "c", 3)], "c"),
    ],
)
def test_a_tag_keeps_its_last_value(sets: list[tuple[str, str, int]], value: str) -> None:
    """Last by the clock between writers, by the order of calls within one."""
    assert value == folded(*((writer, Tags({"k": text}, time)) for writer, text, time in sets)).tags["k"].value


def test_two_writers_views_agree_whoever_is_read_first() -> None:
    """Distinct times: the order in which journals are read does not matter."""
    mine = [("w", Tags({"k": "a"}, 1)), ("w", Tags({"k": "b"}, 4))]
    theirs = [("v", Tags({"k": "c"}, 2)), ("v", Tags({"k": "d"}, 3))]
    assert folded(*mine, *theirs).tags == folded(*theirs, *mine).tags


def ends(*given: tuple[str, Event]) -> tuple[str, int | None]:
    """Status and end time after some events."""
    view = folded(*given)
    return view.status.value, view.end_time_ms


def test_a_run_is_running_until_it_is_ended_and_again_when_resumed() -> None:
    """Status and end go together."""
    start = ("w", RunStarted(5, "name", "me", {"t": "1"}))
    assert ("RUNNING", None) == ends(start)
    assert ("FAILED", 9) == ends(start, ("w", RunEnded("FAILED", 9)))
    assert ("RUNNING", None) == ends(start, ("w", RunEnded("FAILED", 9)), ("v", RunStarted(10, resumed=True)))
    assert ("FAILED", 9) == ends(start, ("w", RunEnded("FAILED", 9)), ("v", RunStarted(8, resumed=True)))
    assert ("RUNNING", None) == ends(start, ("w", RunEnded("FINISHED", 9)), ("w", RunEnded("RUNNING", 10)))
    assert ("KILLED", 3) == ends(start, ("w", RunEnded("FINISHED", 9)), ("w", RunEnded("KILLED", 3)))
    assert ("FINISHED", 9) == ends(start, ("w", RunEnded("FINISHED", 9)), ("v", RunEnded("KILLED", 3)))


def test_a_given_end_time_does_not_order_the_ends_of_a_run() -> None:
    """Who ends it last has the last word, whenever it is said to have ended."""
    start = ("w", RunStarted(5, "name", "me", {"t": "1"}))
    assert ("KILLED", 3) == ends(start, ("w", RunEnded("FINISHED", 9)), ("v", RunEnded("KILLED", 10, 3)))
    assert ("KILLED", 10) == ends(start, ("w", RunEnded("FINISHED", 9, 99)), ("v", RunEnded("KILLED", 10)))
    assert ("FINISHED", 9) == ends(start, ("w", RunEnded("FINISHED", 9)), ("v", RunEnded("KILLED", 8, 99)))
    assert ("RUNNING", None) == ends(start, ("w", RunEnded("FINISHED", 9, 99)), ("v", RunStarted(10, resumed=True)))


def test_a_run_begins_as_its_first_writer_said() -> None:
    """A resumed writer changes neither name nor user nor start."""
    view = folded(
        ("w", RunStarted(5, "name", "me", {"t": "1"})), ("v", RunStarted(9, "other", "you", {"t": "2"}, True))
    )
    assert ("name", "me", 5, "2") == (view.name, view.user, view.start_time_ms, view.tags["t"].value)


def test_a_given_start_time_does_not_order_the_start_of_a_run() -> None:
    """It is the run's only; tags and the status of who goes on with it are of the time of the call."""
    view = folded(
        ("w", RunStarted(5, "name", "me", {"t": "1"}, given_ms=3)),
        ("w", RunEnded("FINISHED", 7)),
        ("v", RunStarted(9, None, "me", {"t": "2"}, True, given_ms=3)),
    )
    assert (3, "2", "RUNNING") == (view.start_time_ms, view.tags["t"].value, view.status.value)


def test_an_artifact_is_its_last_content() -> None:
    """By path."""
    view = folded(("w", Artifact("a", "0" * 64, 1, 1)), ("w", Artifact("a", "1" * 64, 2, 2)))
    assert ("1" * 64, 2) == (view.artifacts["a"].sha256, view.artifacts["a"].size)


@pytest.mark.parametrize(
    ("logged", "content"),
    [
        ([("w", "1", 1), ("w", "2", 2)], "2"),
        ([("w", "1", 10), ("w", "2", 2)], "2"),  # the writer's clock went back; its own order counts
        ([("w", "1", 10), ("v", "2", 2)], "1"),  # another writer, earlier
        ([("w", "1", 2), ("v", "2", 10)], "2"),
        ([("w", "1", 5), ("v", "2", 5)], "2"),
    ],
)
@pytest.mark.parametrize("owner", ["", "model:m-1"])
def test_an_artifact_that_another_writer_logged_earlier_is_overtaken(
    owner: str, logged: list[tuple[str, str, int]], content: str
) -> None:
    """As a tag is; a model's files too."""

    def event(digit: str, time: int) -> Event:
        return FileFor(owner, "a", digit * 64, 1, time) if owner else Artifact("a", digit * 64, 1, time)

    view = folded(*((writer, event(digit, time)) for writer, digit, time in logged))
    files = view.files[owner] if owner else view.artifacts
    assert content * 64 == files["a"].sha256


def test_views_do_not_share_anything() -> None:
    """The defaults are each run's own."""
    folded(("w", Params({"k": "1"}, 1)), ("w", Tags({"k": "1"}, 1)), ("w", Metric("k", 1.0, 1, 1)))
    assert RunView() == folded()


def test_a_view_survives_being_stored() -> None:
    """As the ledger keeps it."""
    events: list[Any] = [RunStarted(1, "n", "u", {"t": "x"}), Metric("k", 1.5, 2, 3), Params({"p": "q"}, 4)]
    view = folded(*(("w", event) for event in events), ("w", Artifact("a", "0" * 64, 1, 1)))
    assert view == msgspec.msgpack.decode(msgspec.msgpack.encode(view), type=RunView)


def test_a_value_wins_by_time_or_by_its_own_writer() -> None:
    """The rule in one place."""
    held = folded(("w", Tags({"k": "a"}, 5))).tags["k"]
    assert [True, True, False, True] == [wins(held, *later) for later in [(5, "v"), (1, "w"), (4, "v"), (6, "v")]]


def a_trace(number: int) -> list[tuple[str, Event]]:
    """What a trace is in a room's journal, where its spans are a file."""
    arguments = b'{"trace_id": "tr-%032x"}' % number
    calls: list[tuple[str, Event]] = [
        ("w", Request(operation, arguments, number))
        for operation in sorted(name for name in OPERATIONS if "trace" in name or "spans" in name)
    ]
    return [
        *calls,
        ("w", FileFor(f"uri:mlflow-artifacts:/1/traces/tr-{number}/artifacts", "traces.json", "0" * 64, 1, 1)),
    ]


def test_a_view_does_not_grow_with_the_number_of_traces() -> None:
    """After ten times as many it holds no more: none of their requests, and the files of the latest."""

    def after(count: int) -> RunView:
        view = RunView()
        for number in range(count):
            for writer, event in a_trace(number):
                view.fold(event, writer)
            view.trim()
        return view

    few, many = after(TRACES), after(10 * TRACES)
    assert ([], []) == (few.requests, many.requests)
    assert TRACES == len(few.files) == len(many.files)
    assert f"uri:mlflow-artifacts:/1/traces/tr-{10 * TRACES - 1}/artifacts" in many.files


def test_files_that_wait_and_those_of_models_are_all_known() -> None:
    """What has not been delivered is found at any number; a model's files stay whatever traces come."""
    view = RunView()
    for number in range(TRACES + 5):
        view.fold(FileFor(f"model:m-{number}", "model.pt", "0" * 64, 1, 1), "w")
        view.fold(FileFor(f"uri:place/{number}", "traces.json", "0" * 64, 1, 1), "w")
    assert 2 * (TRACES + 5) == len(view.files)
    view.trim()
    assert TRACES + 5 == sum(owner.startswith("model:") for owner in view.files)


def test_every_request_that_a_reader_asks_for_is_kept_and_no_other() -> None:
    """The names that stand in the readers' code are those that a view keeps."""
    operations = sorted(OPERATIONS | {"create_experiment"})
    asked = {name for name in operations if f'operation == "{name}"' in inspect.getsource(reads)}
    assert "create_logged_model" in asked
    view = folded(*(("w", Request(name, b"{}", 1)) for name in operations))
    assert sorted(asked) == sorted(kept.operation for kept in view.requests)


def test_a_view_of_an_earlier_version_becomes_small() -> None:
    """What it kept of traces is left out when it is read."""
    view = folded(("w", Request("log_inputs", b"{}", 1)))
    view.requests += [Kept("start_trace", b"{}", number, "") for number in range(1000)]
    found = msgspec.msgpack.decode(msgspec.msgpack.encode(view), type=RunView)
    assert ["log_inputs"] == [kept.operation for kept in found.requests]
