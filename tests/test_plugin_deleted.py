"""Runs and databases that were deleted, by this program or by somebody else, and what is logged to them."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from contents import client
from mlflow_outbox.spool.reader import RunReader
from mlflow_outbox.testing.faults import delay, forward_then_drop_response, status
from mlflow_outbox.testing.proxy import Action, Exchange, FaultProxy
from plugin_world import WAYS, deliver, store, the_runs, tracking, world
from servers import MlflowServer, eventually

#: What MLflow refuses for a deleted run.
WRITES: dict[str, Callable[[Any, str], object]] = {
    "metric": lambda api, run: api.log_metric(run, "m", 1.0),
    "param": lambda api, run: api.log_param(run, "p", "1"),
    "tag": lambda api, run: api.set_tag(run, "t", "1"),
    "batch": lambda api, run: api.log_batch(run, params=[_param()]),
    "end": lambda api, run: api.set_terminated(run),
    "name": lambda api, run: api.update_run(run, name="renamed"),
    "deleted tag": lambda api, run: api.delete_tag(run, "kept"),
    "inputs": lambda api, run: api.log_inputs(run, datasets=[_dataset()]),
}


def _param() -> Any:
    from mlflow.entities import Param

    return Param("p", "1")


def _dataset() -> Any:
    from mlflow.entities import Dataset, DatasetInput

    return DatasetInput(Dataset("d", "1", "local", "{}"))


def refused(api: Any, run_id: str) -> list[str]:
    """Return the writes to a run that are refused as MLflow refuses them."""
    from mlflow.exceptions import MlflowException

    found = []
    for name, write in WRITES.items():
        try:
            write(api, run_id)
        except MlflowException as error:
            assert "must be in the 'active' state" in str(error), name  # noqa: PT017 - one of many, each named
            found.append(name)
    return found


@pytest.mark.parametrize("way", WAYS[:3])
def test_a_deleted_run_takes_nothing_until_it_is_restored(
    way: str, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """At the call, with and without an outbox, and offline too; files are taken all the same, as MLflow does."""
    with world(way, mlflow_server, tmp_path) as here:
        api = here.mlflow.MlflowClient()
        run_id = api.create_run(api.create_experiment(experiment_name), tags={"kept": "yes"}).info.run_id
        api.delete_run(run_id)
        assert list(WRITES) == refused(api, run_id)
        api.log_text(run_id, "x", "x.txt")
        api.restore_run(run_id)
        assert [] == refused(api, run_id)
    with client(mlflow_server.url) as api:
        (found,) = api.search_runs([api.get_experiment_by_name(experiment_name).experiment_id])
        assert ({"m": 1.0}, {"p": "1"}) == (found.data.metrics, found.data.params)
        assert ["x.txt"] == [file.path for file in api.list_artifacts(found.info.run_id)]


@pytest.mark.parametrize("way", WAYS)
def test_the_runs_of_a_deleted_experiment_take_nothing_until_it_is_restored(
    way: str, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """As the program knows that deleted it, whether the server is there or not; runs of others go on."""
    with world(way, mlflow_server, tmp_path) as here:
        api = here.mlflow.MlflowClient()
        number = api.create_experiment(experiment_name)
        run_id = api.create_run(number, tags={"kept": "yes"}).info.run_id
        other_id = api.create_run(api.create_experiment(f"{experiment_name}-other"), tags={"kept": "yes"}).info.run_id
        if way == "killed":
            deliver(here.uri)
            here.kill()
        api.delete_experiment(number)
        for _ in range(2):
            assert list(WRITES) == refused(api, run_id)
        assert [] == refused(api, other_id)
        here.proxy.up()
        if way != "plain":
            eventually(lambda: not store(here.uri).server.is_away(), message="the pause after the outage is over")
        api.restore_experiment(number)
        assert [] == refused(api, run_id)
    with client(mlflow_server.url) as api:
        for name in (experiment_name, f"{experiment_name}-other"):
            (found,) = api.search_runs([api.get_experiment_by_name(name).experiment_id])
            assert ({"m": 1.0}, {"p": "1"}) == (found.data.metrics, found.data.params)


def test_what_was_logged_after_an_experiment_was_restored_waits_for_that(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Its run is sent beside the experiment's changes, and what MLflow refuses meanwhile is sent again."""
    tagged, deleted, refused = threading.Event(), threading.Event(), threading.Event()

    def then(event: threading.Event, *, after: threading.Event | None = None) -> Action:
        def run(exchange: Exchange) -> None:
            assert after is None or after.wait(60)
            exchange.forward()
            event.set()

        return Action("then", run)

    with (
        FaultProxy(mlflow_server.url) as proxy,
        tracking(f"outbox+{proxy.url}", tmp_path, create_timeout=0.5) as mlflow,
    ):
        api = mlflow.MlflowClient()
        uri = f"outbox+{proxy.url}"
        number = api.create_experiment(experiment_name)
        run_id = api.create_run(number).info.run_id
        deliver(uri)
        before = len(proxy.requests)
        proxy.on("set-experiment-tag", then(threading.Event(), after=tagged))
        proxy.on("experiments/delete", then(deleted))
        proxy.on("runs/log-batch", then(refused, after=deleted))
        proxy.on("experiments/restore", then(threading.Event(), after=refused))
        api.set_experiment_tag(number, "what", "is on its way")
        api.delete_experiment(number)
        api.restore_experiment(number)
        api.log_metric(run_id, "m", 1.0)
        tagged.set()
        deliver(uri)
        said = [one.status for one in proxy.requests[before:] if one.path.endswith("log-batch")]
        assert (400, 200) == (said[0], said[-1])
        assert 0 == store(uri).outbox.counters["parked"]
    (found,) = the_runs(mlflow_server.url, experiment_name)
    assert {"m": 1.0} == found.data.metrics


