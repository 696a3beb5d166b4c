"""Batches of points of one run go side by side, and everything else of it in its place."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from contents import QUICK, numbered, points, the_run
from mlflow_outbox import MLflowTracker
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox.testing import faults
from mlflow_outbox.testing.proxy import Action, Exchange, FaultProxy
from mlflow_outbox_worker.mlflow_sink import open_sink
from mlflow_outbox_worker.requests import Requests
from mlflow_outbox_worker.volley import Volley
from servers import MlflowServer, eventually
from workers import delivering

#: The first batch of a turn goes alone; then there are three at once.
SETTINGS = dataclasses.replace(QUICK, batch_points=20, parallel_runs=3)
BATCHES = "runs/log-batch"


class Watch:
    """What of a run is under way: the first step of each batch of points, "param", "tag" or "status" for the rest.

    Attributes:
        order: of the beginnings.
        beside: for each, what was under way when it began or came while it was.
    """

    def __init__(self, proxy: FaultProxy, *, meet: int = 1) -> None:
        self.order: list[int | str] = []
        self.beside: dict[int | str, set[int | str]] = {}
        self._now: set[int | str] = set()
        self._lock = threading.Lock()
        self._met = threading.Barrier(meet)
        for path in (BATCHES, "runs/update"):
            proxy.on(path, Action("watched", self._pass_on), times=None)

    def _pass_on(self, exchange: Exchange) -> None:
        what = kind_of(json.loads(exchange.request.body))
        with self._lock:
            self.order.append(what)
            self.beside[what] = set(self._now)
            for other in self._now:
                self.beside[other].add(what)
            self._now.add(what)
        if isinstance(what, int) and what >= 20:
            self._met.wait(30)
        answer = exchange.fetch()
        with self._lock:
            self._now.discard(what)
        assert answer is not None
        exchange.send(answer)


def kind_of(body: dict[str, Any]) -> int | str:
    """What a request holds; a point whose step is 0 is written without one."""
    if body.get("metrics"):
        return int(body["metrics"][0].get("step", 0))
    return next(name for name in ("params", "tags", "status") if body.get(name))


def holds(step: int) -> Callable[[bytes], bool]:
    """Tell requests with the point of a step."""
    return lambda body: any(point.get("step") == step for point in json.loads(body).get("metrics", ()))


def logged(experiment: str, uri: str, root: Path, count: int, settings: Any = SETTINGS) -> OutboxDirectory:
    """An outbox with a run of so many points, a param before them and a tag behind them: four events more."""
    tracker = MLflowTracker(experiment, uri, outbox_dir=root, worker="none", settings=settings)
    with tracker.start_run("long") as run:
        run.log_params({"p": 1})
        for step in range(count):
            run.log_metric("loss", step / 2, step=step)
        run.set_tags({"t": "last"})
    tracker.close(0)
    assert tracker.outbox_path is not None
    return OutboxDirectory.open(tracker.outbox_path)


def arrived(server: MlflowServer, experiment: str, count: int) -> bool:
    """Whether the run has ended with all its points, each once."""
    run = the_run(server.url, experiment)
    return "FINISHED" == run.info.status and numbered(count) == points(server.url, run.info.run_id, "loss")


def test_as_many_batches_of_a_long_run_are_under_way_as_runs_might_be(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Each of three waits for the other two; what is no point goes before them and behind them, alone."""
    with FaultProxy(mlflow_server.url) as proxy:
        outbox = logged(experiment_name, proxy.url, tmp_path, 140)
        watch = Watch(proxy, meet=3)
        with delivering(outbox, proxy.url, SETTINGS) as counters:
            eventually(lambda: 144 == counters["delivered"], 60)
    assert arrived(mlflow_server, experiment_name, 140)
    assert (["params", 0], ["tags", "status"]) == (watch.order[:2], watch.order[8:])
    assert [set()] * 4 == [watch.beside[what] for what in ("params", 0, "tags", "status")]
    for together in ({20, 40, 60}, {80, 100, 120}):
        assert [together] * 3 == [watch.beside[step] | {step} for step in together]


