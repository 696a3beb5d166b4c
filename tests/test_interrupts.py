"""What a signal handler raises reaches the program; what an object raises that was logged is a refusal (I5)."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from mlflow_outbox import MLflowTracker
from spools import Kit


class Limit(Exception):
    """A program's own time limit."""


def raising(kind: type[BaseException]) -> dict[str, Callable[..., object]]:
    """Return handlers of signals that raise, of all shapes that handlers have."""

    def plain(number: int, frame: object) -> None:
        raise kind

    def handle(*_: object) -> None:
        raise kind

    def closed_over(number: int, frame: object) -> object:
        return [frame for _ in [handle()]]

    def wrapping(*given: Any) -> object:
        return plain(*given)

    class Handlers:
        def method(self, number: int, frame: object) -> None:
            raise kind

        def __call__(self, *given: object) -> None:
            raise kind

    return {
        "function": plain,
        "any arguments": handle,
        "closure": closed_over,
        "method": Handlers().method,
        "object": Handlers(),
        "partial": functools.partial(lambda more, number, frame: handle(), "more"),
        "wrapped": functools.wraps(plain)(wrapping),
    }


@pytest.fixture
def install() -> Iterator[Callable[[Callable[..., object]], object]]:
    """Install a handler of SIGUSR1."""
    before = signal.getsignal(signal.SIGUSR1)
    yield lambda handler: signal.signal(signal.SIGUSR1, handler)
    signal.signal(signal.SIGUSR1, before)


Install = Callable[[Callable[..., object]], object]


def interrupt(*_: object, **__: object) -> Any:
    """Be interrupted here."""
    signal.raise_signal(signal.SIGUSR1)


class Slow(Mapping[str, object]):
    """A host's object that is interrupted whatever it is asked."""

    __str__ = __repr__ = __float__ = __index__ = __iter__ = __getitem__ = __len__ = interrupt
    keys = items = interrupt
    savefig = model_dump_json = to_json = interrupt


#: Calls that are interrupted in an object of the program's.
IN_OBJECTS: dict[str, Callable[[Kit], object]] = {
    "a metric": lambda kit: kit.run.log_metric("a", Slow()),
    "a step": lambda kit: kit.run.log_metric("a", 1.0, Slow()),
    "a time": lambda kit: kit.run.log_metric("a", 1.0, timestamp=Slow()),  # type: ignore[arg-type]  # bad input
    "a key": lambda kit: kit.run.log_metric(Slow(), 1.0),  # type: ignore[arg-type]  # bad input
    "metrics": lambda kit: kit.run.log_metrics(Slow()),
    "one of several metrics": lambda kit: kit.run.log_metrics({"a": 1.0, "b": Slow(), "c": 1.0}),
    "a param": lambda kit: kit.run.log_param("a", Slow()),
    "params": lambda kit: kit.run.log_params(Slow()),
    "one of several params": lambda kit: kit.run.log_params({"a": 1, "b": Slow(), "c": 1}),
    "a tag": lambda kit: kit.run.set_tag("a", Slow()),
    "tags": lambda kit: kit.run.set_tags(Slow()),
    "a document": lambda kit: kit.run.log_dict(Slow(), "a.json"),
    "a figure": lambda kit: kit.run.log_figure(Slow(), "a.png"),
    "a status": lambda kit: kit.run.end(Slow()),  # type: ignore[arg-type]  # bad input
    "the beginning": lambda kit: kit.run.begin(Slow(), "me", {}, None, resumed=False),
}


@pytest.mark.parametrize("kind", [TimeoutError, Limit, KeyboardInterrupt])
@pytest.mark.parametrize("call", IN_OBJECTS)
def test_an_interrupt_in_an_object_that_is_logged_reaches_the_program(
    call: str, kind: type[BaseException], kit: Kit, install: Install
) -> None:
    """It is not taken for the object's own error."""
    for handler in raising(kind).values():
        install(handler)
        with pytest.raises(kind):
            IN_OBJECTS[call](kit)
    assert {} == kit.counters.snapshot()
    assert kit.run.log_metric("good", 1.0)


