"""From events to the fewest requests: MLflow's limits, and what must not share a request (F65, F66)."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
from mlflow_outbox.views import RunView
from mlflow_outbox_worker.planner import Batch, Call, Plan, SetStatus, Step, Upload, UploadFor, plan


def planned(*events: Event, view: RunView | None = None, points: int = 1000) -> Plan:
    """The plan for the events of one writer."""
    return plan([("w", event) for event in events], view or RunView(), batch_points=points)


def batches(steps: list[Step]) -> list[Batch]:
    """The log_batch requests of a plan."""
    return [step for step in steps if isinstance(step, Batch)]


@pytest.mark.parametrize(
    ("count", "limit", "sizes"),
    [(0, 1000, []), (1, 1000, [1]), (1000, 1000, [1000]), (1001, 1000, [1000, 1]), (7, 3, [3, 3, 1])],
)
def test_points_travel_in_as_few_requests_as_the_limit_allows(count: int, limit: int, sizes: list[int]) -> None:
    """In their order, each once."""
    steps = batches(planned(*(Metric("k", float(n), n, n) for n in range(count)), points=limit).steps)
    assert sizes == [len(step.points) for step in steps]
    assert list(range(count)) == [point.step for step in steps for point in step.points]


def test_no_request_is_over_any_limit_of_mlflow() -> None:
    """F66: 1000 points, 100 params, 100 tags, 1000 entities."""
    many = {f"k{n}": "v" for n in range(333)}
    steps = batches(
        planned(
            Params(many, 1), Tags(many, 1), Metrics(dict.fromkeys(many, 1.0), 1, 1), *[Metric("a", 1.0, 1, 1)] * 1700
        ).steps
    )
    for step in steps:
        assert len(step.points) <= 1000
        assert len(step.params) <= 100
        assert len(step.tags) <= 100
        assert 0 < len(step) <= 1000
    assert (333, 333, 2033) == (
        sum(len(step.params) for step in steps),
        sum(len(step.tags) for step in steps),
        sum(len(step.points) for step in steps),
    )


def test_params_travel_apart_from_everything_else() -> None:
    """F65: one conflict must not sink a batch of points."""
    steps = batches(planned(Params({"p": "1"}, 1), Metric("k", 1.0, 1, 1), Tags({"t": "1"}, 1)).steps)
    assert [{"p": "1"}] == [step.params for step in steps if step.params]
    for step in steps:
        assert not (step.params and (step.points or step.tags))


def test_a_param_that_conflicts_travels_alone() -> None:
    """Within the events, or with what was delivered before; MLflow's answer is about it and nothing else."""
    steps = batches(planned(Params({"p": "1", "q": "1"}, 1), Params({"p": "2"}, 7), Params({"q": "1"}, 8)).steps)
    assert [{"p": "1", "q": "1"}, {"p": "2"}] == [step.params for step in steps]
    assert 7 == steps[1].time_ms
    view = RunView(params={"p": "0", "q": "1"})
    steps = batches(planned(Params({"p": "2", "q": "1", "r": "1"}, 1), view=view).steps)
    assert [{"q": "1", "r": "1"}, {"p": "2"}] == [step.params for step in steps]
    assert RunView(params={"p": "0", "q": "1"}) == view


def test_a_conflict_behind_a_barrier_travels_alone_too() -> None:
    """What went before the barrier is known behind it."""
    barrier = Request("log_inputs", b"{}", 1)
    steps = planned(Params({"p": "1"}, 1), barrier, Params({"p": "2", "q": "1"}, 2)).steps
    assert [{"p": "1"}, {"q": "1"}, {"p": "2"}] == [step.params for step in batches(steps)]
    assert Call(barrier) in steps


