"""Runs that name another one, which cannot be delivered: they come after it, and no wait for them is without end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from contents import client, runs
from mlflow_outbox.spool import provisional
from mlflow_outbox.testing.faults import status
from mlflow_outbox.testing.proxy import FaultProxy
from plugin_world import away, store, tracking
from replays import command, the_outbox
from servers import MlflowServer, eventually

_PARENT = "mlflow.parentRunId"


@pytest.fixture
def deleted(mlflow_server: MlflowServer, experiment_name: str) -> str:
    """The name of an experiment that somebody deleted at the server."""
    name = f"{experiment_name}-deleted"
    with client(mlflow_server.url) as api:
        api.delete_experiment(api.create_experiment(name))
    return name


@pytest.fixture
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory of the test's own for what a replay remembers."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def restore(url: str, name: str) -> None:
    """Restore an experiment."""
    with client(url) as api:
        api.restore_experiment(api.get_experiment_by_name(name).experiment_id)


def log_family(mlflow: Any, parents: str, children: str) -> tuple[str, str]:
    """Log a run, a child of it in another experiment and a child of that, and return the ids of the first two."""
    with mlflow.start_run(experiment_id=mlflow.create_experiment(parents), run_name="parent") as parent:
        mlflow.log_metric("m", 1.0)
    number = mlflow.create_experiment(children)
    with mlflow.start_run(experiment_id=number, run_name="child", tags={_PARENT: parent.info.run_id}) as child:
        mlflow.log_metric("m", 2.0)
    with mlflow.start_run(experiment_id=number, run_name="grandchild", tags={_PARENT: child.info.run_id}):
        mlflow.log_metric("m", 3.0)
    return parent.info.run_id, child.info.run_id


def parents_of(url: str, experiment: str) -> dict[str, str]:
    """Return the names of runs, each with the name of its parent."""
    with client(url) as api:
        return {
            str(run.info.run_name): str(api.get_run(run.data.tags[_PARENT]).info.run_name)
            for run in runs(url, experiment)
        }


@pytest.mark.usefixtures("own_state")
def test_a_replay_names_the_children_of_a_run_that_is_skipped(
    mlflow_server: MlflowServer, experiment_name: str, deleted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It ends, says who waits for whom, and sends them all once the parent can be sent."""
    with tracking("outbox+http://127.0.0.1:9", tmp_path / "outbox", worker="none", exit_timeout=0) as mlflow:
        parent, child = log_family(mlflow, deleted, experiment_name)
        args = ("replay", the_outbox(tmp_path / "outbox"), "--to", mlflow_server.url)
        assert 4 == command(*args)
        said = capsys.readouterr().err
        assert f"run {parent} was skipped" in said
        assert f"run {child} was skipped: it waits for {parent}, which is parked" in said
        assert f"was skipped: it waits for {child}, which is parked" in said
        assert [] == runs(mlflow_server.url, experiment_name)
        restore(mlflow_server.url, deleted)
        assert 0 == command(*args)
    assert {"child": "parent", "grandchild": "child"} == parents_of(mlflow_server.url, experiment_name)


def test_a_flush_counts_the_children_of_a_parked_run_as_parked(
    mlflow_server: MlflowServer, experiment_name: str, deleted: str, tmp_path: Path
) -> None:
    """It returns although it was given no time limit, and the children go on when the parent does."""
    with FaultProxy(mlflow_server.url) as proxy:
        uri = f"outbox+{proxy.url}"
        proxy.down()
        with tracking(uri, tmp_path / "outbox", parked_retry=0.2) as mlflow:
            log_family(mlflow, deleted, experiment_name)
            proxy.up()
            left = store(uri).outbox.flush(None)
            assert not left
            assert 0 == left.pending
            assert [] == runs(mlflow_server.url, experiment_name)
            restore(mlflow_server.url, deleted)
            eventually(lambda: store(uri).outbox.flush(1), 60, "the family is delivered")
    assert {"child": "parent", "grandchild": "child"} == parents_of(mlflow_server.url, experiment_name)


