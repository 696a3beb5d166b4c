"""Servers that want a pause after few requests, deliveries with little time: all comes to an end all the same."""

from __future__ import annotations

import dataclasses
import itertools
import json
import posixpath
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from contents import QUICK, artifacts, client, numbered, points, the_run
from mlflow_outbox import MLflowTracker, Run
from mlflow_outbox.destination import resolve
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox.spool.events import Request, RunStarted
from mlflow_outbox.testing import faults
from mlflow_outbox.testing.proxy import Action, Exchange, FaultProxy
from mlflow_outbox_worker import courier
from servers import MlflowServer, eventually
from spools import make_journal, metric
from workers import delivering


class Seventh:
    """Answers 429 to every seventh request, and 413 to batches of more than fifty points.

    Attributes:
        asked: requests so far.
    """

    def __init__(self) -> None:
        self.asked = 0
        self._lock = threading.Lock()

    def __call__(self, exchange: Exchange) -> None:
        """Answer a request."""
        with self._lock:
            self.asked += 1
            tired = not self.asked % 7
        request = exchange.request
        if tired:
            faults.status(429).run(exchange)
        elif request.path.endswith("log-batch") and len(json.loads(request.body).get("metrics", ())) > 50:
            faults.status(413, {}, "<html>too large</html>").run(exchange)
        else:
            exchange.forward()


def log_points(run: Run) -> None:
    """Log what is refused in batches of more than fifty, so that it takes dozens of requests."""
    for step in range(1000):
        run.log_metric("loss", step / 2, step=step)


def log_files(run: Run) -> None:
    """Log what is a request each."""
    for number in range(20):
        run.log_text(f"text {number}", f"{number}.txt")


def log_params(run: Run) -> None:
    """Log what is fifteen requests."""
    for number in range(1500):
        run.log_param(f"p{number}", number)