def test_of_several_values_of_a_tag_the_last_is_sent() -> None:
    """One request, and nothing that another writer has overtaken already."""
    steps = batches(planned(Tags({"t": "1", "u": "1"}, 1), Tags({"t": "2"}, 2)).steps)
    assert [{"t": "2", "u": "1"}] == [step.tags for step in steps]
    view = RunView()
    view.set_tag("t", "theirs", 10, "v")
    assert [] == planned(Tags({"t": "mine"}, 5), view=view).steps
    assert [{"t": "mine"}] == [step.tags for step in batches(planned(Tags({"t": "mine"}, 11), view=view).steps)]


def test_tags_travel_beside_points_where_there_is_room() -> None:
    """A request saved."""
    assert 1 == len(planned(Metric("k", 1.0, 1, 1), Tags({"t": "1"}, 1)).steps)


def test_tags_that_a_run_was_made_with_just_now_are_not_sent_again() -> None:
    """A request saved, for a run that goes on; what has another value since is sent, behind a barrier too."""
    begun = RunStarted(5, "n", "u", {"t": "1", "u": "1"})
    barrier = Request("log_inputs", b"{}", 6)

    def made(*events: Event) -> list[dict[str, str]]:
        made = plan([("w", event) for event in events], RunView(), made_now=True)
        return [step.tags for step in batches(made.steps)]

    assert [] == made(begun)
    assert [{"u": "2"}] == made(begun, Tags({"u": "2"}, 6))
    assert [{"u": "2"}] == made(begun, barrier, Tags({"u": "2"}, 7))
    assert [] == made(Tags({"t": "0"}, 4), begun), "an older value of another writer is not sent either"
    assert [{"t": "1"}] == made(RunStarted(5, "n", "u", {"t": "1"}, resumed=True)), "nobody has made it with these"


def test_the_first_tags_of_a_run_are_tags() -> None:
    """A run that was resumed brings its own."""
    assert [{"t": "1"}] == [step.tags for step in batches(planned(RunStarted(1, "n", "u", {"t": "1"})).steps)]


def test_of_several_contents_of_an_artifact_the_last_is_uploaded() -> None:
    """Once."""
    one, two, other = Artifact("a", "0" * 64, 1, 1), Artifact("a", "1" * 64, 1, 2), Artifact("b", "2" * 64, 1, 1)
    assert [Upload(other), Upload(two)] == planned(one, other, two).steps


def test_a_content_that_another_writer_has_overtaken_is_not_uploaded() -> None:
    """Within the events, with what was delivered before, and across a barrier; a model's files too."""
    late, early = Artifact("a", "1" * 64, 1, 10), Artifact("a", "0" * 64, 1, 5)
    barrier = Request("log_inputs", b"{}", 1)
    assert [Upload(late)] == plan([("w", late), ("v", early)], RunView()).steps
    assert [Upload(late), Call(barrier)] == plan([("w", late), ("w", barrier), ("v", early)], RunView()).steps
    view = RunView()
    view.fold(late, "w")
    assert [] == plan([("v", early)], view).steps
    assert [Upload(early)] == plan([("w", early)], view).steps, "its clock went back"
    ours, theirs = FileFor("model:m-1", "a", "1" * 64, 1, 10), FileFor("model:m-1", "a", "0" * 64, 1, 5)
    assert [UploadFor(ours)] == plan([("w", ours), ("v", theirs)], RunView()).steps
    view.fold(ours, "w")
    assert [] == plan([("v", theirs)], view).steps


def test_the_status_goes_last() -> None:
    """A run is not shown as finished before it is complete."""
    found = planned(RunEnded("FINISHED", 9), Metric("k", 1.0, 10, 1), Artifact("a", "0" * 64, 1, 1))
    assert SetStatus("FINISHED", 9, 9) == found.steps[-1]
    assert 3 == len(found.steps)
    assert found.ended