@pytest.mark.parametrize("way", WAYS)
def test_an_experiment_is_deleted_after_the_runs_that_were_logged_in_it_have_arrived(
    way: str, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """They are deleted with it; it takes no further one, in another process either, and the others go on."""
    from mlflow.exceptions import MlflowException

    with world(way, mlflow_server, tmp_path) as here:
        api = here.mlflow.MlflowClient()
        here.kill()
        number = api.create_experiment(experiment_name)
        run_id = api.create_run(number, run_name="inside").info.run_id
        api.log_metric(run_id, "m", 1.0)
        api.log_text(run_id, "x", "x.txt")
        api.delete_experiment(number)
        assert "deleted" == api.get_run(run_id).info.lifecycle_stage
        with pytest.raises(MlflowException, match="must be in the 'active' state"):
            api.create_run(number)
        if way != "plain":
            store(here.uri)._gone.clear()  # as in another process
            store(here.uri)._active_experiments.clear()
            with pytest.raises(MlflowException, match="must be in the 'active' state"):
                api.create_run(number)
        other_id = api.create_run(api.create_experiment(f"{experiment_name}-other")).info.run_id
        api.log_metric(other_id, "m", 2.0)
    (found,) = the_runs(mlflow_server.url, experiment_name)
    assert ("inside", "deleted", {"m": 1.0}) == (found.info.run_name, found.info.lifecycle_stage, found.data.metrics)
    (other,) = the_runs(mlflow_server.url, f"{experiment_name}-other")
    assert ("active", {"m": 2.0}) == (other.info.lifecycle_stage, other.data.metrics)


def test_an_experiment_is_not_deleted_while_points_of_its_runs_are_on_their_way(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """With the server there too: its deletion overtakes nothing, and a restoration does not overtake that."""
    with FaultProxy(mlflow_server.url) as proxy:
        uri = f"outbox+{proxy.url}"
        with tracking(uri, tmp_path, create_timeout=0.5) as mlflow:
            api = mlflow.MlflowClient()
            number = api.create_experiment(experiment_name)
            run_id = api.create_run(number).info.run_id
            deliver(uri)
            proxy.on("runs/log-batch", delay(3), times=1)
            api.log_metric(run_id, "m", 1.0)
            api.delete_experiment(number)
            assert "deleted" == api.get_run(run_id).info.lifecycle_stage
            api.restore_experiment(number)
            api.delete_experiment(number)
            deliver(uri)
    (found,) = the_runs(mlflow_server.url, experiment_name)
    assert ("deleted", {"m": 1.0}) == (found.info.lifecycle_stage, found.data.metrics)


def test_a_deletion_that_waits_for_a_parked_run_is_parked_with_it_and_holds_up_nobody_else(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The run would be lost to it; who restores the run lets both go on."""
    with (
        caplog.at_level(logging.WARNING, "mlflow_outbox"),
        FaultProxy(mlflow_server.url) as proxy,
        client(mlflow_server.url) as plain,
    ):
        uri = f"outbox+{proxy.url}"
        with tracking(uri, tmp_path, parked_retry=0.2) as mlflow:
            api = mlflow.MlflowClient()
            number = api.create_experiment(experiment_name)
            other = api.create_experiment(f"{experiment_name}-other")
            run_id = api.create_run(number).info.run_id
            deliver(uri)
            proxy.down()
            api.log_metric(run_id, "m", 1.0)
            api.delete_experiment(number)
            other_id = api.create_run(other).info.run_id
            api.log_metric(other_id, "m", 2.0)
            plain.delete_run(run_id)
            proxy.up()
            left = store(uri).outbox.flush(None)
            assert (0, 2) == (left.pending, left.parked)
            assert f"waits for a person: it waits for {run_id}, which is parked" in caplog.text
            assert "active" == plain.get_experiment(number).lifecycle_stage
            assert [{"m": 2.0}] == [run.data.metrics for run in the_runs(mlflow_server.url, f"{experiment_name}-other")]
            plain.restore_run(run_id)
            eventually(lambda: store(uri).outbox.flush(1), 60, "both are delivered")
        assert "deleted" == plain.get_experiment(number).lifecycle_stage
        assert [1.0] == [point.value for point in plain.get_metric_history(run_id, "m")]


def test_a_deletion_does_not_wait_for_a_run_that_waits_for_what_comes_behind_it(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """A run that began before and names a model that was made after the experiment was restored: all of it arrives."""
    with world("away", mlflow_server, tmp_path) as here:
        api = here.mlflow.MlflowClient()
        number = api.create_experiment(experiment_name)
        run_id = api.create_run(number).info.run_id
        api.delete_experiment(number)
        api.restore_experiment(number)
        model = api.create_logged_model(number, name="net")
        api.set_tag(run_id, "made", model.model_id)
    (found,) = the_runs(mlflow_server.url, experiment_name)
    assert "active" == found.info.lifecycle_stage
    with client(mlflow_server.url) as plain:
        assert "net" == plain.get_logged_model(found.data.tags["made"]).name


@pytest.mark.parametrize("mode", ["plain", "up", "away"])
def test_a_run_that_this_outbox_has_not_met_is_restored_and_one_that_is_nowhere_is_not(
    mode: str, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With the server there at the call, with MLflow's error; while it is away, it is parked with the reason."""
    from mlflow.exceptions import MlflowException

    unknown = uuid.uuid4().hex
    with client(mlflow_server.url) as api:
        run_id = api.create_run(api.create_experiment(experiment_name)).info.run_id
        api.delete_run(run_id)
    with FaultProxy(mlflow_server.url) as proxy:
        uri = mlflow_server.url if mode == "plain" else f"outbox+{proxy.url}"
        with caplog.at_level(logging.WARNING, "mlflow_outbox"), tracking(uri, tmp_path) as mlflow:
            if mode == "away":
                proxy.down()
            mlflow.MlflowClient().restore_run(run_id)
            if mode == "away":
                mlflow.MlflowClient().restore_run(unknown)
                proxy.up()
                result = store(uri).outbox.flush(60)
                assert (0, 1) == (result.pending, result.parked)
                assert f"the run {unknown} did not begin in this outbox, and MLflow does not have it" in caplog.text
            else:
                for _ in range(2):
                    with pytest.raises(MlflowException, match="not found") as raised:
                        mlflow.MlflowClient().restore_run(unknown)
                    assert "RESOURCE_DOES_NOT_EXIST" == raised.value.error_code
                deliver(uri)
            if mode == "up":
                identity = RunReader(store(uri).outbox.directory.run(run_id)).segments().values()
                assert [experiment_name] == [held[0].header.experiment for held in identity]
    with client(mlflow_server.url) as api:
        assert "active" == api.get_run(run_id).info.lifecycle_stage


def test_another_process_knows_that_a_run_was_deleted_and_that_it_was_restored(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """From the outbox that they share; a restore that only the server knows of counts as well."""
    uri = f"outbox+{mlflow_server.url}"
    with tracking(uri, tmp_path) as mlflow:
        api = mlflow.MlflowClient()
        run_id = api.create_run(api.create_experiment(experiment_name), tags={"kept": "yes"}).info.run_id
        api.delete_run(run_id)
        deliver(uri)
        with tracking(uri, tmp_path, poll_interval=0.03) as other:  # with a store and journals of its own
            api = other.MlflowClient()
            assert list(WRITES) == refused(api, run_id)
            with client(mlflow_server.url) as plain:
                plain.restore_run(run_id)
            assert [] == refused(api, run_id)
            deliver(uri)


def test_what_was_logged_to_a_run_that_somebody_else_deleted_waits_for_a_person(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The call cannot know it. The run is parked with MLflow's reason; restored, it gets everything, once."""
    uri = f"outbox+{mlflow_server.url}"
    with (
        caplog.at_level(logging.WARNING, "mlflow_outbox"),
        client(mlflow_server.url) as plain,
        tracking(uri, tmp_path, parked_retry=0.1) as mlflow,
    ):
        mlflow.set_experiment(experiment_name)
        run = mlflow.start_run()
        deliver(uri)
        plain.delete_run(run.info.run_id)
        mlflow.log_metric("m", 1.0)
        eventually(lambda: store(uri).outbox.flush(1).parked == 1, message="it is parked")
        result = store(uri).outbox.flush(1)
        assert (0, 0) == (result.pending, result.dead)
        assert "waits for a person" in caplog.text
        assert "must be in the 'active' state. Current state is deleted" in caplog.text
        plain.restore_run(run.info.run_id)
        mlflow.end_run()
        deliver(uri)
        assert [1.0] == [point.value for point in plain.get_metric_history(run.info.run_id, "m")]
        assert "FINISHED" == plain.get_run(run.info.run_id).info.status


@pytest.mark.parametrize("what", ["run", "experiment"])
def test_what_somebody_else_deleted_is_restored_through_the_outbox_too(
    what: str, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """The restoration is logged behind what MLflow refuses until then: in its turn it would never come."""
    uri = f"outbox+{mlflow_server.url}"
    with client(mlflow_server.url) as plain, tracking(uri, tmp_path, parked_retry=0.1) as mlflow:
        api = mlflow.MlflowClient()
        number = api.create_experiment(experiment_name)
        run_id = api.create_run(number).info.run_id
        deliver(uri)
        if what == "run":
            plain.delete_run(run_id)
            api.log_metric(run_id, "m", 1.0)
        else:
            plain.delete_experiment(number)
            api.set_experiment_tag(number, "t", "1")
        eventually(lambda: store(uri).outbox.flush(1).parked == 1, message="it is parked")
        if what == "run":
            api.restore_run(run_id)
        else:
            api.restore_experiment(number)
        deliver(uri)
        assert ("active", "active") == (
            plain.get_experiment(number).lifecycle_stage,
            plain.get_run(run_id).info.lifecycle_stage,
        )
        expected: tuple[list[float], dict[str, str]] = ([1.0], {}) if what == "run" else ([], {"t": "1"})
        points = [point.value for point in plain.get_metric_history(run_id, "m")]
        assert expected == (points, dict(plain.get_experiment(number).tags))


@pytest.mark.parametrize("journal_mode", ["delete", "wal"])
def test_a_database_that_is_taken_away_while_it_is_open_takes_nothing_with_it(
    journal_mode: str, sqlite_uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Open connections still lead to the file that is gone; what is logged waits, and the message says for what."""
    uri, file = f"outbox+{sqlite_uri}", Path(sqlite_uri.removeprefix("sqlite:///"))
    with contextlib.closing(sqlite3.connect(file)) as database:
        database.execute(f"PRAGMA journal_mode={journal_mode}")
    with caplog.at_level(logging.WARNING, "mlflow_outbox"), tracking(uri, tmp_path / "outbox") as mlflow:
        run = mlflow.start_run()
        mlflow.log_metric("m", 1.0)
        deliver(uri)
        parts = [part for part in tmp_path.glob("mlflow.db*") if part.is_file()]
        for part in parts:
            part.rename(part.with_name(f"aside-{part.name}"))
        mlflow.log_metric("m", 2.0, step=1)
        assert {"m": 2.0} == mlflow.get_run(run.info.run_id).data.metrics
        eventually(lambda: f"the database {file} was there and is gone" in caplog.text, message="it is said")
        assert not file.exists()
        for part in parts:
            part.with_name(f"aside-{part.name}").rename(part)
        deliver(uri)
        mlflow.end_run()
        deliver(uri)
    with client(sqlite_uri) as api:
        assert [1.0, 2.0] == [point.value for point in api.get_metric_history(run.info.run_id, "m")]


@pytest.mark.parametrize(
    ("place", "restored"),
    [
        ("runs/delete", False),
        ("runs/delete", True),
        ("runs/restore", True),
        ("logged-models", False),
        ("logged-models", True),
    ],
)
def test_what_was_logged_before_a_deletion_is_not_refused_for_it_after_an_answer_that_was_lost(
    place: str, restored: bool, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """It is recorded before that is sent: sent anew with it, it would be refused, and all that follows would wait."""
    with FaultProxy(mlflow_server.url) as proxy:
        uri = f"outbox+{proxy.url}"
        with tracking(uri, tmp_path / "outbox", worker="none") as mlflow:
            api = mlflow.MlflowClient()
            number = api.create_experiment(experiment_name)
            run_id = api.create_run(number).info.run_id
            api.log_metric(run_id, "m", 1.0)
            model = api.create_logged_model(number, name="made", source_run_id=run_id)
            (tmp_path / "x.txt").write_text("x")
            api.log_model_artifact(model.model_id, str(tmp_path / "x.txt"))
            api.delete_logged_model(model.model_id)
            api.log_param(run_id, "p", "1")
            api.delete_run(run_id)
            if restored:
                api.restore_run(run_id)
                api.log_metric(run_id, "m", 2.0)

            def is_it(method: str, path: str) -> bool:
                return place in path and (method == "DELETE" or "logged-models" not in place)

            proxy.on(is_it, forward_then_drop_response())
            proxy.on(is_it, status(503))
        with tracking(uri, tmp_path / "outbox", parked_retry=60):
            deliver(uri)
        assert 2 < len([one for one in proxy.requests if is_it(one.method, one.path)])
    with client(mlflow_server.url) as api:
        held = api.get_run(run_id)
        assert ("active" if restored else "deleted") == held.info.lifecycle_stage
        assert {"p": "1"} == held.data.params
        assert {"m": 2.0 if restored else 1.0} == held.data.metrics
