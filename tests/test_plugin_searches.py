"""Searches for runs through the plugin: the server's answer costs no more the more runs are kept on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from contents import client
from mlflow_outbox.testing.proxy import FaultProxy
from mlflow_outbox_worker.mlflow_sink import transport
from mlflow_outbox_worker.reading import Reading
from plugin_world import away, deliver, store, tracking
from servers import MlflowServer, eventually


def test_a_search_reads_no_run_that_is_filed_as_delivered(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a week they stay on disk, thousands in a sweep; the answer shows them as before, whatever they began as."""
    with away(mlflow_server, tmp_path, create_timeout=20) as (mlflow, proxy, uri):
        mlflow.set_experiment(experiment_name)
        with mlflow.start_run(run_name="offline") as begun:
            mlflow.log_metric("m", 1.0)
        proxy.up()
        deliver(uri)
        with mlflow.start_run(run_name="online"):
            mlflow.log_metric("m", 2.0)
        deliver(uri)
        directory = store(uri).outbox.directory
        eventually(lambda: 2 == len([*directory.delivered_ids()]), message="both are filed")
        read: list[str] = []
        theirs: Any = Reading._local_run

        def spy(self: Reading, run_id: str, *more: Any, **named: Any) -> Any:
            read.append(run_id)
            return theirs(self, run_id, *more, **named)

        monkeypatch.setattr(Reading, "_local_run", spy)
        found = {run.info.run_name: run for run in mlflow.search_runs(output_format="list", order_by=["metrics.m ASC"])}
        assert ["offline", "online"] == [*found]
        assert [] == read
        assert begun.info.run_id == found["offline"].info.run_id
        assert begun.info.artifact_uri == found["offline"].info.artifact_uri
        assert found["online"].info.artifact_uri.startswith("mlflow-artifacts:")
        proxy.down()
        held = mlflow.search_runs(output_format="list", order_by=["metrics.m ASC"])
        assert ["offline", "online"] == [run.info.run_name for run in held]
        assert {*read} >= {begun.info.run_id}


def test_a_large_answer_is_read_as_without_an_outbox(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow asks for the runs of an experiment in one page. The worker asks for nothing so large, and has a limit."""
    from mlflow.entities import Param

    monkeypatch.setattr(transport, "MAX_ANSWER_BYTES", 10_000)
    with client(mlflow_server.url) as api:
        number = api.create_experiment(experiment_name)
        for _ in range(3):
            api.log_batch(api.create_run(number).info.run_id, params=[Param("p", "x" * 5000)])
    with tracking(f"outbox+{mlflow_server.url}", tmp_path, worker="none") as mlflow:
        assert 3 == len(mlflow.search_runs([number]))


@pytest.mark.parametrize("size", [0, -1, 50_001])
def test_the_size_of_a_page_is_refused_wherever_it_is_cut(
    size: int, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """By the server; by the outbox while that is away, and where what is on its way belongs between its runs."""
    from mlflow.exceptions import MlflowException

    with client(mlflow_server.url) as api:
        number = api.create_experiment(experiment_name)
        api.create_run(number)
    with away(mlflow_server, tmp_path, worker="none") as (mlflow, proxy, uri):
        api = mlflow.MlflowClient()
        api.create_run(number)
        for is_up in (False, True):
            with pytest.raises(MlflowException, match=f"Invalid value {size} for parameter 'max_results'"):
                api.search_runs([number], max_results=size)
            assert is_up + 1 == len(api.search_runs([number], max_results=50_000))
            proxy.up()
            eventually(lambda: not store(uri).server.is_away(), message="the pause after the outage is over")


def test_a_filter_finds_what_has_arrived_beside_what_has_not(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """One run that it names by a provisional id is still on its way; the other one has an id of the server's."""
    with client(mlflow_server.url) as api:
        number = api.create_experiment(experiment_name)
    with FaultProxy(mlflow_server.url) as proxy:
        uri = f"outbox+{proxy.url}"
        made: list[str] = []
        for worker in ("thread", "none"):
            proxy.down()
            with tracking(uri, tmp_path, worker=worker) as mlflow:
                api = mlflow.MlflowClient()
                made.append(api.create_run(number).info.run_id)
                proxy.up()
                if worker == "thread":
                    deliver(uri)
                    continue
                eventually(lambda: not store(uri).server.is_away(), message="the pause after the outage is over")
                found = api.search_runs([number], f"attributes.run_id IN ('{made[0]}', '{made[1]}')")
    assert {*made} == {run.info.run_id for run in found}