@pytest.mark.parametrize("log", [log_points, log_files, log_params])
def test_a_server_that_wants_a_pause_after_each_six_requests_gets_everything(
    log: Callable[[Run], None], mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Of a window with more requests than that some are answered each time, and none of it is recorded."""
    with FaultProxy(mlflow_server.url) as proxy:
        tracker = MLflowTracker(experiment_name, proxy.url, outbox_dir=tmp_path, worker="none", settings=QUICK)
        with tracker.start_run() as run:
            log(run)
        tracker.close(0)
        assert tracker.outbox_path is not None
        seventh = Seventh()
        proxy.on(lambda _method, _path: True, Action("seventh", seventh), times=None)
        with delivering(OutboxDirectory.open(tracker.outbox_path), proxy.url, QUICK) as counters:
            eventually(lambda: not tracker.flush(0).pending, 60)
    assert counters["retried"] < 60
    held = the_run(mlflow_server.url, experiment_name)
    assert "FINISHED" == held.info.status
    if log is log_points:
        assert numbered(1000) == points(mlflow_server.url, held.info.run_id, "loss")
    elif log is log_files:
        assert sorted(f"{number}.txt" for number in range(20)) == artifacts(mlflow_server.url, held.info.run_id)
    else:
        assert {f"p{number}": str(number) for number in range(1500)} == held.data.params


def test_a_server_that_wants_a_pause_each_time_when_points_come_gets_them_too(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Before them it has carried out five requests of the window, which it would get again and again."""
    asked = itertools.count(1)

    def tired(exchange: Exchange) -> None:
        if next(asked) % 6:
            exchange.forward()
        else:
            faults.status(429).run(exchange)

    with FaultProxy(mlflow_server.url) as proxy, client(mlflow_server.url) as mlflow:
        number = mlflow.create_experiment(experiment_name)
        outbox = OutboxDirectory.create(tmp_path / "outbox", resolve(proxy.url), now_ms=1)
        journal = make_journal(outbox)
        assert journal.append(RunStarted(1_700_000_000_000, "r", "me", {}, False, number))
        assert journal.append(metric(0))
        with delivering(outbox, proxy.url, QUICK) as counters:
            eventually(lambda: 2 == counters["delivered"], 60)
        for label in map(str, range(5)):
            tag = {"$": "ExperimentTag", "v": {"key": label, "value": label}}
            arguments = json.dumps({"experiment_id": number, "tag": tag}).encode()
            assert journal.append(Request("set_experiment_tag", arguments, 1_700_000_000_001))
        assert journal.append(metric(1))
        journal.close()
        counted = ("set-experiment-tag", "log-batch")
        proxy.on(lambda _method, path: path.endswith(counted), Action("tired", tired), times=None)
        with delivering(outbox, proxy.url, QUICK) as counters:
            eventually(lambda: 6 == counters["delivered"])
        tags = mlflow.get_experiment(number).tags
    assert {label: label for label in map(str, range(5))}.items() <= tags.items()
    run = the_run(mlflow_server.url, experiment_name)
    assert {(0, 0.0): 1, (1, 1.0): 1} == dict(points(mlflow_server.url, run.info.run_id, "loss"))


class Slow:
    """Takes two uploads, and is silent at the third.

    Attributes:
        is_over: it is at the third.
    """

    def __init__(self) -> None:
        self.is_over = threading.Event()
        self._taken = itertools.count()

    def __call__(self, exchange: Exchange) -> None:
        """Answer a request."""
        if next(self._taken) < 2:
            exchange.forward()
        else:
            self.is_over.set()
            exchange.hang()


def test_deliveries_that_have_time_for_two_large_files_each_send_all_of_them(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As flushes with a time-out before each shutdown: what one has stored is not sent anew by all others, for ever."""
    monkeypatch.setattr(courier, "LARGE", 10)
    settings = dataclasses.replace(QUICK, request_timeout=2.0)
    names = [f"{number}.txt" for number in range(6)]
    with FaultProxy(mlflow_server.url) as proxy:
        tracker = MLflowTracker(experiment_name, proxy.url, outbox_dir=tmp_path, worker="none", settings=settings)
        with tracker.start_run() as run:
            for name in names:
                run.log_text(f"large: {name}", name)
        tracker.close(0)
        assert tracker.outbox_path is not None
        directory = OutboxDirectory.open(tracker.outbox_path)

        def has_sent_all() -> bool:
            slow = Slow()
            proxy.clear()
            proxy.on(lambda method, _path: method == "PUT", Action("slow", slow), times=None)
            with delivering(directory, proxy.url, settings):
                eventually(lambda: slow.is_over.is_set() or bool(tracker.flush(0)), 60)
            return bool(tracker.flush(0))

        assert any(has_sent_all() for _ in range(8))
    assert names == artifacts(mlflow_server.url, the_run(mlflow_server.url, experiment_name).info.run_id)


def test_what_is_before_a_file_that_waits_for_a_person_is_not_sent_at_each_try(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """A firewall forbids one file: those before it, which the server has, are recorded after a few tries."""
    with FaultProxy(mlflow_server.url) as proxy:
        proxy.on(lambda method, path: method == "PUT" and path.endswith("bad.sh"), faults.status(403), times=None)
        tracker = MLflowTracker(experiment_name, proxy.url, outbox_dir=tmp_path, worker="none", settings=QUICK)
        with tracker.start_run() as run:
            for name in [*(f"{number}.txt" for number in range(10)), "bad.sh"]:
                run.log_text(f"text of {name}", name)
        tracker.close(0)
        assert tracker.outbox_path is not None
        directory = OutboxDirectory.open(tracker.outbox_path)

        def sent() -> Counter[str]:
            return Counter(posixpath.basename(one.path) for one in proxy.requests if one.method == "PUT")

        with delivering(directory, proxy.url, QUICK):
            eventually(lambda: sent()["bad.sh"] >= 12, 60)
        assert sent()["0.txt"] < 6
        left = tracker.flush(0)
        assert 0 == left.pending < left.parked < 5  # that file, and what is behind it
        proxy.clear()
        with delivering(directory, proxy.url, QUICK):
            eventually(lambda: bool(tracker.flush(0)), 60)
    assert 11 == len(artifacts(mlflow_server.url, the_run(mlflow_server.url, experiment_name).info.run_id))
