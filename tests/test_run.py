"""A run as the experiment holds it: what it keeps, what it refuses, and its manners (I5, F67, F68)."""

from __future__ import annotations

import collections
import datetime as dt
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlflow_outbox import MLflowTracker
from mlflow_outbox.counters import Counters
from mlflow_outbox.errors import ArtifactRefused, EventRefused, InvalidEvent, InvalidEventType, OutboxFull
from mlflow_outbox.run import Run
from mlflow_outbox.settings import Settings
from mlflow_outbox.spool.events import Artifact, Event, Metric, Metrics, Params, RunEnded, RunStarted, Tags
from servers import eventually
from spools import RUN, Everything, Kit, Mute, open_files, warnings

# -- what is kept


def test_a_metric_is_the_same_point_however_it_is_given(kit: Kit) -> None:
    """The short way and the long way through log_metric, and log_metrics."""
    before = int(dt.datetime.now(dt.timezone.utc).timestamp() * 1000)
    for value, step in [(0.5, 1), (0.5, 1), (np.float32(0.5), np.int64(1)), (0.5, 1.0)]:
        assert kit.run.log_metric("loss", value, step)
    assert kit.run.log_metrics({"loss": 0.5}, step=1)
    assert kit.run.log_metric("loss", 0.5, 1, timestamp=5)
    assert kit.run.log_metric("loss", 0.5)
    *same, given, stepless = kit.events
    for event in same:
        assert isinstance(event, (Metric, Metrics))
        assert before <= event.time_ms <= before + 60_000
        assert (1, 0.5) == (event.step, event.value if isinstance(event, Metric) else event.values["loss"])
    assert Metric("loss", 0.5, 5, 1) == given
    assert 0 == stepless.step  # type: ignore[union-attr]  # of this kind


def test_every_kind_of_call_is_one_event(kit: Kit) -> None:
    """Params, tags and the rest, in their order."""
    run = kit.run
    run.begin("name", "me", {"t": 1}, 5, resumed=False)
    assert 3 == run.log_param("p", 3)
    assert run.log_params({"q": None, "r": [1]})
    assert run.set_tag("t", True)
    assert run.set_tags({"u": 1.5})
    assert run.log_metrics({"a": 1, "b": 2})
    assert run.end("FAILED", 9)
    start, one, two, tag, tags, metrics, end = kit.events
    assert RunStarted(start.time_ms, "name", "me", {"t": "1"}, given_ms=5) == start  # type: ignore[union-attr]  # of this kind
    assert 5 < start.time_ms <= one.time_ms, "the call's own time orders it"  # type: ignore[union-attr]  # of this kind
    assert ({"p": "3"}, {"q": "None", "r": "[1]"}) == (one.values, two.values)  # type: ignore[union-attr]  # of this kind
    assert ({"t": "True"}, {"u": "1.5"}) == (tag.values, tags.values)  # type: ignore[union-attr]  # of this kind
    assert {"a": 1.0, "b": 2.0} == metrics.values  # type: ignore[union-attr]  # of this kind
    assert RunEnded("FAILED", end.time_ms, given_ms=9) == end  # type: ignore[union-attr]  # of this kind
    assert 9 < end.time_ms, "and its end too"  # type: ignore[union-attr]  # of this kind
    assert {} == kit.counters.snapshot()


def test_known_keys_do_not_make_log_metrics_trust_their_values(kit: Kit) -> None:
    """A call that is as it should be is written as it is; any other is looked at key by key, and the dict is left."""

    class Name(str):
        __slots__ = ()

    given: dict[str, Any] = {"loss": 0.5, "rate": 0.25}
    assert kit.run.log_metrics(given, step=1)
    assert kit.run.log_metrics({Name("loss"): 1, "rate": True}, step=True)
    assert not kit.run.log_metrics({**given, "loss": "high", "bad$key": 2.0}, step=2)
    assert not kit.run.log_metrics(given, step=2**63)
    assert {"loss": 0.5, "rate": 0.25} == given
    found = [(event.values, event.step) for event in kit.events if isinstance(event, Metrics)]
    assert [(given, 1), ({"loss": 1.0, "rate": 1.0}, 1), ({"rate": 0.25}, 2)] == found
    assert {float} == {type(value) for values, _ in found for value in values.values()}
    assert (1, 1, 1) == tuple(kit.counters[f"refused_bad_{what}"] for what in ("value", "key", "step"))


