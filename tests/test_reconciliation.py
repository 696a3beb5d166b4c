"""What is sent once more of what MLflow has already: nothing that would be there twice, and little that would not."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from contents import QUICK, numbered, points, the_run
from mlflow_outbox import MLflowTracker
from mlflow_outbox.destination import resolve
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox.spool.events import RunStarted
from mlflow_outbox.spool.window import Cursor
from mlflow_outbox.testing import faults
from mlflow_outbox.testing.proxy import Action, Exchange, FaultProxy
from mlflow_outbox_worker.ledger import Ledger
from mlflow_outbox_worker.mlflow_sink import open_sink
from mlflow_outbox_worker.planner import Batch
from mlflow_outbox_worker.reconciliation import Packed, Reconciliation, packed
from mlflow_outbox_worker.records import RunRecord
from mlflow_outbox_worker.sink import MetricPoint, Sink
from servers import MlflowServer, eventually
from spools import make_journal, metric
from workers import delivering

Opens = Callable[[str], Sink]
VALUES = [0.5, -0.0, 0.0, math.inf, -math.inf, math.nan, 1e308]


def test_a_point_is_told_from_others_exactly() -> None:
    """By value, time and step; NaN is NaN however it was made."""
    some = [MetricPoint("k", value, time, step) for value in VALUES for time in (0, 1) for step in (-1, 0, 2**62)]
    held = Packed(map(packed, some))
    assert len(some) == len(held)
    assert all(packed(point) in held for point in some)
    assert packed(MetricPoint("k", -math.nan, 0, 0)) in held
    assert packed(MetricPoint("k", 0.5, 2, 0)) not in held
    assert packed(MetricPoint("k", 0.25, 0, 0)) not in held
    assert packed(MetricPoint("k", 0.5, 0, 1)) not in held
    assert packed(MetricPoint("k", 0.5, 0, 0)) not in Packed([])


def batches(proxy: FaultProxy) -> int:
    """Return how many requests with points came to a proxy."""
    return sum(b'"metrics"' in one.body for one in proxy.requests if one.path.endswith("log-batch"))


def test_a_lost_ledger_sends_a_server_no_point_that_it_has(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """MLflow would look for each of them. What was logged since is sent."""
    with FaultProxy(mlflow_server.url) as proxy:
        settings = dataclasses.replace(QUICK, batch_points=10)
        tracker = MLflowTracker(experiment_name, proxy.url, outbox_dir=tmp_path, settings=settings)
        run = tracker.start_run("r")
        for step in range(100):
            run.log_metrics({"loss": 0.5 * step, "nan": math.nan}, step=step)
        assert tracker.flush(60)
        first = batches(proxy)
        assert first >= 20
        assert tracker.close(60)
        shutil.rmtree(next(tmp_path.glob("*/delivery")))
        for step in range(100, 110):
            run.log_metric("loss", 0.5 * step, step=step)
        assert tracker.close(60)
        assert batches(proxy) - first <= 2
    held = the_run(mlflow_server.url, experiment_name).info.run_id
    assert numbered(110) == points(mlflow_server.url, held, "loss")


@pytest.fixture
def opened() -> Iterator[Opens]:
    """Open a sink; it is closed after the test."""
    with contextlib.ExitStack() as sinks:
        yield lambda uri: sinks.enter_context(contextlib.closing(open_sink(uri, artifact_root=None, timeout=10)))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[str]]:
    """Count the pages of histories that a sink is asked for: ``counted(sink)`` returns the list of their keys."""

    def count(sink: Any) -> list[str]:
        asked: list[str] = []
        page = sink.metric_page

        def metric_page(run_id: str, key: str, token: str | None) -> Any:
            asked.append(key)
            return page(run_id, key, token)

        monkeypatch.setattr(sink, "metric_page", metric_page)
        return asked

    return count


def window(steps: range) -> list[Any]:
    """Return the requests of a window."""
    return [Batch([MetricPoint("loss", 0.5, 1000, step) for step in steps], {}, {}, 1000)]


@pytest.mark.parametrize("kind", ["file", "http"])
def test_a_history_is_read_once_however_many_windows_are_compared(
    kind: str,
    mlflow_server: MlflowServer,
    experiment_name: str,
    file_uri: str,
    ledger: Ledger,
    opened: Opens,
    counted: Callable[[Any], list[str]],
) -> None:
    """A run of a million points has a thousand windows."""
    sink = opened({"file": file_uri, "http": mlflow_server.url}[kind])
    run_id = sink.create_run(sink.experiment_id(experiment_name), run_name="r", start_time_ms=0, user="", tags={})
    sink.log_batch(run_id, window(range(50))[0].points, {}, {})
    record = RunRecord("local", remote_id=run_id, adopted=True)
    asked = counted(sink)
    compared = Reconciliation(sink, ledger)
    compared.found("local")
    for begin in range(0, 50, 10):
        assert [] == compared.unsent(record, window(range(begin, begin + 10)))
        record.uncertain = None  # as the courier notes it once a window is delivered
    assert ["loss"] == asked
    (rest,) = compared.unsent(record, window(range(45, 55)))
    assert [50, 51, 52, 53, 54] == [point.step for point in rest.points]
    assert ["loss"] == asked


def test_a_database_that_leaves_out_what_it_has_is_sent_it_again(
    sqlite_uri: str, ledger: Ledger, opened: Opens, counted: Callable[[Any], list[str]]
) -> None:
    """To compare would cost more than to send."""
    sink = opened(sqlite_uri)
    run_id = sink.create_run(sink.experiment_id("e"), run_name="r", start_time_ms=0, user="", tags={})
    sink.log_batch(run_id, window(range(10))[0].points, {}, {})
    asked = counted(sink)
    compared = Reconciliation(sink, ledger)
    compared.found("local")
    (again,) = compared.unsent(RunRecord("local", remote_id=run_id, adopted=True), window(range(10)))
    sink.log_batch(run_id, again.points, {}, {})
    assert [] == asked
    assert {(step, 0.5): 1 for step in range(10)} == dict(points(sqlite_uri, run_id, "loss"))


def test_a_store_that_would_have_points_twice_is_read_anew_for_a_window_in_doubt(
    file_uri: str, ledger: Ledger, opened: Opens, counted: Callable[[Any], list[str]]
) -> None:
    """An attempt that was broken off may have left a part of the window there."""
    sink = opened(file_uri)
    run_id = sink.create_run(sink.experiment_id("e"), run_name="r", start_time_ms=0, user="", tags={})
    record = RunRecord("local", remote_id=run_id)
    asked = counted(sink)
    compared = Reconciliation(sink, ledger)
    (first,) = compared.unsent(record, window(range(10)))
    assert 10 == len(first.points)
    sink.log_batch(run_id, first.points[:4], {}, {})
    (again,) = compared.unsent(record, window(range(10)))
    assert [4, 5, 6, 7, 8, 9] == [point.step for point in again.points]
    assert ["loss", "loss"] == asked


def test_a_history_is_read_once_although_all_that_comes_is_new(
    file_uri: str, ledger: Ledger, opened: Opens, counted: Callable[[Any], list[str]]
) -> None:
    """All of a run that was found is compared for as long as it goes on: each run of ``outbox+file:`` is one."""
    sink = opened(file_uri)
    run_id = sink.create_run(sink.experiment_id("e"), run_name="r", start_time_ms=0, user="", tags={})
    sink.log_batch(run_id, window(range(10))[0].points, {}, {})
    record = RunRecord("local", remote_id=run_id, adopted=True)
    asked = counted(sink)
    compared = Reconciliation(sink, ledger)

    def send(steps: range, writer: str = "a") -> None:
        for step in compared.unsent(record, window(steps), {writer}):
            sink.log_batch(run_id, step.points, {}, {})

    def delivered(seq: int) -> None:
        record.uncertain, record.cursors = None, {"a": Cursor(0, 0, seq)}
        compared.caught_up("local")

    for begin in range(0, 50, 10):
        send(range(begin, begin + 10))
        delivered(begin + 10)
    assert ["loss"] == asked
    send(range(50, 60))
    send(range(50, 60))
    delivered(60)
    assert ["loss"] * 2 == asked, "the second time it is in doubt"
    sink.log_batch(run_id, window(range(60, 70))[0].points, {}, {})
    send(range(60, 70), "b")
    delivered(70)
    assert ["loss"] * 3 == asked, "what another writer logged may have been sent from elsewhere"
    record.settled = {"a": Cursor(0, 0, 70)}
    send(range(70))
    assert ["loss"] * 4 == asked, "it is sent once more, for something is not there any more"
    assert {(step, 0.5): 1 for step in range(70)} == dict(points(file_uri, run_id, "loss"))


def test_what_another_machine_has_delivered_of_one_writer_is_not_there_twice_for_what_another_one_logged_since(
    file_uri: str, tmp_path: Path
) -> None:
    """This machine's ledger knows of neither; the first writer has more than one window that is new."""
    settings = dataclasses.replace(QUICK, batch_points=10)
    outbox = OutboxDirectory.create(tmp_path / "outbox", resolve(file_uri), now_ms=1)
    first, second = make_journal(outbox), make_journal(outbox)
    assert first.append(RunStarted(1_700_000_000_000, "r", "me", {}, False))
    assert second.append(metric(100))
    with delivering(outbox, file_uri, settings) as counters:
        eventually(lambda: 2 == counters["delivered"], 60)
    shutil.copytree(outbox.ledger, tmp_path / "this machine's")
    for number in range(101, 111):
        assert second.append(metric(number))
    with delivering(outbox, file_uri, settings) as counters:
        eventually(lambda: 10 == counters["delivered"], 60)
    shutil.rmtree(outbox.ledger)
    (tmp_path / "this machine's").rename(outbox.ledger)
    for number in range(30):
        assert first.append(metric(number))
    with delivering(outbox, file_uri, settings) as counters:
        eventually(lambda: 40 == counters["delivered"], 60)
    first.close()
    second.close()
    held = points(file_uri, the_run(file_uri, "exp").info.run_id, "loss")
    assert {(number, float(number)): 1 for number in (*range(30), *range(100, 111))} == dict(held)