@pytest.mark.parametrize(
    ("events", "ended", "status"),
    [
        ([], None, None),
        ([RunStarted(1)], None, None),
        ([RunEnded("FAILED", 5)], True, SetStatus("FAILED", 5, 5)),
        ([RunEnded("FAILED", 5), RunStarted(6, resumed=True)], False, SetStatus("RUNNING", None, 6)),
        ([RunEnded("SCHEDULED", 5)], False, SetStatus("SCHEDULED", None, 5)),
        ([RunEnded("FAILED", 5), RunEnded("KILLED", 4)], True, SetStatus("KILLED", 4, 4)),
        ([RunEnded("FAILED", 5, 2)], True, SetStatus("FAILED", 2, 5)),
    ],
)
def test_the_last_status_is_sent(events: list[Event], ended: bool | None, status: SetStatus | None) -> None:
    """And the run counts as ended, or not, or as before."""
    found = planned(*events)
    assert (ended, status) == (found.ended, next((s for s in found.steps if isinstance(s, SetStatus)), None))


def test_halves_are_all_of_a_batch_and_nothing_else() -> None:
    """Bisection ends at single entities, which are events again."""
    batch = planned(*(Metric("k", float(n), n, n) for n in range(5)), Tags({"t": "1", "u": "2"}, 3)).steps[0]
    assert isinstance(batch, Batch)
    pieces, singles = [batch], []
    while pieces:
        piece = pieces.pop()
        if len(piece) == 1:
            singles.append(piece.event())
        else:
            left, right = piece.halves()
            assert len(left) + len(right) == len(piece)
            assert abs(len(left) - len(right)) <= 1
            pieces += [left, right]
    assert sorted(map(repr, singles)) == sorted(
        [
            *(repr(Metric("k", float(n), n, n)) for n in range(5)),
            *(repr(Tags({k: v}, batch.time_ms)) for k, v in [("t", "1"), ("u", "2")]),
        ]
    )
    assert Params({"p": "1"}, 4) == Batch((), {"p": "1"}, {}, 4).event()


EVENTS = st.one_of(
    st.builds(Metric, st.sampled_from("ab"), st.floats(allow_nan=False), st.integers(0, 9), st.integers(0, 9)),
    st.builds(Params, st.dictionaries(st.sampled_from("pq"), st.sampled_from("12")), st.integers(0, 9)),
    st.builds(Tags, st.dictionaries(st.sampled_from("tu"), st.sampled_from("12")), st.integers(0, 9)),
    st.builds(RunEnded, st.sampled_from(["FINISHED", "RUNNING"]), st.integers(0, 9)),
    st.builds(Artifact, st.sampled_from("xy"), st.sampled_from("12"), st.just(1), st.integers(0, 9)),
    st.builds(FileFor, st.sampled_from("mn"), st.sampled_from("xy"), st.sampled_from("12"), st.just(1), st.just(5)),
)


@given(
    st.lists(st.tuples(st.sampled_from("wv"), EVENTS), max_size=30),
    st.lists(st.tuples(st.just("w"), EVENTS), max_size=5),
)
@settings(max_examples=200, deadline=None)
def test_carrying_out_a_plan_gives_what_the_events_mean(
    events: list[tuple[str, Event]], before: list[tuple[str, Event]]
) -> None:
    """I4: the server's state is the view's, whatever was delivered before."""
    view = RunView()
    for writer, event in before:
        view.fold(event, writer)
    params, tags, status = dict(view.params), {k: r.value for k, r in view.tags.items()}, view.status.value
    points = []
    files = {path: file.sha256 for path, file in view.artifacts.items()}
    for step in plan(events, view).steps:
        if isinstance(step, Batch):
            points += [(p.key, p.value, p.time_ms, p.step) for p in step.points]
            tags |= step.tags
            for key, value in step.params.items():
                assert params.get(key, value) == value or len(step) == 1
                params.setdefault(key, value)
        elif isinstance(step, SetStatus):
            status = step.status
        elif isinstance(step, Upload):
            files[step.artifact.path] = step.artifact.sha256
    for writer, event in events:
        view.fold(event, writer)
    assert {path: file.sha256 for path, file in view.artifacts.items()} == files
    assert (view.params, {k: r.value for k, r in view.tags.items()}, view.status.value) == (params, tags, status)
    assert [(e.key, e.value, e.time_ms, e.step) for _, e in events if isinstance(e, Metric)] == points