@pytest.mark.parametrize("call", ["log_metrics", "log_params", "set_tags"])
def test_nothing_to_log_is_no_failure_and_no_event(kit: Kit, call: str) -> None:
    """An empty mapping."""
    assert getattr(kit.run, call)({})
    assert [] == kit.events


def test_logging_after_the_end_still_works(kit: Kit) -> None:
    """As in MLflow."""
    kit.run.end()
    assert kit.run.log_metric("loss", 0.5)
    assert [RunEnded, Metric] == [type(event) for event in kit.events]
    assert "ended" in repr(kit.run)


@pytest.mark.parametrize(
    ("error", "status"),
    [(None, "FINISHED"), (ValueError(), "FAILED"), (KeyboardInterrupt(), "KILLED"), (SystemExit(0), "FINISHED"),
     (SystemExit(), "FINISHED"), (SystemExit(3), "FAILED"), (SystemExit("no"), "FAILED")],
)  # fmt: skip
def test_a_block_ends_its_run_by_what_left_it(kit: Kit, error: BaseException | None, status: str) -> None:
    """And lets it out."""

    def body() -> None:
        with kit.run as run:
            run.log_metric("loss", 0.5)
            if error is not None:
                raise error

    if error is None:
        body()
    else:
        with pytest.raises(type(error)):
            body()
    end = kit.events[-1]
    assert isinstance(end, RunEnded)
    assert status == end.status


def test_a_run_that_was_ended_in_its_block_stays_as_it_was_ended(kit: Kit) -> None:
    """Its status and its time; one that was said to go on ends with the block."""
    with kit.run as run:
        assert run.end("FAILED", 9)
        assert run.set_tag("after", "the end")
    failed, _ = kit.events
    assert RunEnded("FAILED", failed.time_ms, given_ms=9) == failed  # type: ignore[union-attr]  # of this kind
    assert not kit.run._journal._sequence.live.is_open  # type: ignore[union-attr]  # it has one
    with kit.run:
        kit.run.end("RUNNING")
    assert ["RUNNING", "FINISHED"] == [event.status for event in kit.events[2:]]  # type: ignore[union-attr]  # ends


@pytest.mark.parametrize("code", [[1], {}, "a sentence", 0.0])
def test_a_program_may_leave_a_block_with_any_exit_code(code: Any, kit: Kit) -> None:
    """Python prints what is no number, and exits with 1."""
    with pytest.raises(SystemExit), kit.run:
        sys.exit(code)
    assert ["FAILED"] == [event.status for event in kit.events]  # type: ignore[union-attr]  # an end


def test_a_time_that_is_none_does_not_cost_a_run_its_end(kit: Kit, caplog: pytest.LogCaptureFixture) -> None:
    """It ends now."""
    assert kit.run.end("FAILED", "yesterday")  # type: ignore[arg-type]  # on purpose
    (end,) = kit.events
    assert ("FAILED", True) == (end.status, end.time_ms > 1_700_000_000_000)  # type: ignore[union-attr]  # an end
    assert ["the time of 'end' is 'yesterday'"] == [words[27:60].rstrip(";") for words in warnings(caplog)]


def test_a_name_beside_a_tag_of_the_same_meaning_is_the_one_that_counts(kit: Kit) -> None:
    """MLflow would refuse the run; tags copied from another one have its name in them."""
    kit.run.begin("mine", "", {"mlflow.runName": "another's", "t": 1}, None, resumed=False)
    kit.run.begin("renamed", "", {}, None, resumed=True)
    kit.run.begin(None, "", {"mlflow.runName": "by tag"}, None, resumed=False)
    first, second, third = kit.events
    assert ("mine", {"mlflow.runName": "mine", "t": "1"}) == (first.run_name, first.tags)  # type: ignore[union-attr]
    assert {"mlflow.runName": "renamed"} == second.tags  # type: ignore[union-attr]
    assert (None, {"mlflow.runName": "by tag"}) == (third.run_name, third.tags)  # type: ignore[union-attr]