@pytest.mark.parametrize("kind", ["file", "http", "sqlite"])
def test_a_history_that_is_too_long_to_hold_doubles_nothing(
    kind: str,
    mlflow_server: MlflowServer,
    experiment_name: str,
    sqlite_uri: str,
    file_uri: str,
    ledger: Ledger,
    opened: Opens,
) -> None:
    """It is read anew for each window, or left to the store to compare."""
    uri = {"file": file_uri, "http": mlflow_server.url, "sqlite": sqlite_uri}[kind]
    sink = opened(uri)
    run_id = sink.create_run(sink.experiment_id(experiment_name), run_name="r", start_time_ms=0, user="", tags={})
    sink.log_batch(run_id, window(range(20))[0].points, {}, {})
    record = RunRecord("local", remote_id=run_id, adopted=True)
    compared = Reconciliation(sink, ledger, most=10)
    compared.found("local")
    for begin in (0, 10, 20):
        for step in compared.unsent(record, window(range(begin, begin + 10))):
            sink.log_batch(run_id, step.points, {}, {})
    assert {(step, 0.5): 1 for step in range(30)} == dict(points(uri, run_id, "loss"))


def test_points_that_were_answered_for_beside_a_failure_are_left_out_of_the_same_run_alone(
    mlflow_server: MlflowServer, opened: Opens, ledger: Ledger
) -> None:
    """Until they are behind. A run that was lost and made anew in MLflow gets all of them."""
    reconciliation = Reconciliation(opened(mlflow_server.url), ledger)
    record = RunRecord("a" * 32, remote_id="b" * 32)
    whole = [
        Batch([MetricPoint("m", 0.5, step, step) for step in range(3 * part, 3 * part + 3)], {}, {}, 0)
        for part in range(3)
    ]
    reconciliation.answered(record, [whole[0], whole[2]])
    for _ in range(3):
        assert [whole[1]] == reconciliation.unsent(record, [*whole]), "it failed again"
    assert [] == reconciliation.unsent(record, whole[:1])
    reconciliation.recorded(record.run_id)
    assert whole[:2] == reconciliation.unsent(record, [*whole]), "the first is behind"
    reconciliation.recorded(record.run_id)
    assert whole == reconciliation.unsent(record, [*whole]), "they are behind"
    reconciliation.answered(record, [whole[0], whole[2]])
    record.remote_id = "c" * 32
    assert whole == reconciliation.unsent(record, [*whole])