@pytest.mark.usefixtures("own_state")
def test_a_child_that_is_taken_alone_does_not_wait_for_its_parent(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is not in a bundle cannot come; of a run that is on disk and was left out a person is told."""
    with FaultProxy(mlflow_server.url) as proxy:
        proxy.down()
        with tracking(f"outbox+{proxy.url}", tmp_path / "outbox", worker="none", create_timeout=0) as mlflow:
            parent, child = log_family(mlflow, f"{experiment_name}-parents", experiment_name)
        proxy.up()
        outbox, bundle = the_outbox(tmp_path / "outbox"), tmp_path / "child.tar"
        assert 4 == command("replay", outbox / "runs" / child, "--timeout", 60)
        assert f"run {child} was skipped: it waits for {parent}, which is not among" in capsys.readouterr().err
        assert 0 == command("export", child, "-d", outbox, "-o", bundle)
        assert 0 == command("replay", bundle, "--timeout", 60)
    (sent,) = runs(mlflow_server.url, experiment_name)
    assert ("child", parent) == (sent.info.run_name, sent.data.tags[_PARENT])


def log_model_and_user(mlflow: Any, makers: str, users: str) -> tuple[str, str]:
    """Make a model in a run of one experiment and name it in one of another; return the ids of the two runs."""
    number = mlflow.create_experiment(makers)
    with mlflow.start_run(experiment_id=number, run_name="maker") as maker:
        model = mlflow.initialize_logged_model(name="net", source_run_id=maker.info.run_id)
    with mlflow.start_run(experiment_id=mlflow.create_experiment(users), run_name="user") as user:
        mlflow.set_tag("made", f"by {model.model_id}")
        mlflow.log_metric("m", 1.0)
    return maker.info.run_id, user.info.run_id


def model_named(url: str, experiment: str) -> str:
    """Return the name of the model that the tag of an experiment's only run names."""
    (user,) = runs(url, experiment)
    with client(url) as api:
        return str(api.get_logged_model(user.data.tags["made"].removeprefix("by ")).name)


@pytest.mark.usefixtures("own_state")
def test_a_run_that_names_the_model_of_a_parked_run_waits_and_says_for_which(
    mlflow_server: MlflowServer,
    experiment_name: str,
    deleted: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """For as long as that takes: the model's id is known only when its run is delivered."""
    monkeypatch.setattr("mlflow_outbox_worker.remote_ids._PATIENCE", 2.0)
    with tracking("outbox+http://127.0.0.1:9", tmp_path / "outbox", worker="none", exit_timeout=0) as mlflow:
        maker, user = log_model_and_user(mlflow, deleted, experiment_name)
        args = ("replay", the_outbox(tmp_path / "outbox"), "--to", mlflow_server.url)
        assert 4 == command(*args)
        assert f"run {user} was skipped: it waits for {maker}, which is parked" in capsys.readouterr().err
        restore(mlflow_server.url, deleted)
        assert 0 == command(*args)
    assert "net" == model_named(mlflow_server.url, experiment_name)


def test_a_model_of_a_parked_run_is_waited_for_longer_than_one_that_nobody_makes(
    mlflow_server: MlflowServer, experiment_name: str, deleted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An id that no journal explains is sent as it is after a while, and holds nothing up."""
    monkeypatch.setattr("mlflow_outbox_worker.remote_ids._PATIENCE", 2.0)
    nobodys = provisional.new_model_id()
    with FaultProxy(mlflow_server.url) as proxy:
        uri = f"outbox+{proxy.url}"
        proxy.down()
        with tracking(uri, tmp_path / "outbox", parked_retry=0.2) as mlflow:
            log_model_and_user(mlflow, deleted, experiment_name)
            with mlflow.start_run(experiment_id=mlflow.create_experiment(f"{experiment_name}-other")):
                mlflow.set_tag("made", nobodys)
            proxy.up()
            left = store(uri).outbox.flush(None)
            assert not left
            assert 0 == left.pending
            (other,) = runs(mlflow_server.url, f"{experiment_name}-other")
            assert nobodys == other.data.tags["made"]
            restore(mlflow_server.url, deleted)
            eventually(lambda: store(uri).outbox.flush(1), 60, "both are delivered")
    assert "net" == model_named(mlflow_server.url, experiment_name)


@pytest.mark.parametrize("home", ["run", "experiment"])
def test_a_model_that_mlflow_refuses_to_make_holds_nothing_up(
    home: str, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """It began while the server was away. What was to be done to it is refused with it, and all else arrives."""
    words = '{"error_code": "INVALID_PARAMETER_VALUE", "message": "there are no models like this"}'
    (tmp_path / "x.txt").write_text("x")
    with away(mlflow_server, tmp_path / "outbox") as (mlflow, proxy, uri):
        api = mlflow.MlflowClient()
        number = mlflow.set_experiment(experiment_name).experiment_id
        with mlflow.start_run() as run:
            source = run.info.run_id if home == "run" else None
            model = api.create_logged_model(number, name="net", source_run_id=source).model_id
            mlflow.set_tag("made", f"by {model}")
            api.log_model_artifact(model, str(tmp_path / "x.txt"))
            api.finalize_logged_model(model, "READY")
            mlflow.log_metric("m", 1.0)
        api.set_experiment_tag(number, "behind", "it")
        proxy.on(
            lambda method, path: method == "POST" and path.endswith("mlflow/logged-models"),
            status(400, {"Content-Type": "application/json"}, words),
            times=None,
        )
        proxy.up()
        left = store(uri).outbox.flush(60)
        assert (0, 0, 3) == (left.pending, left.parked, left.dead)
    (found,) = runs(mlflow_server.url, experiment_name)
    assert ({"m": 1.0}, f"by {model}") == (found.data.metrics, found.data.tags["made"])
    with client(mlflow_server.url) as plain:
        assert "it" == plain.get_experiment_by_name(experiment_name).tags["behind"]
