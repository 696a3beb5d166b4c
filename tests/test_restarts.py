"""The process that delivers, as its program sees it: begun anew, more rarely if it ends soon, and told of news."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from contents import QUICK
from mlflow_outbox import MLflowTracker, restarts
from mlflow_outbox.counters import Counters
from mlflow_outbox.restarts import Restarts
from mlflow_outbox.testing.proxy import FaultProxy
from mlflow_outbox_worker import interpreter, process
from servers import MlflowServer, eventually
from spools import warnings


def test_pauses_grow_while_each_worker_ends_soon_and_are_over_with_one_that_lasts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One or two that were killed are replaced at once; what is told twice counts once."""
    now = [100.0]
    worker = Restarts(tmp_path, Counters(), lambda: now[0])

    def pause_after(seconds: float) -> float:
        worker.begun()
        now[0] += seconds
        worker.ended("signal 9")
        began = now[0]
        while not worker.is_due():
            now[0] += 0.5
            worker.ended("signal 9")
        return now[0] - began

    assert [0.0, 0.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0] == [pause_after(1.0) for _ in range(8)]
    assert worker.are_vain
    assert [0.0, 0.0, 0.0, 2.0] == [pause_after(seconds) for seconds in (31.0, 1.0, 1.0, 1.0)]
    assert 1 == sum("ends again and again soon after its start (signal 9)" in said for said in warnings(caplog))


def test_a_process_that_is_killed_after_each_start_is_not_started_twice_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As for want of memory; who asks for delivery has it tried at once all the same."""
    killed = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    start, started = process._Outliving, list[int]()

    def noting(*arguments: Any, **named: Any) -> subprocess.Popen[bytes]:
        made = start(*arguments, **named)
        started.append(made.pid)
        return made

    monkeypatch.setattr(restarts, "_PAUSE", 600.0)
    monkeypatch.setattr(restarts, "_PAUSE_MOST", 600.0)
    monkeypatch.setattr(process, "_Outliving", noting)
    monkeypatch.setattr(interpreter, "command", lambda _: [sys.executable, "-c", killed])
    given = dataclasses.replace(QUICK, sync_interval=0.02)
    tracker = MLflowTracker("e", "http://127.0.0.1:9", outbox_dir=tmp_path, worker="process", settings=given)
    run = tracker.start_run("r")
    eventually(lambda: any("ends again and again" in said for said in warnings(caplog)), 60)
    outbox, before = tracker._outbox, len(started)
    assert outbox is not None
    assert 2 == outbox.counters["workers_replaced"]
    for _ in range(5):
        outbox._look()
    tracker.start_run("another").end()
    assert before == len(started)
    tracker.flush(0)
    assert before + 1 == len(started)
    run.end()
    tracker.close(0)


def test_a_new_token_in_the_environment_is_used_by_a_process_too(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by the child of a thread: with the old one all would wait for a person once it has expired."""
    with FaultProxy(mlflow_server.url) as proxy:
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "first")
        tracker = MLflowTracker(experiment_name, proxy.url, outbox_dir=tmp_path, worker="process", settings=QUICK)
        run = tracker.start_run("r")

        def last_token() -> str | None:
            run.log_metric("loss", 0.0)
            assert tracker.flush(200)  # the first one waits for an import of MLflow
            return dict(proxy.requests[-1].headers).get("Authorization")

        assert "Bearer first" == last_token()
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "second")
        eventually(lambda: last_token() == "Bearer second")
        monkeypatch.delenv("MLFLOW_TRACKING_TOKEN")
        eventually(lambda: last_token() is None)
        run.end()
        tracker.close(30)