def test_a_value_of_any_length_costs_no_other_its_place(kit: Kit, caplog: pytest.LogCaptureFixture) -> None:
    """It is cut to much more than MLflow keeps; what is too much for one event is several."""
    huge = "x" * 17_000_000
    assert kit.run.log_params({"lr": 0.1, "dump": huge})
    assert kit.run.set_tags({f"t{n}": "\N{SNOWMAN}" * 900_000 for n in range(7)})
    assert kit.run.begin(huge, "", {"team": "a", "dump": huge, "b": huge, "c": huge}, None, resumed=False)
    params, *tags, begin, more = kit.events
    assert ("0.1", 1_000_000) == (params.values["lr"], len(params.values["dump"]))  # type: ignore[union-attr]
    assert [2, 2, 2, 1] == [len(part.values) for part in tags]  # type: ignore[union-attr]
    assert ("a", 1_000_000, 2) == (begin.tags["team"], len(begin.run_name or ""), len(more.values))  # type: ignore[union-attr]
    assert {"over_long_values": 12} == kit.counters.snapshot()
    assert any("the run name" in words for words in warnings(caplog))


def test_the_tag_by_which_a_run_is_found_cannot_be_set(kit: Kit, caplog: pytest.LogCaptureFixture) -> None:
    """A run with another's would be taken for that one."""
    assert not kit.run.set_tags({"mlflow_outbox.run_id": "another", "t": "kept"})
    (tags,) = kit.events
    assert {"t": "kept"} == tags.values  # type: ignore[union-attr]
    assert ["mlflow_outbox.run_id"] == [words.split("'")[1] for words in warnings(caplog)]


def test_each_file_that_is_refused_is_said(kit: Kit, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """One warning names one thing."""
    for name in ("a.txt", "b.txt", "a.txt"):
        assert not kit.run.log_text("text", f"../text-{name}")
        assert not kit.run.log_dict({}, f"../dict-{name}")
        assert not kit.run.log_figure(object(), name)
    for folder in ("x", "y", "x"):
        assert not kit.run.log_artifacts(tmp_path / folder)
        assert not kit.run.log_artifact(__file__, f"../{folder}")
        assert not kit.run.log_artifact(tmp_path)
    assert 11 == len(warnings(caplog))
    assert any("directory; use log_artifacts" in words for words in warnings(caplog))


def test_a_beginning_that_is_partly_refused_begins_all_the_same(kit: Kit) -> None:
    """A bad name, time or tag, a user that is no Unicode, must not cost a run."""
    kit.run.begin("\ud800", "us\udce9r", {"bad#key": 1, "good": 2}, "noon", resumed=False)  # type: ignore[arg-type]  # bad input
    start = kit.events[0]
    assert isinstance(start, RunStarted)
    assert (None, "us?r", {"good": "2"}) == (start.run_name, start.user, start.tags)
    assert start.time_ms > 1_700_000_000_000
    assert {"refused_bad_value": 1, "refused_bad_time": 1, "refused_bad_key": 1} == kit.counters.snapshot()


class Unresolved(Mapping[str, object]):
    """A mapping whose values fail, as those of a lazy configuration do."""

    def __getitem__(self, key: str) -> object:
        raise Mute

    def __iter__(self) -> Iterator[str]:
        return iter(["a"])

    def __len__(self) -> int:
        return 1


class Unprintable:
    """An object without a repr."""

    def __repr__(self) -> str:
        raise Mute


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"tags": Unresolved()}, "refused_bad_mapping"),
        ({"tags": 5}, "refused_bad_mapping"),
        ({"tags": {"a": Unprintable()}}, "refused_bad_value"),
        ({"run_id": Unprintable()}, "refused_bad_run_id"),
        ({"run_id": np.zeros(2)}, "refused_bad_run_id"),
        ({"run_name": Unprintable()}, "refused_bad_value"),
        ({"start_time": Unprintable()}, "refused_bad_time"),
    ],
)
def test_a_run_starts_whatever_it_is_given(given: dict[str, Any], reason: str, tmp_path: Path) -> None:
    """What cannot be used is counted, and left out."""
    tracker = MLflowTracker("e", "http://127.0.0.1:9", outbox_dir=tmp_path, worker="none")
    with tracker.start_run(**given) as run:
        assert run.log_metric("loss", 0.5, step=0)
    assert {reason: 1} == tracker.counters
    assert tracker.outbox_path is not None
    assert isinstance(Everything(tracker.outbox_path / "runs" / run.run_id).events[0], RunStarted)
    tracker.close(0)
    disabled = MLflowTracker("e", outbox_dir=tmp_path, settings=Settings(disabled=True))
    assert not disabled.start_run(**given).log_metric("loss", 0.5)


