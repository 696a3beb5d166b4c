"""What unchanged MLflow code logged through an outbox, replayed to a server that it was not logged for."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

import plugin_scenarios
from mlflow_outbox.testing.proxy import FaultProxy
from plugin_world import deliver, differences, picture, store, tracking
from replays import command, the_outbox
from servers import MlflowServer

#: What differs most in what it leaves behind: nested runs, deleted ones, tables; files; datasets; models; traces.
_SCENARIOS = ("fluent", "client", "datasets", "model", "traces")


@pytest.mark.parametrize("mode", ["server's ids", "provisional ids"])
def test_another_server_gets_what_the_first_one_has(
    mode: str,
    mlflow_server: MlflowServer,
    own_mlflow_server: Callable[..., MlflowServer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Field by field: ids of the first server's runs, models and experiments stand for those of the second."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    experiments = {name: f"replayed-{name}-{uuid.uuid4().hex[:8]}" for name in _SCENARIOS}
    other = own_mlflow_server()
    with FaultProxy(mlflow_server.url) as proxy:
        if mode == "provisional ids":
            proxy.down()
        uri = f"outbox+{proxy.url}"
        with tracking(uri, tmp_path / "outbox") as mlflow:
            for name, experiment in experiments.items():
                plugin_scenarios.ALL[name](mlflow, experiment, plugin_scenarios.nothing)
            mlflow.flush_trace_async_logging()
            proxy.up()
            deliver(uri)
    expected = {experiment: picture(mlflow_server.url, experiment) for experiment in experiments.values()}
    for _ in range(2):  # the second time there is nothing to send
        assert 0 == command("replay", the_outbox(tmp_path / "outbox"), "--to", other.url)
        for experiment, first in expected.items():
            assert [] == differences(first, picture(other.url, experiment))


def test_into_another_experiment_go_runs_models_and_traces_and_nothing_of_the_first_one(
    sqlite_uri: str, empty_database: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two outboxes mean different experiments by the same id; what was done to those leaves the chosen one alone."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("MLFLOW_ENABLE_ASYNC_TRACE_LOGGING", "false")
    places = []
    for plain in (sqlite_uri, f"sqlite:///{empty_database(tmp_path / 'second.db')}"):
        with tracking(f"outbox+{plain}", tmp_path / "outbox") as mlflow:
            number = mlflow.create_experiment(f"first of {plain}", tags={"its": "own"})
            with mlflow.start_run(experiment_id=number, run_name="r"), mlflow.start_span("s"):
                mlflow.initialize_logged_model(name="m")
            deliver(f"outbox+{plain}")
            mlflow.MlflowClient().rename_experiment(number, f"renamed {plain}")
            mlflow.delete_experiment(number)
            deliver(f"outbox+{plain}")
            places.append(store(f"outbox+{plain}").outbox.directory.path)
    target = f"sqlite:///{empty_database(tmp_path / 'target.db')}"
    assert 0 == command("replay", *places, "--to", target, "--experiment", "all")
    found = picture(target, "all")
    assert ({}, "active") == (found["tags"], found["stage"])
    assert ["r", "r"] == [run["name"] for run in found["runs"]]
    assert [("m", "<r>")] * 2 == [(model["name"], model["source"]) for model in found["models"]]
    assert 2 == len(found["traces"])


def test_a_database_that_was_lost_is_filled_again(
    sqlite_uri: str, empty_database: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the runs that are kept after delivery; at a database that has lost nothing, nothing is made twice."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    uri, file = f"outbox+{sqlite_uri}", Path(sqlite_uri.removeprefix("sqlite:///"))
    with tracking(uri, tmp_path / "outbox") as mlflow:
        for name in ("fluent", "model", "traces"):
            plugin_scenarios.ALL[name](mlflow, name, plugin_scenarios.nothing)
        mlflow.flush_trace_async_logging()
        deliver(uri)
        expected = {name: picture(sqlite_uri, name) for name in ("fluent", "model", "traces")}
    for state in ("whole", "lost"):
        if state == "lost":
            file.unlink()
            empty_database(file)
            forget_engines()
        assert 0 == command("replay", the_outbox(tmp_path / "outbox"), "--again")
        for name, before in expected.items():
            assert [] == differences(before, picture(sqlite_uri, name)), state


def forget_engines() -> None:
    """Let MLflow forget its connections to databases, which it keeps by their URIs for ever."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    for engine in SqlAlchemyStore._engine_map.values():
        engine.dispose()
