"""The server is down from the start, dies in the middle, comes back: logging does not notice, all arrives once."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from contents import QUICK, artifact_text, client, numbered, points, runs, the_run
from mlflow_outbox import MLflowTracker
from mlflow_outbox.counters import Counters
from mlflow_outbox.destination import resolve
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox.testing import faults
from mlflow_outbox.testing.proxy import Action, Exchange, FaultProxy
from mlflow_outbox_worker import upkeep
from mlflow_outbox_worker.delivery import Delivery
from mlflow_outbox_worker.mlflow_sink import open_sink
from mlflow_outbox_worker.thread import ThreadWorker
from servers import MlflowServer, eventually
from workers import delivering


def kept_waiting() -> float:
    """Return for how many seconds this thread could have gone on, and the processors were busy with others."""
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9


def log_session(tracker: MLflowTracker, first: int, last: int) -> list[float]:
    """Log some runs of numbered points with params, tags and files; return how long each call took, in seconds.

    Not counted is the time for which it had no processor: how busy a machine is says nothing about the calls.
    """
    took: list[float] = []

    def timed(call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        before, begun = kept_waiting(), time.perf_counter()
        result = call(*arguments, **named)
        spent = time.perf_counter() - begun
        took.append(spent - (kept_waiting() - before))
        return result

    for number in range(first, last):
        run = timed(tracker.start_run, f"run{number}", tags={"number": str(number)})
        for i in range(150):
            timed(run.log_metric, "loss", i / 2, step=i)
        timed(run.log_params, {"depth": number, "kind": "tree"})
        timed(run.set_tag, "stage", "last")
        timed(run.log_text, f"text of run {number}", "notes/text.txt")
        timed(run.end)
    return took


def check_session(uri: str, experiment: str, count: int) -> None:
    """Check that MLflow holds every run of ``log_session`` once and whole."""
    held = {run.info.run_name: run for run in runs(uri, experiment)}
    listed = [run.info.run_name for run in runs(uri, experiment)]
    assert sorted(f"run{n}" for n in range(count)) == sorted(listed)
    for number in range(count):
        run = held[f"run{number}"]
        assert numbered(150) == points(uri, run.info.run_id, "loss")
        assert {"depth": str(number), "kind": "tree"} == run.data.params
        assert "last" == run.data.tags["stage"]
        assert "FINISHED" == run.info.status
        assert f"text of run {number}" == artifact_text(uri, run.info.run_id, "notes/text.txt")


def test_down_from_the_start(
    own_mlflow_server: Callable[..., MlflowServer], experiment_name: str, tmp_path: Path
) -> None:
    """A session that never saw the server delivers all of it once the server is there."""
    server = own_mlflow_server()
    server.kill()
    tracker = MLflowTracker(experiment_name, server.url, outbox_dir=tmp_path, settings=QUICK)
    assert not tracker.disabled
    took = log_session(tracker, 0, 5)
    assert max(took) < 1.0
    left = tracker.flush(0.5)
    assert not left
    assert (left.pending, 0, 0) == (left.pending, left.parked, left.dead)
    server.start()
    assert tracker.close(60)
    check_session(server.url, experiment_name, 5)
    assert 0 == tracker.counters.get("dead_letters", 0)


def test_killed_in_the_middle_and_back_again(
    own_mlflow_server: Callable[..., MlflowServer], experiment_name: str, tmp_path: Path
) -> None:
    """The server is killed twice with SIGKILL while events are under way."""
    server = own_mlflow_server()
    tracker = MLflowTracker(experiment_name, server.url, outbox_dir=tmp_path, settings=QUICK)
    log_session(tracker, 0, 3)
    eventually(lambda: runs(server.url, experiment_name))
    server.kill()
    log_session(tracker, 3, 6)
    eventually(lambda: tracker.counters.get("retried", 0) > 0)
    server.restart()
    eventually(lambda: len(runs(server.url, experiment_name)) > 3)
    server.kill()
    log_session(tracker, 6, 8)
    server.restart()
    assert tracker.close(60)
    check_session(server.url, experiment_name, 8)
    assert 0 == tracker.counters.get("dead_letters", 0)


def test_a_server_that_hangs_holds_up_neither_logging_nor_flush(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Requests are accepted and never answered; flush keeps its time, and everything arrives afterwards."""
    with FaultProxy(mlflow_server.url) as proxy:
        proxy.on(lambda method, path: True, faults.accept_hang(), times=None)
        settings = QUICK.__class__(poll_interval=0.02, retry_initial=0.02, retry_max=0.2, request_timeout=1.0)
        tracker = MLflowTracker(experiment_name, proxy.url, outbox_dir=tmp_path, settings=settings)
        assert max(log_session(tracker, 0, 2)) < 1.0
        begun, before = time.monotonic(), kept_waiting()
        assert not tracker.flush(1.5)
        took = time.monotonic() - begun
        assert 1.5 <= took
        assert took - (kept_waiting() - before) < 2.5
        proxy.clear()
        assert tracker.close(60)
    check_session(mlflow_server.url, experiment_name, 2)