def test_a_strict_tracker_refuses_a_run_id_that_is_none_as_any_other_input(tmp_path: Path) -> None:
    """By the error that its documentation names, with the counter's reason."""
    tracker = MLflowTracker(
        "e", "http://127.0.0.1:9", outbox_dir=tmp_path, worker="none", settings=Settings(strict=True)
    )
    with pytest.raises(EventRefused, match="the run id") as caught:
        tracker.start_run(run_id="../elsewhere")
    assert ("bad_run_id", {"refused_bad_run_id": 1}) == (caught.value.reason, tracker.counters)
    tracker.close(0)


class Nowhere(os.PathLike[str]):
    """A path without a text, as that of a mount that is gone."""

    def __fspath__(self) -> str:
        raise Mute


def test_paths_that_fail_when_they_are_asked_raise_nothing_into_the_program(tmp_path: Path) -> None:
    """A path, a folder, and a generator of plots; each is counted."""
    tracker = MLflowTracker("e", "http://127.0.0.1:9", outbox_dir=tmp_path, worker="none")
    run = tracker.start_run()
    assert not run.log_artifact(Nowhere())
    assert not run.log_artifacts(Nowhere())
    assert not run.log_text("text", Nowhere())  # type: ignore[arg-type]  # bad input
    tracker.log_visualizations(Nowhere() / name for name in "ab")  # type: ignore[operator]  # bad input
    assert {"internal_errors": 3, "refused_bad_mapping": 1} == tracker.counters
    tracker.close(0)


def test_a_run_whose_directory_cannot_be_listed_goes_on_without_raising(tmp_path: Path) -> None:
    """What the disk refuses waits in memory; once it is well, the events are there, of the same run."""
    tracker = MLflowTracker("e", "http://127.0.0.1:9", outbox_dir=tmp_path, worker="none")
    with tracker.start_run("first") as first:
        assert first.log_metric("loss", 0.5, step=0)
    assert tracker.outbox_path is not None
    place = tracker.outbox_path / "runs" / first.run_id
    place.rename(tmp_path / "aside")
    place.touch()
    again = tracker.start_run(run_id=first.run_id)
    assert first.run_id == again.run_id
    assert again.log_metric("loss", 0.25, step=1)
    assert 1 == tracker.counters["internal_errors"]
    place.unlink()
    (tmp_path / "aside").rename(place)
    again.end()
    kept = Everything(place)
    assert [0, 1] == [event.step for event in kept.events if isinstance(event, Metric)]
    tracker.close(0)


# -- what is refused

