"""Servers that want a pause after few requests: what is sent comes to an end all the same."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from contents import QUICK, artifacts, numbered, points, the_run
from mlflow_outbox import MLflowTracker, Run
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox.testing import faults
from mlflow_outbox.testing.proxy import Action, Exchange, FaultProxy
from servers import MlflowServer, eventually
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
