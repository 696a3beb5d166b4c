"""The tags with which a run begins: kept as MLflow's stores keep them at a creation, with and without the server."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from contents import client, the_run
from plugin_world import NOWHERE, WAYS, deliver, store, tracking, world
from servers import MlflowServer

#: More than MLflow takes in a tag that is set later, and a key that it takes at a creation only.
LONG = "x" * 9000
ODD = {"user@host": "1", "long": LONG, "plain": "yes"}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_begins_with_the_tags_that_it_was_given(
    way: str, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Nothing is cut or refused at the call or at delivery; a description, which is a tag too, keeps its end."""
    with world(way, mlflow_server, tmp_path) as here:
        mlflow = here.mlflow
        mlflow.set_experiment(experiment_name)
        with mlflow.start_run(tags=ODD, description="d" * 8500) as run:
            here.kill()
            assert ODD | run.data.tags == run.data.tags
            assert ODD | mlflow.get_run(run.info.run_id).data.tags == mlflow.get_run(run.info.run_id).data.tags
            mlflow.set_tag("plain", "no")
    tags = the_run(mlflow_server.url, experiment_name).data.tags
    assert {**ODD, "plain": "no", "mlflow.note.content": "d" * 8500} | tags == tags


@pytest.mark.parametrize("way", WAYS)
def test_a_name_outlives_the_tag_that_gave_it(
    way: str, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """MLflow keeps the name of a run when its tag is deleted; one that was set before is not shown again meanwhile."""
    with world(way, mlflow_server, tmp_path) as here:
        api = here.mlflow.MlflowClient()
        run = api.create_run(api.create_experiment(experiment_name), run_name="first").info.run_id
        here.kill()
        api.set_tag(run, "mlflow.runName", "second")
        api.delete_tag(run, "mlflow.runName")
        shown = api.get_run(run)
        assert ("second", {}) == (shown.info.run_name, shown.data.tags)
    assert "second" == the_run(mlflow_server.url, experiment_name).info.run_name


@pytest.mark.parametrize(("mode", "expected"), [("up", TypeError), ("away", TypeError)])
def test_a_tag_that_is_no_text_is_refused_as_mlflows_client_refuses_it(
    mode: str, expected: type[Exception], mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    """At the call, whether the server is there or not."""
    with tracking(mlflow_server.url, tmp_path) as mlflow, pytest.raises(expected):
        mlflow.MlflowClient().create_run("0", tags={"a": 1})
    timeout = 0 if mode == "away" else 5
    with tracking(f"outbox+{mlflow_server.url}", tmp_path, create_timeout=timeout) as mlflow, pytest.raises(expected):
        mlflow.MlflowClient().create_run("0", tags={"a": 1})


@pytest.mark.parametrize("timeout", [5, 0])
def test_a_database_takes_a_tag_that_is_no_text(
    timeout: float, sqlite_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """As text, as without an outbox; also when the database is not asked first."""
    uri = f"outbox+{sqlite_uri}"
    with tracking(uri, tmp_path / "outbox", create_timeout=timeout) as mlflow:
        mlflow.set_experiment(experiment_name)
        api = mlflow.MlflowClient()
        number = mlflow.get_experiment_by_name(experiment_name).experiment_id
        run_id = api.create_run(number, tags={"a": 1, "user@host": "1"}).info.run_id
        api.log_metric(run_id, "m", 1.0)
        deliver(uri)
    found = the_run(sqlite_uri, experiment_name)
    assert ("1", "1", {"m": 1.0}) == (found.data.tags["a"], found.data.tags["user@host"], found.data.metrics)


def test_a_run_whose_tags_the_store_refuses_at_delivery_is_made_without_them(
    file_uri: str, experiment_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refused tag is a dead letter, once, with all that it said; the run and all else arrive."""
    uri = f"outbox+{file_uri}"
    with tracking(uri, tmp_path / "outbox", create_timeout=0) as mlflow:
        mlflow.set_experiment(experiment_name)
        with mlflow.start_run(tags={"user@host": "1", "good": "yes"}):
            mlflow.log_metric("m", 1.0)
        result = store(uri).outbox.flush(60)
        counters: dict[str, Any] = store(uri).outbox.counters.snapshot()
    assert (0, 0, 1) == (result.pending, result.parked, result.dead)
    assert 1 == counters["dead_letters"]
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    with client(file_uri) as api:
        number = api.get_experiment_by_name(experiment_name).experiment_id
        found = [run for run in api.search_runs([number]) if run.data.metrics]
    assert [("yes", None)] == [(run.data.tags.get("good"), run.data.tags.get("user@host")) for run in found]


def test_what_is_cut_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """For a long param and a long tag, alone and in a batch, as without an outbox."""
    logger = logging.getLogger("mlflow.utils.validation")
    logger.addHandler(caplog.handler)  # MLflow's loggers do not propagate by themselves
    try:
        with tracking(NOWHERE, tmp_path, exit_timeout=0) as mlflow, mlflow.start_run() as run:
            mlflow.log_param("p", "x" * 7000)
            mlflow.set_tag("t", LONG)
            mlflow.log_params({"q": "y" * 7000})
            kept = mlflow.get_run(run.info.run_id).data
        assert (6000, 6000, 8000) == (len(kept.params["p"]), len(kept.params["q"]), len(kept.tags["t"]))
    finally:
        logger.removeHandler(caplog.handler)
    # Where MLflow's loggers do propagate, because somebody has set that, a record comes here twice.
    assert 3 == len({id(record) for record in caplog.records if "is truncated to" in record.getMessage()})