REFUSED: list[tuple[str, type[EventRefused], Callable[[Run], Any]]] = [
    ("bad_key", InvalidEvent, lambda run: run.log_metric("a#b", 1.0)),
    ("bad_key", InvalidEventType, lambda run: run.log_metric(5, 1.0)),  # type: ignore[arg-type]  # bad input
    ("bad_value", InvalidEventType, lambda run: run.log_metric("k", "high")),
    ("bad_step", InvalidEventType, lambda run: run.log_metric("k", 1.0, 3.5)),
    ("bad_step", InvalidEvent, lambda run: run.log_metric("k", 1.0, 2**63)),
    ("bad_step", InvalidEvent, lambda run: run.log_metric("k", 1.0, 10**5000)),  # Python writes no such number
    ("bad_time", InvalidEvent, lambda run: run.log_metric("k", 1.0, 1, -1)),
    ("bad_time", InvalidEvent, lambda run: run.log_metric("k", 1.0, 1, 10**5000)),
    ("bad_mapping", InvalidEventType, lambda run: run.log_metrics([1])),  # type: ignore[arg-type]  # bad input
    ("bad_step", InvalidEventType, lambda run: run.log_metrics({"k": 1.0}, "1")),
    ("bad_value", InvalidEvent, lambda run: run.log_params({"k": "\ud800"})),
    ("bad_key", InvalidEvent, lambda run: run.set_tag("", 1)),
    ("bad_status", InvalidEvent, lambda run: run.end("DONE")),
    ("bad_path", InvalidEvent, lambda run: run.log_text("x", "../x")),
    ("bad_path", InvalidEvent, lambda run: run.log_text("x", "")),
    ("bad_path", InvalidEventType, lambda run: run.log_text("x", None)),  # type: ignore[arg-type]  # bad input
    ("bad_value", InvalidEventType, lambda run: run.log_text(b"x", "x")),  # type: ignore[arg-type]  # bad input
    ("bad_file", ArtifactRefused, lambda run: run.log_artifact("missing")),
    ("bad_file", ArtifactRefused, lambda run: run.log_artifact(".")),
    ("bad_path", InvalidEventType, lambda run: run.log_artifact(5)),  # type: ignore[arg-type]  # bad input
    ("bad_path", InvalidEventType, lambda run: run.log_artifact(os.devnull, 5)),  # type: ignore[arg-type]  # bad input
    ("bad_path", InvalidEvent, lambda run: run.log_artifact(os.devnull, "..")),
    ("bad_file", ArtifactRefused, lambda run: run.log_artifacts("missing")),
    ("bad_figure", InvalidEventType, lambda run: run.log_figure(object(), "x.png")),
]


@pytest.mark.parametrize(("reason", "error", "call"), REFUSED)
def test_a_refusal_is_counted_and_said_once(
    kit: Kit, caplog: pytest.LogCaptureFixture, reason: str, error: type[EventRefused], call: Callable[[Run], Any]
) -> None:
    """I5, I7: it never raises; the second time it is only counted."""
    for _ in range(3):
        assert not call(kit.run)
    assert {f"refused_{reason}": 3} == kit.counters.snapshot()
    assert 1 == len(warnings(caplog))
    assert kit.run.log_metric("good", 1.0), "the run goes on"


@pytest.mark.parametrize(("reason", "error", "call"), REFUSED)
def test_a_strict_run_raises_the_matching_error(
    strict: Kit, caplog: pytest.LogCaptureFixture, reason: str, error: type[EventRefused], call: Callable[[Run], Any]
) -> None:
    """With the counter's name in it, counted once, and without a warning."""
    with pytest.raises(error) as caught:
        call(strict.run)
    assert error is type(caught.value)
    assert (reason, {f"refused_{reason}": 1}) == (caught.value.reason, strict.counters.snapshot())
    assert [] == warnings(caplog)


def test_a_key_warns_once_whatever_its_values(kit: Kit, caplog: pytest.LogCaptureFixture) -> None:
    """A training loop with a mistake in it must not fill the log."""
    for number in range(200):
        kit.run.log_metric("loss", f"nan-{number}")
        kit.run.log_metric("accuracy", 0.5, step=f"epoch-{number}")
        kit.run.log_metrics({"other": [number]})
    assert 3 == len(warnings(caplog))
    assert {"refused_bad_value": 400, "refused_bad_step": 200} == kit.counters.snapshot()


def test_one_bad_value_does_not_hold_back_the_others(kit: Kit) -> None:
    """In a mapping; the call says that not all was kept."""
    assert not kit.run.log_metrics({"a": 1, "b": "x", "c": 3})
    assert not kit.run.log_params({"p#": 1, "q": 2})
    metrics, params = kit.events
    assert ({"a": 1.0, "c": 3.0}, {"q": "2"}) == (metrics.values, params.values)  # type: ignore[union-attr]  # of this kind


def test_a_strict_mapping_is_kept_whole_or_not_at_all(strict: Kit) -> None:
    """So that it can be corrected and logged again."""
    with pytest.raises(InvalidEventType):
        strict.run.log_metrics({"a": 1, "b": "x"})
    assert [] == strict.events