@pytest.mark.compatibility
def test_points_that_are_no_number_arrive_again_and_twice(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """The answer to their first batch is lost. A server of MLflow 3.9 refuses what it has of NaN, for ever."""
    with FaultProxy(mlflow_server.url) as proxy:
        tracker = MLflowTracker(experiment_name, proxy.url, outbox_dir=tmp_path, worker="none", settings=QUICK)
        with tracker.start_run() as run:
            for number in range(10):
                run.log_metric("loss", math.nan if number % 2 else number, step=number)
            for _ in range(50):
                run.log_metric("same", math.nan)
        tracker.close(0)
        assert tracker.outbox_path is not None
        proxy.on("log-batch", faults.forward_then_drop_response())
        with delivering(OutboxDirectory.open(tracker.outbox_path), proxy.url, QUICK) as counters:
            eventually(lambda: 62 == counters["delivered"], 60)
    held = the_run(mlflow_server.url, experiment_name)
    history = points(mlflow_server.url, held.info.run_id, "loss")
    assert [*range(10)] == sorted(step for step, _ in history.elements())
    assert 5 == sum(math.isnan(value) for _, value in history)
    assert math.isnan(held.data.metrics["same"])


def test_a_batch_that_is_refused_for_a_row_that_is_there_is_compared_with_what_the_store_has(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """As a server of MLflow 3.9 refuses NaN that it has; what it has not is sent."""
    there = json.dumps(
        {"error_code": "BAD_REQUEST", "message": "(IntegrityError) UNIQUE constraint failed: metrics.key"}
    )

    def take_and_refuse(exchange: Exchange) -> None:
        exchange.fetch()
        exchange.run(faults.status(400, body=there))

    with FaultProxy(mlflow_server.url) as proxy:
        settings = dataclasses.replace(QUICK, batch_points=10)
        tracker = MLflowTracker(experiment_name, proxy.url, outbox_dir=tmp_path, worker="none", settings=settings)
        with tracker.start_run() as run:
            for step in range(20):
                run.log_metric("loss", step / 2, step=step)
        tracker.close(0)
        assert tracker.outbox_path is not None
        proxy.on("log-batch", Action("take_and_refuse", take_and_refuse))
        proxy.on("log-batch", faults.status(400, body=there), times=None, body=lambda body: b'"step":3}' in body)
        with delivering(OutboxDirectory.open(tracker.outbox_path), proxy.url, settings) as counters:
            eventually(lambda: 22 == counters["delivered"], 60)
    held = the_run(mlflow_server.url, experiment_name).info.run_id
    assert numbered(20) == points(mlflow_server.url, held, "loss")
