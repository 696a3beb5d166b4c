"""``write_timeout``: a write through an ``outbox+`` URI that returns when the server has it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from contents import artifact_text, client
from mlflow_outbox.testing.faults import accept_hang
from mlflow_outbox.testing.proxy import FaultProxy
from plugin_world import deliver, store, the_runs, tracking
from servers import MlflowServer


def _metric(mlflow: Any, api: Any, run_id: str) -> tuple[object, object]:
    mlflow.log_metric("m", 0.5, step=3)
    return [(3, 0.5)], [(point.step, point.value) for point in api.get_metric_history(run_id, "m")]


def _batch(mlflow: Any, api: Any, run_id: str) -> tuple[object, object]:
    mlflow.log_metrics({f"m{n}": n / 2 for n in range(100)}, step=1)
    return {f"m{n}": n / 2 for n in range(100)}, api.get_run(run_id).data.metrics


def _param(mlflow: Any, api: Any, run_id: str) -> tuple[object, object]:
    mlflow.log_param("depth", 5)
    return {"depth": "5"}, api.get_run(run_id).data.params


def _tag(mlflow: Any, api: Any, run_id: str) -> tuple[object, object]:
    mlflow.set_tag("stage", "last")
    return "last", api.get_run(run_id).data.tags.get("stage")


def _dataset(mlflow: Any, api: Any, run_id: str) -> tuple[object, object]:
    import numpy as np

    mlflow.log_input(mlflow.data.from_numpy(np.zeros(3), name="zeros"))
    return ["zeros"], [given.dataset.name for given in api.get_run(run_id).inputs.dataset_inputs]


def _experiment_tag(mlflow: Any, api: Any, run_id: str) -> tuple[object, object]:
    mlflow.set_experiment_tag("team", "red")
    return "red", api.get_experiment(api.get_run(run_id).info.experiment_id).tags.get("team")


def _text(mlflow: Any, api: Any, run_id: str) -> tuple[object, object]:
    mlflow.log_text("words", "notes/a.txt")
    return "words", artifact_text(api.tracking_uri, run_id, "notes/a.txt")


def _end(mlflow: Any, api: Any, run_id: str) -> tuple[object, object]:
    mlflow.end_run("FAILED")
    return "FAILED", api.get_run(run_id).info.status


@pytest.mark.parametrize("write", [_metric, _batch, _param, _tag, _dataset, _experiment_tag, _text, _end])
def test_the_server_has_a_write_that_was_waited_for(
    write: Callable[[Any, Any, str], tuple[object, object]],
    mlflow_server: MlflowServer,
    experiment_name: str,
    tmp_path: Path,
) -> None:
    """Another client, which knows of no outbox, finds it right after the call."""
    with (
        tracking(f"outbox+{mlflow_server.url}", tmp_path, write_timeout=30, poll_interval=0.5) as mlflow,
        client(mlflow_server.url) as api,
    ):
        mlflow.set_experiment(experiment_name)
        run = mlflow.start_run()
        expected, found = write(mlflow, api, run.info.run_id)
        assert expected == found


def test_a_server_that_hangs_costs_one_wait_and_not_one_for_each_write(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """The waits in vain are counted, asynchronous calls never wait, and all arrives."""
    with FaultProxy(mlflow_server.url) as proxy:
        waits = {"create_timeout": 0.5, "request_timeout": 0.5, "write_timeout": 2}
        uri = f"outbox+{proxy.url}"
        with tracking(uri, tmp_path, **waits) as mlflow:
            mlflow.set_experiment(experiment_name)
            with mlflow.start_run():
                proxy.on("", accept_hang(), times=None)
                begin = time.monotonic()
                mlflow.log_metric("m", 0.0, step=0, synchronous=False)
                assert time.monotonic() - begin < 2.0
                for step in range(1, 100):
                    mlflow.log_metric("m", step / 2, step=step)
                assert 2.0 <= time.monotonic() - begin < 60.0, "a wait for each would be 198 s"
                assert 90 <= store(uri).outbox.counters["writes_not_awaited"] <= 99
                proxy.clear()
            deliver(uri)
            (run,) = the_runs(mlflow_server.url, experiment_name)
            with client(mlflow_server.url) as api:
                points = api.get_metric_history(run.info.run_id, "m")
            assert [step / 2 for step in range(100)] == sorted(point.value for point in points)
