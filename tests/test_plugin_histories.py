"""Histories of metrics through the plugin: each point once, and the same before and after it has arrived."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest

from mlflow_outbox.plugin import reads
from mlflow_outbox.testing.faults import forward_then_drop_response
from mlflow_outbox.testing.proxy import FaultProxy
from plugin_world import NOWHERE, deliver, store, tracking
from servers import MlflowServer, eventually

_MOST = sys.float_info.max


def _seen(mlflow: Any, run_id: str) -> tuple[list[float], float]:
    history = mlflow.MlflowClient().get_metric_history(run_id, "m")
    return [point.value for point in history], mlflow.get_run(run_id).data.metrics["m"]


def test_an_infinity_reads_the_same_before_and_after_it_has_arrived(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """A database has no infinities: they are its largest number, at once and for good, and not a second point."""
    with FaultProxy(mlflow_server.url) as proxy:
        uri = f"outbox+{proxy.url}"
        with tracking(uri, tmp_path) as mlflow:
            mlflow.set_experiment(experiment_name)
            run = mlflow.start_run()
            proxy.on("runs/log-batch", forward_then_drop_response(), times=None)
            for step, value in enumerate([-math.inf, 1.0, math.inf]):
                mlflow.log_metric("m", value, step=step)
            expected = ([-_MOST, 1.0, _MOST], _MOST)
            assert expected == _seen(mlflow, run.info.run_id)
            eventually(
                lambda: any(r.backend_status == 200 for r in proxy.requests if "log-batch" in r.path),
                message="the server has them, and the outbox does not know it",
            )
            assert expected == _seen(mlflow, run.info.run_id)
            proxy.clear()
            deliver(uri)
            assert expected == _seen(mlflow, run.info.run_id)
            mlflow.end_run()


def test_a_file_store_keeps_infinities(file_uri: str, experiment_name: str, tmp_path: Path) -> None:
    """And so they are shown while they wait."""
    uri = f"outbox+{file_uri}"
    with tracking(uri, tmp_path / "outbox") as mlflow:
        mlflow.set_experiment(experiment_name)
        with mlflow.start_run() as run:
            mlflow.log_metric("m", math.inf)
            assert ([math.inf], math.inf) == _seen(mlflow, run.info.run_id)
            deliver(uri)
            assert ([math.inf], math.inf) == _seen(mlflow, run.info.run_id)


def test_offline_an_infinity_reads_as_it_will(tmp_path: Path) -> None:
    """The server that was named is taken to have a database, as nearly all have."""
    with tracking(NOWHERE, tmp_path, exit_timeout=0) as mlflow, mlflow.start_run() as run:
        mlflow.log_metric("m", math.inf)
        assert ([_MOST], _MOST) == _seen(mlflow, run.info.run_id)


@pytest.mark.parametrize("size", [None, 2, 3])
def test_a_point_that_arrives_between_two_reads_is_shown_once(
    size: int | None, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """On whatever page the server has it: pending points are compared with all of them."""
    with FaultProxy(mlflow_server.url) as proxy:
        uri = f"outbox+{proxy.url}"
        with tracking(uri, tmp_path) as mlflow:
            mlflow.set_experiment(experiment_name)
            run = mlflow.start_run()
            proxy.on("runs/log-batch", forward_then_drop_response(), times=None)
            for step in range(5):
                mlflow.log_metric("m", step / 3, step=step)

            def there() -> list[Any]:
                with_all = store(mlflow_server.url)
                return list(with_all.get_metric_history(run.info.run_id, "m"))

            eventually(lambda: 5 == len(there()), message="the server has them, and the outbox does not know it")
            held, token = [], None
            while True:
                some = store(uri).get_metric_history(run.info.run_id, "m", max_results=size, page_token=token)
                held += [point.step for point in some]
                token = some.token
                if token is None:
                    break
            assert list(range(5)) == held
            proxy.clear()
            deliver(uri)
            mlflow.end_run()


def test_a_history_is_gone_on_with_from_the_disk_when_the_server_goes_away_between_two_pages(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Each point once: the first page was the server's."""
    with FaultProxy(mlflow_server.url) as proxy:
        uri = f"outbox+{proxy.url}"
        with tracking(uri, tmp_path) as mlflow:
            mlflow.set_experiment(experiment_name)
            run = mlflow.start_run()
            for step in range(5):
                mlflow.log_metric("m", step / 3, step=step)
            deliver(uri)
            first = store(uri).get_metric_history(run.info.run_id, "m", max_results=2)
            proxy.down()
            rest = store(uri).get_metric_history(run.info.run_id, "m", max_results=2, page_token=first.token)
            assert list(range(5)) == [point.step for point in [*first, *rest]]
            proxy.up()
            mlflow.end_run()
            deliver(uri)


def test_a_zero_that_a_database_has_without_its_sign_is_no_second_point() -> None:
    """Nor is one of those that the server lacks."""
    from mlflow.entities import Metric

    there, here = Metric("m", 0.0, 1, 0), Metric("m", -0.0, 1, 0)
    assert 1 == len(reads.merged_points([there], [here]))
    assert [] == reads.unseen_points([there], [here])
    assert 2 == len(reads.merged_points([there], [Metric("m", math.nan, 1, 0)]))