@pytest.mark.parametrize(
    "answer",
    [
        faults.status(500),
        faults.status(502),
        faults.status(503, {"Retry-After": "0"}),
        faults.status(504),
        faults.status(429),
    ],
    ids=["500", "502", "503", "504", "429"],
)
def test_errors_of_the_server_are_retried_and_never_a_dead_letter(
    answer: Action, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Each answer that says "later", at the first three requests of each kind, delays and loses nothing."""
    with FaultProxy(mlflow_server.url) as proxy:
        for path in ("experiments/get-by-name", "runs/create", "runs/log-batch", "runs/update", "mlflow-artifacts"):
            proxy.on(path, answer, times=3)
        # A create that may have been carried out is waited for as long as a request (twins): half a minute by default.
        settings = dataclasses.replace(QUICK, request_timeout=5.0)
        tracker = MLflowTracker(experiment_name, proxy.url, outbox_dir=tmp_path, settings=settings)
        log_session(tracker, 0, 2)
        assert tracker.close(60)
    check_session(mlflow_server.url, experiment_name, 2)
    assert 0 == tracker.counters.get("dead_letters", 0)


def test_a_text_that_the_database_of_a_server_never_takes_holds_up_nothing(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """PostgreSQL and a NUL: the server answers 500, as to a mistake of its own, and only the texts are refused."""
    said = json.dumps(
        {"error_code": "INTERNAL_ERROR", "message": "A string literal cannot contain NUL (0x00) characters."}
    )
    with FaultProxy(mlflow_server.url) as proxy:
        for path in ("runs/create", "runs/log-batch"):
            proxy.on(path, faults.status(500, body=said), times=None, body="\\u0000")
        tracker = MLflowTracker(experiment_name, proxy.url, outbox_dir=tmp_path, settings=QUICK)
        with tracker.start_run("with\0nul") as run:
            run.log_params({"good": 1, "bad": "a\0b"})
            run.log_metric("loss", 0.5)
        result = tracker.close(60)
    assert (0, 0, 2) == (result.pending, result.parked, tracker.counters["dead_letters"])
    held = the_run(mlflow_server.url, experiment_name)
    assert ("withnul", "FINISHED") == (held.info.run_name, held.info.status)
    assert ({"good": "1"}, {"loss": 0.5}) == (held.data.params, held.data.metrics)


@pytest.mark.parametrize(
    "answer",
    [faults.status(401), faults.status(403), faults.html_page()],
    ids=["401", "403", "login page"],
)
def test_a_refused_login_parks_everything_until_a_person_has_acted(
    answer: Action, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Events are counted as parked, none becomes a dead letter, and all arrive when the login works again."""
    with FaultProxy(mlflow_server.url) as proxy:
        proxy.on(lambda method, path: True, answer, times=None)
        tracker = MLflowTracker(experiment_name, proxy.url, outbox_dir=tmp_path, settings=QUICK)
        log_session(tracker, 0, 2)
        result = tracker.flush(20)
        assert not result
        assert (0, 0) == (result.pending, result.dead)
        assert result.parked > 300
        proxy.clear()
        assert eventually(lambda: tracker.flush(10), 60)
        tracker.close()
    check_session(mlflow_server.url, experiment_name, 2)


def test_a_run_that_has_nothing_to_send_does_not_call_a_server_that_is_away_back(
    own_mlflow_server: Callable[..., MlflowServer],
    experiment_name: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is said once that the server takes no events, however often a verified run, which stays, has its turn."""
    server = own_mlflow_server()
    monkeypatch.setattr(upkeep, "file_run", lambda *_: False)  # somebody reads the ledger all the time
    offline = MLflowTracker(experiment_name, server.url, outbox_dir=tmp_path, worker="none", settings=QUICK)
    assert offline.outbox_path is not None
    directory = OutboxDirectory.open(offline.outbox_path)
    log_session(offline, 0, 1)
    with delivering(directory, server.url, QUICK) as first:
        eventually(lambda: first["runs_verified"], 60)
    [verified] = directory.run_ids()
    server.kill()
    log_session(offline, 1, 2)
    offline.close(0)
    delivery = Delivery(directory, resolve(server.url), QUICK, counters := Counters(), kind="thread")
    caplog.clear()
    worker = ThreadWorker(lambda: delivery, counters)
    worker.start()
    seen = []
    try:
        eventually(lambda: "away" == delivery.condition()[0], 60)
        for _ in range(5):
            failures = counters["retried"]
            directory.ring(verified)
            eventually(lambda failures=failures: counters["retried"] > failures, 60)  # type: ignore[misc]  # mypy infers no default
            seen.append(delivery.condition()[0])
    finally:
        worker.stop(60)
    assert ["away"] * 5 == seen
    assert 1 == sum("does not take events now" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    ("failures", "error", "states"),
    [
        (2, ImportError("cannot import name 'EvaluationDataset' from 'mlflow.entities'"), {"ok"}),
        (9, ImportError("cannot import name 'EvaluationDataset' from 'mlflow.entities'"), {"parked"}),
        (9, TypeError("Descriptors cannot be created directly."), {"parked"}),
    ],
    ids=["now and then", "always", "a library that does not fit"],
)
def test_an_import_that_fails_is_tried_again_before_a_person_is_asked(
    failures: int,
    error: Exception,
    states: set[str],
    mlflow_server: MlflowServer,
    experiment_name: str,
    tmp_path: Path,
) -> None:
    """Another thread may have been importing MLflow; what is broken for good is said."""
    tracker = MLflowTracker(experiment_name, mlflow_server.url, outbox_dir=tmp_path, worker="none", settings=QUICK)
    with tracker.start_run("run") as run:
        assert run.log_metric("loss", 0.5)
    tracker.close(0)
    assert tracker.outbox_path is not None
    left = iter(range(failures))

    def open_(uri: str, **given: Any) -> Any:
        if next(left, None) is not None:
            raise error
        return open_sink(uri, **given)

    directory, counters = OutboxDirectory.open(tracker.outbox_path), Counters()
    delivery = Delivery(directory, resolve(mlflow_server.url), QUICK, counters, kind="thread", open_sink=open_)
    worker = ThreadWorker(lambda: delivery, counters)
    worker.start()
    try:
        eventually(lambda: delivery.condition()[0] in states, 60)
    finally:
        worker.stop(60)
    assert (min(failures, 3), 0) == (counters["imports_failed"], counters["worker_crashes"])


def test_what_was_parked_for_an_earlier_program_is_tried_before_a_flush_calls_it_parked(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """The login works again, but answers slowly: a flush waits for the answer and does not repeat an old one."""
    with FaultProxy(mlflow_server.url) as proxy:
        proxy.on(lambda method, path: True, faults.status(401), times=None)
        with MLflowTracker(experiment_name, proxy.url, outbox_dir=tmp_path, settings=QUICK) as tracker:
            log_session(tracker, 0, 1)
            assert tracker.flush(20).parked > 150
            tracker.close(0)
        proxy.clear()
        proxy.on(lambda method, path: True, faults.delay(3), times=1)
        with MLflowTracker(experiment_name, proxy.url, outbox_dir=tmp_path, settings=QUICK) as tracker:
            assert tracker.flush(60)
    check_session(mlflow_server.url, experiment_name, 1)


def test_a_long_run_that_is_tried_first_does_not_keep_the_others_until_it_is_through(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Once a server that was away has taken the first part of one run, the others go beside it."""
    away = threading.Event()
    away.set()
    with FaultProxy(mlflow_server.url) as proxy:
        proxy.on(lambda _, path: away.is_set() and "experiments/get-by-name" in path, faults.status(503), times=None)
        proxy.on("runs/log-batch", faults.forward(), times=1)
        proxy.on("runs/log-batch", faults.accept_hang(), times=1)
        settings = dataclasses.replace(QUICK, batch_points=20, request_timeout=60.0)
        tracker = MLflowTracker(experiment_name, proxy.url, outbox_dir=tmp_path, worker="none", settings=settings)
        for number in range(3):
            with tracker.start_run(f"run{number}") as run:
                for i in range(60):
                    run.log_metric("loss", i / 2, step=i)
        tracker.close(0)
        assert tracker.outbox_path is not None

        def whole() -> list[str]:
            held = runs(mlflow_server.url, experiment_name)
            return [r.info.run_id for r in held if numbered(60) == points(mlflow_server.url, r.info.run_id, "loss")]

        with delivering(OutboxDirectory.open(tracker.outbox_path), proxy.url, settings) as counters:
            eventually(lambda: counters["retried"] > 5, 60)
            away.clear()  # for all of them: after one more failure only one request at a time would be tried
            eventually(lambda: 2 == len(whole()), 60, "the other two arrive while a request of one is under way")
            [hanging] = [r for r in proxy.requests if "accept_hang" == r.action]
            assert hanging.ended is None
            proxy.down()


def test_a_server_that_takes_so_many_files_and_then_wants_a_pause_gets_all_of_them(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Those that it took are not sent to it again and again, at the cost of the others."""
    sent: list[str] = []

    def metered(exchange: Exchange) -> None:
        sent.append(exchange.request.path)
        if len(sent) % 31:
            exchange.forward()
        else:
            exchange.run(faults.status(429, {"Retry-After": "0"}))

    with FaultProxy(mlflow_server.url) as proxy:
        proxy.on(lambda method, path: "PUT" == method, Action("metered", metered), times=None)
        tracker = MLflowTracker(experiment_name, proxy.url, outbox_dir=tmp_path, worker="none", settings=QUICK)
        with tracker.start_run() as run:
            for number in range(100):
                assert run.log_text(str(number), f"{number}.txt")
        tracker.close(0)
        assert tracker.outbox_path is not None
        with delivering(OutboxDirectory.open(tracker.outbox_path), proxy.url, QUICK) as counters:
            eventually(lambda: 102 == counters["delivered"], 60)
    assert 100 == len(set(sent))
    assert len(sent) <= 100 + 20 * counters["retried"], "of each broken window those before the refusal"
    held = the_run(mlflow_server.url, experiment_name)
    assert "99" == artifact_text(mlflow_server.url, held.info.run_id, "99.txt")


def test_a_refusal_that_was_under_way_when_a_flush_began_is_not_taken_for_an_answer_to_it(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """The server refused before the run was restored, and its answer came after: the flush waits for a new attempt."""
    held = threading.Event()

    def late(exchange: Exchange) -> None:
        answer = exchange.fetch()
        held.set()
        if answer is not None and exchange.wait(1.5):
            exchange.send(answer)

    with (
        FaultProxy(mlflow_server.url) as proxy,
        MLflowTracker(experiment_name, proxy.url, outbox_dir=tmp_path, settings=QUICK) as tracker,
        client(mlflow_server.url) as mlflow,
    ):
        run = tracker.start_run("deleted")
        assert tracker.flush(60)
        remote = the_run(mlflow_server.url, experiment_name).info.run_id
        mlflow.delete_run(remote)
        proxy.on("runs/log-batch", Action("late", late), times=1)
        assert run.log_metric("loss", 0.5)
        assert held.wait(60)
        mlflow.restore_run(remote)
        assert tracker.flush(60)
        assert {"loss": 0.5} == mlflow.get_run(remote).data.metrics


@pytest.mark.compatibility
@pytest.mark.parametrize(
    "lost", ["runs/create", "runs/log-batch", "runs/update", "mlflow-artifacts", "experiments/create"]
)
def test_an_answer_lost_after_the_server_committed_doubles_nothing(
    lost: str, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """The server carried the request out and the connection broke: one run, each point once."""
    with FaultProxy(mlflow_server.url) as proxy:
        proxy.on(lost, faults.forward_then_drop_response(), times=3)
        tracker = MLflowTracker(experiment_name, proxy.url, outbox_dir=tmp_path, settings=QUICK)
        log_session(tracker, 0, 2)
        assert tracker.close(60)
        assert [r for r in proxy.requests if lost in r.path and r.backend_status == 200 and r.status is None], (
            "none was lost"
        )
    check_session(mlflow_server.url, experiment_name, 2)


def after_the_next(proxy: FaultProxy) -> Action:
    """Carry a create out once another one was, however long that takes: the search before that one cannot meet it."""

    def run(exchange: Exchange) -> None:
        before = creates(proxy)
        while creates(proxy) == before and exchange.wait(0.02):
            pass
        faults.forward().run(exchange)

    return Action("after the next", run)


@pytest.fixture
def late(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> Iterator[tuple[FaultProxy, MLflowTracker]]:
    """A server that carries the first create out after the second, and a tracker that meets it."""
    with FaultProxy(mlflow_server.url) as proxy:
        proxy.on("runs/create", after_the_next(proxy), times=1)
        settings = dataclasses.replace(QUICK, request_timeout=3.0)
        yield proxy, MLflowTracker(experiment_name, proxy.url, outbox_dir=tmp_path, settings=settings)


def creates(proxy: FaultProxy) -> int:
    """Return how many creates of runs were carried out."""
    return len(
        [request for request in proxy.requests if "runs/create" in request.path and request.backend_status == 200]
    )


def test_a_create_that_is_carried_out_after_the_next_one_leaves_no_second_run(
    late: tuple[FaultProxy, MLflowTracker], mlflow_server: MlflowServer, experiment_name: str
) -> None:
    """It hung beyond its time-out, and neither the search for it nor the next create met it; one run still goes on."""
    proxy, tracker = late
    going = tracker.start_run("going")
    assert going.log_metric("loss", 0.5)
    assert tracker.flush(60)
    proxy.on("runs/create", after_the_next(proxy), times=1)
    with tracker.start_run("ended") as ended:
        assert ended.log_metric("loss", 0.25)
    assert tracker.flush(60)
    eventually(lambda: 4 <= creates(proxy))
    eventually(lambda: ["ended", "going"] == sorted(run.info.run_name for run in runs(proxy.url, experiment_name)))
    going.end()
    assert tracker.close(60)
    held = {run.info.run_name: run.data.metrics for run in runs(mlflow_server.url, experiment_name)}
    assert {"ended": {"loss": 0.25}, "going": {"loss": 0.5}} == held


def test_a_program_that_ends_leaves_no_second_run_that_comes_late(
    late: tuple[FaultProxy, MLflowTracker], mlflow_server: MlflowServer, experiment_name: str
) -> None:
    """Nobody may use the outbox again: closing it waits until none can come, within its time."""
    proxy, tracker = late
    with tracker.start_run("ended") as ended:
        assert ended.log_metric("loss", 0.25)
    assert tracker.close(60)
    eventually(lambda: 2 <= creates(proxy))
    assert ["ended"] == [run.info.run_name for run in runs(mlflow_server.url, experiment_name)]


@pytest.mark.compatibility
def test_a_batch_of_unknown_fate_is_not_doubled_on_a_file_store(
    file_uri: str, experiment_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file store writes half of a batch and all of another, and fails each time: every point is there once."""
    from mlflow.store.tracking.file_store import FileStore

    whole = FileStore.log_batch
    left_to_fail = iter(["half", "all", "half", "all"])

    def fails(self: FileStore, run_id: str, metrics: list[Any], params: list[Any], tags: list[Any]) -> None:
        how = next(left_to_fail, "") if metrics else ""
        whole(self, run_id, metrics[: len(metrics) // 2] if how == "half" else metrics, params, tags)
        if how:
            raise OSError(5, "the disk of the file store failed")

    monkeypatch.setattr(FileStore, "log_batch", fails)
    tracker = MLflowTracker(experiment_name, file_uri, outbox_dir=tmp_path / "outbox", settings=QUICK)
    with tracker.start_run("uncertain") as run:
        for i in range(2500):
            run.log_metric("loss", i / 2, step=i)
    assert tracker.close(60)
    assert "" == next(left_to_fail, ""), "all failures were used"
    assert numbered(2500) == points(file_uri, the_run(file_uri, experiment_name).info.run_id, "loss")
