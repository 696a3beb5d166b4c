"""MLflow's own monitor of system metrics through an outbox: it ends for ever at the first error that it meets."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from contents import client
from mlflow_outbox.spool.reader import RunReader
from mlflow_outbox.spool.window import Window
from mlflow_outbox.testing.proxy import FaultProxy
from plugin_world import deliver, store, tracking
from servers import MlflowServer, eventually

#: The monitor's samples that a test waits for in each phase, and how long that may take.
_SAMPLES = 4
_PATIENCE = 60.0


def sampled(uri: str, run_id: str) -> int:
    """Return how many samples the outbox has of the monitor of a run."""
    held = store(uri).local_run(store(uri).canonical(run_id))
    return held.view.metrics["system/cpu_utilization_percentage"].points if held and held.view.metrics else 0


def more_than(least: int, uri: str, run_id: str) -> int:
    """Wait until the outbox has at least so many samples; return how many."""
    return eventually(lambda: (now := sampled(uri, run_id)) >= least and now, _PATIENCE, f"{least} samples")


def monitors() -> list[threading.Thread]:
    """Return the threads of MLflow's monitors that are alive."""
    return [one for one in threading.enumerate() if one.name == "SystemMetricsMonitor"]


@pytest.mark.parametrize("mode", ["away from the start", "killed in the middle"])
def test_the_monitor_of_system_metrics_survives_an_outage(
    mode: str,
    own_mlflow_server: Callable[..., MlflowServer],
    experiment_name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It samples on, says nothing, and each of its points is in MLflow once, before, during and after."""
    server = own_mlflow_server()
    raised: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", raised.append)
    with FaultProxy(server.url) as proxy, caplog.at_level(logging.INFO):
        uri = f"outbox+{proxy.url}"
        with tracking(uri, tmp_path / "outbox", create_timeout=0.5) as mlflow:
            mlflow.set_system_metrics_sampling_interval(0.1)
            mlflow.set_system_metrics_samples_before_logging(1)
            if mode == "away from the start":
                server.kill()
            mlflow.set_experiment(experiment_name)
            with mlflow.start_run(log_system_metrics=True) as run:
                run_id = run.info.run_id
                seen = 0
                for phase in ("before", "during", "after"):
                    if phase == "during" and server.is_alive():
                        server.kill()
                    if phase == "after":
                        server.start()
                    seen = more_than(seen + _SAMPLES, uri, run_id)
                    assert 1 == len(monitors()), caplog.text
                deliver(uri)
            deliver(uri)
            steps = [point.step for point in mlflow.MlflowClient().get_metric_history(run_id, _CPU)]
    assert [] == raised
    assert [] == monitors()
    said = [one.getMessage() for one in caplog.records if one.name.startswith("mlflow.system_metrics")]
    assert [] == [text for text in said if text not in _EXPECTED]
    with client(server.url) as api:
        (found,) = api.search_runs([api.get_experiment_by_name(experiment_name).experiment_id])
        history = api.get_metric_history(found.info.run_id, _CPU)
    assert steps == [point.step for point in history] == list(range(len(history)))
    assert len(history) >= 3 * _SAMPLES


_CPU = "system/cpu_utilization_percentage"
_EXPECTED = {
    "Skip logging GPU metrics. Set logger level to DEBUG for more details.",
    "Started monitoring system metrics.",
    "Stopping system metrics monitoring...",
    "Successfully terminated system metrics monitoring!",
}


def test_a_run_is_not_read_again_from_its_beginning_while_the_server_is_away(
    own_mlflow_server: Callable[..., MlflowServer],
    experiment_name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The monitor asks for its run at each sample, of an outage of hours too; what was delivered since counts."""
    server = own_mlflow_server()
    uri = f"outbox+{server.url}"
    read: list[int] = []
    window = RunReader.window

    def counted(reader: RunReader, *arguments: Any, **options: Any) -> Window:
        found = window(reader, *arguments, **options)
        if options.get("points") == 100_000:  # not the worker's
            read.append(len(found.events))
        return found

    with tracking(uri, tmp_path / "outbox", create_timeout=0.5) as mlflow:
        mlflow.set_experiment(experiment_name)
        with mlflow.start_run() as run:
            deliver(uri)
            server.kill()
            for step in range(50):
                mlflow.log_metric("m", float(step), step=step)
            assert {"m": 49.0} == mlflow.get_run(run.info.run_id).data.metrics  # finds out that the server is away
            assert {"m": 49.0} == mlflow.get_run(run.info.run_id).data.metrics
            monkeypatch.setattr(RunReader, "window", counted)
            mlflow.log_metric("m", 50.0, step=50)
            assert {"m": 50.0} == mlflow.get_run(run.info.run_id).data.metrics
            assert {"m": 50.0} == mlflow.get_run(run.info.run_id).data.metrics
            assert [1, 0] == read
            server.start()
            deliver(uri)
            assert {"m": 50.0} == mlflow.get_run(run.info.run_id).data.metrics
