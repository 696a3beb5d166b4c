"""Experiments behind an ``outbox+`` URI: what MLflow refuses is refused at the call, offline too; reads as MLflow's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from contents import client
from mlflow_outbox.plugin.ids import NotYet
from mlflow_outbox.spool import provisional
from mlflow_outbox.testing.proxy import FaultProxy
from plugin_world import NOWHERE, away, deliver, store, tracking
from servers import MlflowServer


def code_of(call: Callable[[], object]) -> str:
    """Return MLflow's error code of a call, "" when it goes well."""
    from mlflow.exceptions import MlflowException

    try:
        call()
    except MlflowException as error:
        return str(error.error_code)
    return ""


def test_an_experiment_is_not_renamed_to_a_name_that_another_has(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Else both would be one in the end, or everything of them would wait for ever."""
    with away(mlflow_server, tmp_path, create_timeout=0.5) as (mlflow, proxy, uri):
        api = mlflow.MlflowClient()
        one, other = (api.create_experiment(f"{experiment_name}-{name}") for name in ("a", "b"))
        assert "RESOURCE_ALREADY_EXISTS" == code_of(lambda: api.rename_experiment(one, f"{experiment_name}-b"))
        api.rename_experiment(one, f"{experiment_name}-c")
        api.rename_experiment(other, f"{experiment_name}-a")
        api.set_experiment_tag(other, "after", "1")
        proxy.up()
        deliver(uri)
    with client(mlflow_server.url) as held:
        assert {"after": "1"} == dict(held.get_experiment_by_name(f"{experiment_name}-a").tags)
        assert {} == dict(held.get_experiment_by_name(f"{experiment_name}-c").tags)
        assert held.get_experiment_by_name(f"{experiment_name}-b") is None


def test_a_name_that_somebody_took_at_the_server_is_a_dead_letter_and_the_rest_goes_on(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Nobody here could know it; MLflow answers as for two requests that met, which would be asked for ever."""
    with client(mlflow_server.url) as theirs:
        theirs.create_experiment(f"{experiment_name}-taken")
    with away(mlflow_server, tmp_path, create_timeout=0.5) as (mlflow, proxy, uri):
        api = mlflow.MlflowClient()
        number = api.create_experiment(experiment_name)
        api.rename_experiment(number, f"{experiment_name}-taken")
        api.set_experiment_tag(number, "after", "1")
        proxy.up()
        result = store(uri).outbox.flush(60)
        assert (0, 0, 1) == (result.pending, result.parked, result.dead)
    with client(mlflow_server.url) as held:
        assert {"after": "1"} == dict(held.get_experiment_by_name(experiment_name).tags)


def test_an_experiment_is_deleted_once_and_restored_once(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """A second time is refused as MLflow does, and does not keep back what follows."""
    with away(mlflow_server, tmp_path, create_timeout=0.5) as (mlflow, proxy, uri):
        api = mlflow.MlflowClient()
        number = api.create_experiment(experiment_name)
        assert "RESOURCE_DOES_NOT_EXIST" == code_of(lambda: api.restore_experiment(number))
        api.delete_experiment(number)
        assert "RESOURCE_DOES_NOT_EXIST" == code_of(lambda: api.delete_experiment(number))
        api.restore_experiment(number)
        api.set_experiment_tag(number, "after", "1")
        proxy.up()
        deliver(uri)
    with client(mlflow_server.url) as held:
        found = held.get_experiment_by_name(experiment_name)
        assert ("active", {"after": "1"}) == (found.lifecycle_stage, dict(found.tags))


@pytest.mark.parametrize("operation", ["delete", "restore"])
def test_what_somebody_else_has_done_to_an_experiment_meanwhile_holds_up_nothing(
    operation: str, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """It is in the state that was asked for."""
    with FaultProxy(mlflow_server.url) as proxy, client(mlflow_server.url) as theirs:
        uri = f"outbox+{proxy.url}"
        with tracking(uri, tmp_path, create_timeout=0.5) as mlflow:
            api = mlflow.MlflowClient()
            number = api.create_experiment(experiment_name)
            api.set_experiment_tag(number, "before", "1")
            if operation == "restore":
                api.delete_experiment(number)
            deliver(uri)
            there = theirs.get_experiment_by_name(experiment_name).experiment_id  # it may not have named it in time
            proxy.down()
            if operation == "restore":
                api.restore_experiment(number)
                theirs.restore_experiment(there)
                api.set_experiment_tag(number, "after", "1")
            else:
                api.delete_experiment(number)
                theirs.delete_experiment(there)
            proxy.up()
            deliver(uri)
        found = theirs.get_experiment(there)
        expected = ("active", {"before": "1", "after": "1"}) if operation == "restore" else ("deleted", {"before": "1"})
        assert expected == (found.lifecycle_stage, dict(found.tags))


def test_what_was_done_to_an_experiment_at_once_does_not_hide_what_was_done_to_it_later(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """It is written down for other processes too; where nobody delivers that, the server knows better for days."""
    uri = f"outbox+{mlflow_server.url}"
    with (
        client(mlflow_server.url) as theirs,
        tracking(uri, tmp_path, worker="none", create_timeout=20, exit_timeout=0) as mlflow,
    ):
        api = mlflow.MlflowClient()
        number = api.create_experiment(experiment_name)
        api.rename_experiment(number, f"{experiment_name}-ours")
        theirs.rename_experiment(number, f"{experiment_name}-theirs")
        assert f"{experiment_name}-theirs" == api.get_experiment(number).name
        api.delete_experiment(number)
        api.restore_experiment(number)
        api.delete_experiment(number)
        assert "deleted" == api.get_experiment(number).lifecycle_stage


@pytest.mark.parametrize("scheme", ["http", "sqlite"])
def test_an_experiment_that_is_found_by_its_name_shows_what_was_just_written(
    scheme: str, mlflow_server: MlflowServer, sqlite_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """As one that is found by its id; and under the name that it has by now."""
    uri = f"outbox+{mlflow_server.url if scheme == 'http' else sqlite_uri}"
    with tracking(uri, tmp_path) as mlflow:
        api = mlflow.MlflowClient()
        number = api.create_experiment(experiment_name)
        for value in map(str, range(5)):
            api.set_experiment_tag(number, "k", value)
            assert {"k": value} == dict(api.get_experiment_by_name(experiment_name).tags)
        assert {"k": "4"} == dict(mlflow.set_experiment(experiment_name).tags)
        api.rename_experiment(number, f"{experiment_name}-new")
        assert api.get_experiment_by_name(experiment_name) is None
        assert number == api.get_experiment_by_name(f"{experiment_name}-new").experiment_id


@pytest.mark.parametrize("by_name", [False, True])
def test_what_arrives_while_an_experiment_is_read_is_not_left_out(
    by_name: bool, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was neither in the server's answer, which was older, nor any more in what waits."""
    uri = f"outbox+{mlflow_server.url}"
    with tracking(uri, tmp_path) as mlflow:
        api = mlflow.MlflowClient()
        number = api.create_experiment(experiment_name)
        api.set_experiment_tag(number, "k", "old")
        deliver(uri)
        plugin = store(uri)
        looked = plugin.local_run

        def delivered_first(run_id: str) -> Any:
            deliver(uri)
            return looked(run_id)

        api.set_experiment_tag(number, "k", "new")
        monkeypatch.setattr(plugin, "local_run", delivered_first)
        found = api.get_experiment_by_name(experiment_name) if by_name else api.get_experiment(number)
        assert {"k": "new"} == dict(found.tags)


def test_the_history_of_a_metric_is_in_one_order_before_and_after_its_delivery(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """As MLflow's databases give it, whatever the order of the calls."""
    with away(mlflow_server, tmp_path, create_timeout=0.5) as (mlflow, proxy, uri):
        api = mlflow.MlflowClient()
        run_id = api.create_run(api.create_experiment(experiment_name)).info.run_id
        for value, step, time in ((1.0, 5, 5), (2.0, 3, 1), (3.0, 5, 9), (4.0, 6, 2), (5.0, 6, 2)):
            api.log_metric(run_id, "m", value, timestamp=time, step=step)

        def history() -> list[tuple[float, int, int]]:
            return [(one.value, one.step, one.timestamp) for one in api.get_metric_history(run_id, "m")]

        before = history()
        proxy.up()
        deliver(uri)
        assert before == [(2.0, 3, 1), (4.0, 6, 2), (5.0, 6, 2), (1.0, 5, 5), (3.0, 5, 9)] == history()


def test_files_of_a_run_that_began_offline_are_registered_under_an_address_that_everybody_can_read(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """The outbox's own address means nothing to a program without the plugin."""
    with away(mlflow_server, tmp_path / "outbox", create_timeout=0.5) as (mlflow, proxy, uri):
        api = mlflow.MlflowClient()
        run = api.create_run(api.create_experiment(experiment_name))
        api.log_text(run.info.run_id, "name: m", "m/MLmodel")
        source = f"{api.get_run(run.info.run_id).info.artifact_uri}/m"
        assert source.startswith("outbox-artifacts:")
        proxy.up()
        deliver(uri)
        api.create_registered_model(experiment_name)
        api.create_model_version(experiment_name, source, run.info.run_id)
        mlflow.set_tracking_uri(mlflow_server.url)
        with pytest.raises(mlflow.MlflowException, match="outbox\\+ tracking URI"):
            mlflow.artifacts.list_artifacts(source)
    with client(mlflow_server.url) as held:
        (version,) = held.search_model_versions(f"name='{experiment_name}'")
        assert version.source.startswith("mlflow-artifacts:")
        assert ["m/MLmodel"] == [file.path for file in held.list_artifacts(version.run_id, "m")]


def test_files_in_a_directory_are_read_where_they_are(sqlite_uri: str, experiment_name: str, tmp_path: Path) -> None:
    """MLflow returns their path; a copy for each look would fill the disk."""
    with tracking(f"outbox+{sqlite_uri}", tmp_path / "outbox") as mlflow:
        mlflow.set_experiment(experiment_name)
        with mlflow.start_run() as run:
            mlflow.log_text("x", "folder/a file.txt")
            mlflow.log_text("y", "b.txt")
        found = Path(mlflow.artifacts.download_artifacts(f"{run.info.artifact_uri}/b.txt"))
        assert ("y", True) == (found.read_text(), found.samefile(root_of(run.info.artifact_uri) / "b.txt"))
        whole = Path(mlflow.artifacts.download_artifacts(run_id=run.info.run_id, artifact_path=""))
        assert whole.samefile(root_of(run.info.artifact_uri))
        copied = Path(mlflow.artifacts.download_artifacts(run_id=run.info.run_id, dst_path=str(tmp_path / "copy")))
        assert "x" == (copied / "folder" / "a file.txt").read_text()


def root_of(uri: str) -> Path:
    """The directory of a file URI or path."""
    from mlflow.utils.file_utils import local_file_uri_to_path

    return Path(local_file_uri_to_path(uri))


def test_threads_make_experiments_side_by_side_while_the_server_is_away(
    experiment_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The id of one that another thread is making is known before it is written, and more of them come at any time."""
    with tracking(NOWHERE, tmp_path, worker="none", exit_timeout=0) as mlflow:
        api, held = mlflow.MlflowClient(), store(NOWHERE)
        number = api.create_experiment(f"{experiment_name}-mine")

        def name_another() -> str:
            other = provisional.experiment_id(held.outbox.directory.identity.id, f"other {len(held._handed_out)}")
            held.know_experiment(other, "other")
            return other

        name_another()
        assert number == api.get_experiment_by_name(f"{experiment_name}-mine").experiment_id
        assert api.get_experiment_by_name("other") is None
        api.create_experiment(f"{experiment_name}-next")

        def ask(given: str) -> str:
            name_another()
            raise NotYet(given)

        monkeypatch.setattr(held.ids, "remote", ask)
        assert number == held.shown_experiment(number)
