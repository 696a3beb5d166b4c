"""Servers that want a pause after few requests: what is sent comes to an end all the same."""

from __future__ import annotations

import itertools
import json
import threading
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