def test_a_batch_with_a_metric_that_the_run_has_not_had_goes_alone(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """The first of its values is the one place where two batches could meet in a database."""
    with FaultProxy(mlflow_server.url) as proxy:
        tracker = MLflowTracker(experiment_name, proxy.url, outbox_dir=tmp_path, worker="none", settings=SETTINGS)
        with tracker.start_run() as run:
            for step in range(100):
                run.log_metric("late" if step == 70 else "loss", step / 2, step=step)
        tracker.close(0)
        assert tracker.outbox_path is not None
        watch = Watch(proxy)
        proxy.on("", faults.delay(0.1), times=None)
        with delivering(OutboxDirectory.open(tracker.outbox_path), proxy.url, SETTINGS) as counters:
            eventually(lambda: 102 == counters["delivered"], 60)
    assert [0, {20, 40}, 60, 80, "status"] == [*watch.order[:1], set(watch.order[1:3]), *watch.order[3:]]
    assert {0: set(), 20: {40}, 40: {20}, 60: set(), 80: set(), "status": set()} == watch.beside


def test_a_request_that_fails_beside_others_is_sent_again_alone(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Two of the three had arrived, and are not sent once more; each point is there once."""
    with FaultProxy(mlflow_server.url) as proxy:
        outbox = logged(experiment_name, proxy.url, tmp_path, 140)
        proxy.on(BATCHES, faults.status(503), body=holds(40))
        watch = Watch(proxy)
        with delivering(outbox, proxy.url, SETTINGS) as counters:
            eventually(lambda: 144 == counters["delivered"], 60)
    assert arrived(mlflow_server, experiment_name, 140)
    assert 1 == counters["retried"]
    assert {0, 20, 40, 60, 80, 100, 120} == {step for step in watch.order if isinstance(step, int)}
    assert {1} == {Counter(watch.order)[step] for step in range(0, 140, 20)}, watch.order
    assert {20: {60}, 40: set(), 60: {20}} == {step: watch.beside[step] for step in (20, 40, 60)}
    assert [set()] * 3 == [watch.beside[step] for step in range(80, 140, 20)], "one at a time since"


def test_what_arrived_beside_a_request_that_fails_is_not_sent_again_however_often_that_fails(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """As in an outage that begins in the middle of them: a server whose store is one of files would keep them twice."""
    with FaultProxy(mlflow_server.url) as proxy:
        outbox = logged(experiment_name, proxy.url, tmp_path, 140)
        proxy.on(BATCHES, faults.status(503), times=3, body=holds(40))
        watch = Watch(proxy)
        with delivering(outbox, proxy.url, SETTINGS) as counters:
            eventually(lambda: 144 == counters["delivered"], 60)
    assert arrived(mlflow_server, experiment_name, 140)
    assert 3 == counters["retried"]
    assert {1} == {Counter(watch.order)[step] for step in range(0, 140, 20)}, watch.order


def test_what_arrived_before_a_request_that_fails_is_not_sent_again(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """One call of many metrics is several requests, one after the other."""
    with FaultProxy(mlflow_server.url) as proxy:
        tracker = MLflowTracker(experiment_name, proxy.url, outbox_dir=tmp_path, worker="none", settings=SETTINGS)
        with tracker.start_run() as run:
            run.log_metrics({f"m{number:02}": number for number in range(50)}, step=1)
        tracker.close(0)
        assert tracker.outbox_path is not None
        proxy.on(BATCHES, faults.status(503), times=2, body=lambda body: b'"m30"' in body)
        with delivering(OutboxDirectory.open(tracker.outbox_path), proxy.url, SETTINGS) as counters:
            eventually(lambda: 3 == counters["delivered"], 60)
        sent = [body for one in proxy.requests if b'"metrics"' in (body := one.body)]
    assert 2 == counters["retried"]
    assert [1, 3, 1] == [sum(name in body for body in sent) for name in (b'"m00"', b'"m30"', b'"m49"')]
    assert 50 == len(the_run(mlflow_server.url, experiment_name).data.metrics)


def test_a_point_that_is_refused_beside_others_is_the_only_dead_letter(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Two batches of one volley have one each."""
    refusal = json.dumps({"error_code": "INVALID_PARAMETER_VALUE", "message": "not this one"})
    with FaultProxy(mlflow_server.url) as proxy:
        outbox = logged(experiment_name, proxy.url, tmp_path, 140)
        for step in (47, 93):
            proxy.on(BATCHES, faults.status(400, body=refusal), times=None, body=holds(step))
        with delivering(outbox, proxy.url, SETTINGS) as counters:
            eventually(lambda: (142, 2) == (counters["delivered"], counters["dead_events"]), 60)
    assert 2 == counters["dead_letters"]
    run = the_run(mlflow_server.url, experiment_name)
    without = numbered(140) - Counter({(47, 23.5): 1, (93, 46.5): 1})
    assert without == points(mlflow_server.url, run.info.run_id, "loss")


def test_a_point_that_is_refused_beside_a_request_that_fails_is_a_dead_letter_too(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """The window is not recorded then, and so the refusal is not: it has to be met once more."""
    refusal = json.dumps({"error_code": "INVALID_PARAMETER_VALUE", "message": "not this one"})
    with FaultProxy(mlflow_server.url) as proxy:
        outbox = logged(experiment_name, proxy.url, tmp_path, 140)
        proxy.on(BATCHES, faults.status(400, body=refusal), times=None, body=holds(27))
        proxy.on(BATCHES, faults.status(503), body=holds(60))
        with delivering(outbox, proxy.url, SETTINGS) as counters:
            eventually(lambda: (143, 1) == (counters["delivered"], counters["dead_events"]), 60)
    assert (1, 1) == (counters["dead_letters"], counters["retried"])
    run = the_run(mlflow_server.url, experiment_name)
    assert numbered(140) - Counter({(27, 13.5): 1}) == points(mlflow_server.url, run.info.run_id, "loss")


def test_without_a_thread_for_them_batches_go_one_after_the_other(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the system has no more of them."""
    start = threading.Thread.start

    def refused(thread: threading.Thread) -> None:
        if thread.name == "mlflow-outbox-volley":
            msg = "can't start new thread"
            raise RuntimeError(msg)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refused)
    with FaultProxy(mlflow_server.url) as proxy:
        outbox = logged(experiment_name, proxy.url, tmp_path, 140)
        watch = Watch(proxy)
        with delivering(outbox, proxy.url, SETTINGS) as counters:
            eventually(lambda: 144 == counters["delivered"], 60)
    assert arrived(mlflow_server, experiment_name, 140)
    assert [set()] == [*{frozenset(beside) for beside in watch.beside.values()}]


def test_requests_are_shared_by_the_runs_that_have_their_turn(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    """An embedded store, which takes one at a time, has nothing to share."""
    server, embedded = open_sink(mlflow_server.url), open_sink(f"file:{tmp_path}")
    try:
        volley = Volley(cast("Requests", None), lambda *_: None, server, 4)
        with volley.turn():
            assert 4 == volley.width()
            with volley.turn():
                assert 2 == volley.width()
                with volley.turn():
                    assert 1 == volley.width()
            assert 4 == volley.width()
        assert 1 == Volley(cast("Requests", None), lambda *_: None, embedded, 4).width()
    finally:
        server.close()
        embedded.close()