@pytest.mark.parametrize("kind", [TimeoutError, Limit, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["open", "read", "link", "mkdir", "fstat", "scandir"])
def test_an_interrupt_while_files_are_copied_reaches_the_program(
    place: str, kind: type[BaseException], kit: Kit, install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not taken for the disk's error, though it may be an OSError."""
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.txt").write_text("a")
    install(raising(kind)["function"])
    with monkeypatch.context() as patch, pytest.raises(kind):
        patch.setattr(os, place, interrupt)
        kit.run.log_artifacts(tmp_path / "files")
    assert {} == kit.counters.snapshot()
    assert kit.run.log_artifacts(tmp_path / "files")


def test_an_interrupt_while_a_tracker_starts_a_run_or_logs_a_result_reaches_the_program(
    install: Install, tmp_path: Path
) -> None:
    """As one in a logging call does."""
    tracker = MLflowTracker("e", "http://127.0.0.1:9", outbox_dir=tmp_path, worker="none")
    install(raising(Limit)["function"])
    calls: list[Callable[[], object]] = [
        lambda: tracker.start_run(tags=Slow()),
        lambda: tracker.start_run(run_id=Slow()),  # type: ignore[arg-type]  # bad input
        lambda: tracker.log_experiment(Slow()),
    ]
    for call in calls:
        with pytest.raises(Limit):
            call()
    assert set() == {name for name in tracker.counters if name != "refused_bad_run_id"}
    tracker.close(0)


def test_an_interrupt_while_a_worker_is_told_reaches_the_program(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not taken for a worker that cannot be started; the event that was written is not written again."""
    tracker = MLflowTracker("e", "http://127.0.0.1:9", outbox_dir=tmp_path, worker="none")
    install(raising(Limit)["function"])
    run = tracker.start_run()
    outbox: Any = tracker._outbox
    run.end()
    with monkeypatch.context() as patch, pytest.raises(Limit):
        patch.setattr(type(outbox.directory), "ring", interrupt)
        run.log_metric("a", 1.0, step=0)
    assert run.log_metric("a", 1.0, step=1)
    assert {} == tracker.counters
    assert 4 == run._journal.events  # type: ignore[union-attr]  # it has one
    tracker.close(0)


@pytest.mark.parametrize("kind", [TimeoutError, Limit, KeyboardInterrupt])
def test_an_interrupt_while_mlflow_is_asked_reaches_the_program(
    kind: type[BaseException], install: Install, sqlite_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not taken for MLflow's silence, for which there is an answer from the disk."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    from mlflow_outbox_worker.mlflow_sink import stores

    tracker = MLflowTracker("e", sqlite_uri, outbox_dir=tmp_path / "outbox", worker="none")
    tracker.start_run("r").end()
    install(raising(kind)["function"])
    calls: list[Callable[[], object]] = [
        tracker.get_all_runs,
        lambda: tracker.get_best_run("m"),
        lambda: tracker.experiment_id,
        lambda: tracker.client,
    ]
    for call in calls:
        with monkeypatch.context() as patch, pytest.raises(kind):
            patch.setattr(SqlAlchemyStore, "get_experiment_by_name", interrupt)
            patch.setattr(stores, "MlflowClient", interrupt)
            call()
    assert ["r"] == [run["run_name"] for run in tracker.get_all_runs()]


@pytest.mark.parametrize("kind", [TimeoutError, Limit])
def test_an_error_of_an_object_is_a_refusal_also_while_an_interrupt_is_handled(
    kind: type[Exception], kit: Kit, install: Install
) -> None:
    """What the program has caught already is not raised again."""

    class Failing:
        def __str__(self) -> str:
            raise kind

    install(raising(kind)["function"])
    assert not kit.run.log_params({"a": Failing()})
    with pytest.raises(kind):
        interrupt()
    try:
        interrupt()
    except kind:
        assert not kit.run.log_params({"a": Failing()})
    assert {"refused_bad_value": 2} == kit.counters.snapshot()


def test_an_object_that_handles_an_interrupt_itself_is_refused_for_what_it_raises(kit: Kit, install: Install) -> None:
    """An object may have a time limit of its own."""

    class Bounded:
        def __str__(self) -> str:
            try:
                interrupt()
            except Limit:
                raise ValueError from None
            return ""

    install(raising(Limit)["function"])
    assert not kit.run.log_params({"a": Bounded()})
    assert {"refused_bad_value": 1} == kit.counters.snapshot()


@pytest.mark.parametrize("kind", [TimeoutError, Limit])
def test_an_interrupt_while_a_segment_is_begun_reaches_the_program(
    kind: type[BaseException], kit: Kit, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not taken for an outbox that is gone; the next call begins the segment."""
    install(raising(kind)["function"])
    with monkeypatch.context() as patch, pytest.raises(kind):
        patch.setattr(os, "stat", interrupt)
        kit.run.log_metric("a", 1.0, step=0)
    assert kit.run.log_metric("a", 1.0, step=1)
    assert {} == kit.counters.snapshot()
    assert 1 == len(kit.events)