def test_a_strict_run_raises_when_the_event_is_not_kept(strict: Kit, tmp_path: Path) -> None:
    """Memory and disk are full: counted once."""
    full = Kit(tmp_path / "full", strict=True, memory_bytes=0)
    full.disk.fail("write", times=None)
    for call in (lambda: full.run.log_metric("a", 1.0, 1), lambda: full.run.set_tag("a", 1)):
        with pytest.raises(OutboxFull):
            call()
    assert 2 == full.counters["refused_disk"]
    assert 0 == full.counters["refused_full"]


def test_an_error_in_the_library_itself_never_reaches_the_experiment(
    kit: Kit, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I5: counted, said once, and the next call works."""
    with monkeypatch.context() as patch:
        patch.setattr(kit.run, "_append_event", lambda event: 1 / 0)
        for number in range(5):
            assert not kit.run.set_tag("k", number)
    assert {"internal_errors": 5} == kit.counters.snapshot()
    assert 1 == len(warnings(caplog))
    assert kit.run.set_tag("k", 1)


def test_an_error_without_words_never_reaches_the_experiment(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    """I5: neither one that a user's object raises, which costs its own value only, nor one of the library."""

    class Failing:
        def __str__(self) -> str:
            raise Mute

    assert not kit.run.log_params({"p": Failing(), "q": 2})
    assert [{"q": "2"}] == [event.values for event in kit.events if isinstance(event, Params)]

    def fail(_: Event) -> bool:
        raise Mute

    monkeypatch.setattr(kit.run, "_append_event", fail)
    assert not kit.run.set_tag("k", 1)
    assert {"refused_bad_value": 1, "internal_errors": 1} == kit.counters.snapshot()


def test_long_values_are_kept_whole_and_said(kit: Kit, caplog: pytest.LogCaptureFixture) -> None:
    """F66: MLflow decides what it does with them."""
    for _ in range(2):
        assert kit.run.log_param("p", "x" * 6001)
        assert kit.run.set_tag("t", "x" * 8001)
    assert [6001, 8001] * 2 == [len(next(iter(event.values.values()))) for event in kit.events]  # type: ignore[union-attr]  # of this kind
    assert 2 == len(warnings(caplog))
    assert 4 == kit.counters["over_long_values"]


def test_seconds_given_as_milliseconds_are_said(kit: Kit, caplog: pytest.LogCaptureFixture) -> None:
    """``time.time()``; the point is kept as given."""
    for _ in range(3):
        assert kit.run.log_metric("loss", 1.0, 1, timestamp=1.7e9)
    assert 1 == len(warnings(caplog))


def test_a_run_without_an_outbox_swallows_everything() -> None:
    """Tracking is disabled: no call raises."""
    counters = Counters()
    run = Run(None, RUN, Settings(strict=True), counters)
    run.begin("n", "u", {}, None, resumed=False)
    results = [run.log_metric("a", 1.0, 1), run.log_metric("a", 1.0, 1), run.log_text("x", "x"), run.end()]
    assert not any(results)


# -- manners


@pytest.mark.parametrize("strict", [False, True])
def test_a_metric_for_which_there_is_no_memory_is_refused_and_counted(
    kit: Kit, strict: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in any other call: it raises only when strict, and the next event is kept."""
    counters = Counters()
    run = Run(kit.journal, RUN, Settings(strict=strict), counters)
    assert run.log_metric("loss", 1.0, 1)

    def encode(_: object) -> bytes:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("mlflow_outbox.spool.journal.encode", encode)
        if strict:
            with pytest.raises(MemoryError):
                run.log_metric("loss", 2.0, 2)
        else:
            assert not run.log_metric("loss", 2.0, 2)
            assert {"internal_errors": 1} == counters.snapshot()
    assert run.log_metric("loss", 3.0, 3)
    assert [1, 3] == [event.step for event in kit.events]


def test_a_run_leaves_its_host_as_it_was(kit: Kit) -> None:
    """Nothing in the current directory, environment, umask, logging, signal handlers or threads is touched."""
    threads = set(threading.enumerate())  # those of other tests of this process may end meanwhile

    def state() -> Any:
        umask = os.umask(0o22)
        os.umask(umask)
        root = logging.getLogger()
        handlers = [signal.getsignal(number) for number in signal.valid_signals()]
        started = set(threading.enumerate()) - threads
        return dict(os.environ), umask, root.level, root.handlers[:], handlers, started, os.getcwd()

    before = state()
    kit.run.begin("n", "u", {}, None, resumed=False)
    kit.run.log_metric("loss", 1.0, 1)
    kit.run.log_text("x", "x.txt")
    kit.run.log_dict({}, "x.json")
    kit.run.end()
    assert before == state()
    assert [] == list(Path.cwd().iterdir())


def open_segments(outbox: Path) -> int:
    """Return how many segments of an outbox this process has open."""
    return sum(path.endswith(".log") for path in open_files(outbox))


def test_a_run_that_is_dropped_gives_its_descriptor_back(tmp_path: Path) -> None:
    """Without having ended: its events are whole, its segment is closed, and it goes on by its id."""
    settings = Settings(sync_interval=0.01)
    tracker = MLflowTracker("e", "http://127.0.0.1:9", outbox_dir=tmp_path, worker="none", settings=settings)
    held = tracker.start_run("held")
    assert held.log_metric("loss", 0.5, step=0)
    names = []
    for number in range(50):
        run = tracker.start_run(f"dropped {number}")
        assert run.log_metric("loss", 0.5, step=number)
        names.append(run.run_id)
    del run
    assert tracker.outbox_path is not None
    outbox = tracker.outbox_path
    eventually(lambda: open_segments(outbox) == 1, message="only the one that is held is open")
    for number, run_id in enumerate(names):
        found = Everything(outbox / "runs" / run_id)
        start, point = found.events
        assert isinstance(start, RunStarted)
        assert number == point.step  # type: ignore[union-attr]  # of this kind
    again = tracker.start_run(run_id=names[0])
    assert again.log_metric("loss", 0.25, step=1)
    assert 4 == len(Everything(outbox / "runs" / names[0]).events)
    tracker.close(0)


def test_dropping_a_run_waits_for_nobody_who_writes_to_its_journal(kit: Kit) -> None:
    """It may be collected in the middle of any call, and while the background syncs it."""
    journal, entered, go_on = kit.journal, threading.Event(), threading.Event()
    assert kit.run.log_metric("loss", 0.5, step=0)

    def hold() -> None:
        with journal._lock:
            entered.set()
            go_on.wait(60)

    holding, dropping = threading.Thread(target=hold), threading.Thread(target=lambda: delattr(kit, "run"))
    holding.start()
    assert entered.wait(60)
    dropping.start()
    dropping.join(30)
    waited = dropping.is_alive()
    go_on.set()
    holding.join()
    assert not waited
    journal.sync()
    assert journal.is_idle


def test_many_threads_may_use_one_run(kit: Kit) -> None:
    """Metrics, files and tags at once; nothing lost."""

    def log(thread: int) -> None:
        for number in range(50):
            assert kit.run.log_metric(f"m{thread}", float(number), number)
            assert kit.run.log_text(f"{thread}-{number % 5}", f"{thread}/{number % 5}.txt")

    threads = [threading.Thread(target=log, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kinds = collections.Counter(type(event) for event in kit.events)
    assert {Metric: 200, Artifact: 200} == kinds
    assert {} == kit.counters.snapshot()
    assert 20 == len(list((kit.outbox.run(RUN) / "files").iterdir()))


def test_a_run_in_a_forked_child_logs_to_the_same_run(kit: Kit) -> None:
    """As another writer of it."""
    kit.run.log_metric("loss", 1.0, 1)
    pid = os.fork()
    if pid == 0:
        os._exit(0 if kit.run.log_metric("loss", 2.0, 2) and kit.run.log_text("x", "x") else 1)
    assert 0 == os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    kit.run.log_metric("loss", 3.0, 3)
    found = Everything(kit.outbox.run(RUN))
    assert [1, 3] == [event.step for event in found.by_writer[kit.journal.writer]]  # type: ignore[union-attr]  # of this kind
    assert [1, 2, 3] == sorted(found.steps)
    assert 0 == found.missing


def test_events_reach_the_journal_in_the_order_of_the_calls(kit: Kit) -> None:
    """I3: whatever their kind."""
    for number in range(30):
        kit.run.log_metric("m", float(number), number)
        kit.run.set_tag("t", number)
        kit.run.log_param(f"p{number}", number)
    assert [Metric, Tags, Params] * 30 == [type(event) for event in kit.events]
