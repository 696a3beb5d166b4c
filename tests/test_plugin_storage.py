"""Files of runs whose artifacts lie in a storage that MLflow's clients write to themselves, as they do with ``s3:``."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest

from contents import client
from mlflow_outbox.plugin.places import owner_by_look
from mlflow_outbox.testing.proxy import FaultProxy
from plugin_world import NOWHERE, deliver, store, tracking
from replays import command, the_outbox
from servers import MlflowServer


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[Path]:
    """The directory behind the scheme ``bucket:``, registered with MLflow as the plugin of a storage would be."""
    from mlflow.store.artifact.artifact_repository_registry import _artifact_repository_registry as registry
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    place = tmp_path / "storage"

    def repository(artifact_uri: str, *_uris: Any) -> LocalArtifactRepository:
        return LocalArtifactRepository(str(place / artifact_uri.removeprefix("bucket://")))

    registry.register("bucket", repository)
    yield place
    registry._registry.pop("bucket")


def test_a_storage_keeps_its_uri_and_is_written_to_by_the_worker_alone(
    storage: Path, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Runs and models show the server's own URIs; what is logged is read back at once and arrives with the rest."""
    uri = f"outbox+{mlflow_server.url}"
    with tracking(uri, tmp_path / "outbox", worker="none") as mlflow:
        number = mlflow.create_experiment(experiment_name, artifact_location="bucket://b")
        with mlflow.start_run(experiment_id=number) as run:
            assert f"bucket://b/{run.info.run_id}/artifacts/notes" == mlflow.get_artifact_uri("notes")
            mlflow.log_text("hello", "notes/a.txt")
            assert "hello" == mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/notes/a.txt")
            assert "hello" == mlflow.artifacts.load_text(mlflow.get_artifact_uri("notes/a.txt"))
            model = mlflow.initialize_logged_model(name="m")
            assert model.artifact_location.startswith("bucket://b/models/m-")
            mlflow.MlflowClient().log_model_artifact(model.model_id, str(written(tmp_path / "weights.bin")))
        assert not storage.exists()
    with tracking(uri, tmp_path / "outbox"):
        deliver(uri)
        assert "hello" == (storage / "b" / run.info.run_id / "artifacts/notes/a.txt").read_text()
        assert [b"weights"] == [path.read_bytes() for path in storage.rglob("weights.bin")]
        assert ["notes"] == [info.path for info in mlflow.artifacts.list_artifacts(run_id=run.info.run_id)]
    with tracking(mlflow_server.url, tmp_path / "outbox") as mlflow, mlflow.start_run(run_id=run.info.run_id):
        mlflow.log_text("plain", "plain.txt")  # the scheme's own repository, for whoever has no outbox
        assert "plain" == (storage / "b" / run.info.run_id / "artifacts/plain.txt").read_text()


def written(path: Path) -> Path:
    """Return a file that has been written."""
    path.write_bytes(b"weights")
    return path


@pytest.mark.parametrize(
    ("location", "shown"),
    [
        ("s3://bucket/root", "s3://bucket/root/{run}/artifacts/a/b"),
        ("mysql://user@host/db?driver=d", "mysql://user@host/db/{run}/artifacts/a/b?driver=d"),
    ],
)
def test_the_uri_of_a_file_is_what_it_is_without_an_outbox(
    location: str, shown: str, sqlite_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """Also with a query behind it, and for a scheme that MLflow has no repository for."""
    with client(sqlite_uri) as api:
        number = api.create_experiment(experiment_name, artifact_location=location)
    with tracking(f"outbox+{sqlite_uri}", tmp_path / "outbox", worker="none") as mlflow:
        with mlflow.start_run(experiment_id=number) as run:
            assert shown.format(run=run.info.run_id) == mlflow.get_artifact_uri("a/b")
        owner = store(f"outbox+{sqlite_uri}").places.owner_of(shown.format(run=run.info.run_id))
        assert ("run", run.info.run_id, "a/b") == owner


#: Where an experiment may keep its files at MLflow's server, under names that others have there, or nobody expects.
LOCATIONS = [
    *(
        "mlflow-artifacts:/",
        "mlflow-artifacts:/team/models",
        "mlflow-artifacts:/team/traces",
        "mlflow-artifacts:/models",
    ),
    *("mlflow-artifacts:/team/artifacts/", "mlflow-artifacts:/with a space/ä", "mlflow-artifacts:/per%cent/m-1/tr-2"),
]


def kept_in_odd_places(mlflow: Any, experiment: str, halfway: Callable[[], object]) -> list[Any]:
    """Log files of runs and models to each location; return what is read back."""
    api = mlflow.MlflowClient()
    began = []
    for number, location in enumerate(LOCATIONS):
        made = api.create_experiment(f"{experiment}-{number}", artifact_location=location)
        run = api.create_run(made).info.run_id
        began.append((location, run, mlflow.initialize_logged_model(name="m", experiment_id=made).model_id))
    halfway()
    seen = []
    for location, run, model in began:
        api.log_text(run, location, "x.txt")
        api.log_text(run, location, "models/m-1/artifacts/x.txt")
        with TemporaryDirectory() as folder:
            Path(folder, "weights").write_text(location)
            api.log_model_artifacts(model, folder)
        files = sorted(info.path for info in api.list_artifacts(run))
        seen.append((location, files, [info.path for info in api.list_logged_model_artifacts(model)]))
        for path in ("x.txt", "models/m-1/artifacts/x.txt"):
            assert location == mlflow.artifacts.load_text(f"runs:/{run}/{path}")
            assert location == mlflow.artifacts.load_text(f"{api.get_run(run).info.artifact_uri}/{path}")
        assert location == mlflow.artifacts.load_text(f"{api.get_logged_model(model).artifact_location}/weights")
    return seen


@pytest.mark.parametrize("mode", ["plain", "up", "away from the start", "away from halfway"])
def test_files_are_kept_wherever_an_experiment_keeps_its_files(
    mode: str, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Folders of the location that are called as MLflow calls its own are no models or traces; none is needed."""
    expected = [(location, ["models", "x.txt"], ["weights"]) for location in LOCATIONS]
    with FaultProxy(mlflow_server.url) as proxy:
        uri = proxy.url if mode == "plain" else f"outbox+{proxy.url}"
        with tracking(uri, tmp_path / "outbox") as mlflow:
            if "start" in mode:
                proxy.down()
            assert expected == kept_in_odd_places(mlflow, experiment_name, proxy.down if "halfway" in mode else str)
            proxy.up()
            deliver(uri)
    with client(mlflow_server.url) as api:
        for number, location in enumerate(LOCATIONS):
            made = api.get_experiment_by_name(f"{experiment_name}-{number}")
            (run,) = api.search_runs([made.experiment_id])
            assert ["models", "x.txt"] == sorted(info.path for info in api.list_artifacts(run.info.run_id)), location


def test_the_uri_of_a_run_that_this_process_has_not_met_is_told_by_the_id_in_it(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """A URI that was written down is good in another process, whatever the folders before the id are called."""
    with tracking(mlflow_server.url, tmp_path / "unused") as mlflow:
        number = mlflow.create_experiment(experiment_name, artifact_location="mlflow-artifacts:/traces/models")
        with mlflow.start_run(experiment_id=number):
            mlflow.log_text("theirs", "a/models/x.txt")
            written_down = mlflow.get_artifact_uri("a/models")
            model = mlflow.initialize_logged_model(name="m").model_id
            (tmp_path / "weights").write_text("of theirs")
            mlflow.MlflowClient().log_model_artifact(model, str(tmp_path / "weights"))
            place = mlflow.get_logged_model(model).artifact_location
    with tracking(f"outbox+{mlflow_server.url}", tmp_path / "outbox") as mlflow:
        assert "theirs" == mlflow.artifacts.load_text(f"{written_down}/x.txt")
        assert "of theirs" == mlflow.artifacts.load_text(f"{place}/weights")
    looks = {
        f"mlflow-artifacts:/{'a' * 32}/artifacts": ("run", "a" * 32, ""),
        f"mlflow-artifacts://host:5000/x/models/{'a' * 32}/artifacts/b/c": ("run", "a" * 32, "b/c"),
        "mlflow-artifacts:/models/models/m-1/artifacts/b": ("model", "m-1", "b"),
        "mlflow-artifacts:/traces/tr-1/artifacts": ("uri", "", ""),
        "mlflow-artifacts:/team/traces/tr-1/artifacts": ("uri", "", ""),
        "mlflow-artifacts:/12/traces/tr-1/artifacts": ("uri", "12", ""),
    }
    assert looks == {uri: owner_by_look(uri) for uri in looks}


def test_at_the_cap_the_outbox_copies_nothing(tmp_path: Path) -> None:
    """Files, and arguments that are kept as a file; each refusal is counted."""
    with tracking(NOWHERE, tmp_path / "outbox", worker="none", outbox_bytes=300_000, free_bytes=0) as mlflow:
        client = mlflow.MlflowClient()
        run = client.create_run(client.create_experiment("e"))
        outbox = store(NOWHERE).outbox
        for number in range(6):
            client.log_text(run.info.run_id, str(number) * 100_000, f"{number}.txt")
        assert 3 == outbox.counters["refused_full"]
        assert 3 == len(list(outbox.directory.runs.glob("*/files/*")))


@pytest.mark.parametrize("strict", [False, True])
def test_a_checkpoint_for_which_the_disk_has_no_room_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, *, strict: bool
) -> None:
    """It is refused like all else for which there is no room: counted, said, and raised only if that is asked for."""
    from mlflow.exceptions import MlflowException

    (tmp_path / "large.ckpt").write_bytes(bytes(1000))
    with tracking(NOWHERE, tmp_path / "outbox", worker="none", exit_timeout=0, strict=strict) as mlflow:
        mlflow.set_experiment("e")
        with mlflow.start_run() as run:
            outbox = store(NOWHERE).outbox
            free = outbox.settings.free_bytes + 999
            with monkeypatch.context() as patch:
                patch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=free, f_frsize=1, f_blocks=1))
                with pytest.raises(MlflowException, match="free_bytes keeps") if strict else contextlib.nullcontext():
                    mlflow.log_artifact(str(tmp_path / "large.ckpt"))
                mlflow.log_metric("loss", 0.5)
            refused = 0 if strict else 1
            assert (refused, 0) == (outbox.counters["refused_no_room_for_file"], outbox.counters["refused_full"])
            assert refused == caplog.text.count("the setting free_bytes keeps")
            mlflow.log_text("there is some now", "a.txt")
            assert ["a.txt"] == [info.path for info in mlflow.MlflowClient().list_artifacts(run.info.run_id)]


def test_at_the_cap_a_run_begins_that_takes_nothing(tmp_path: Path) -> None:
    """With the server away its beginning can be kept nowhere; each call is refused and counted, and none raises."""
    with tracking(
        NOWHERE, tmp_path / "outbox", worker="none", outbox_bytes=300_000, free_bytes=0, exit_timeout=0
    ) as mlflow:
        mlflow.set_experiment("e")
        outbox = store(NOWHERE).outbox
        with mlflow.start_run():
            for number in range(4):
                mlflow.log_text(str(number) * 100_000, f"{number}.txt")
            outbox.guard.look()
            assert outbox.guard.reason()
            before = outbox.counters["refused_full"]
            with mlflow.start_run(run_name="child", nested=True, tags={"a": "b"}) as child:
                mlflow.log_metric("m", 1.0)
                mlflow.log_text("text", "text.txt")
            found = mlflow.get_run(child.info.run_id)
            assert ("child", "b") == (found.info.run_name, found.data.tags["a"])
            assert child.info.experiment_id == found.info.experiment_id
            assert before + 4 == outbox.counters["refused_full"]  # its beginning, a point, a file, its end


def test_at_the_cap_an_experiment_and_a_model_begin_and_are_written_when_there_is_room(
    sqlite_uri: str, experiment_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the server away too. No call raises; what was refused is lost, and what comes later has its beginning."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with tracking(
        NOWHERE, tmp_path / "outbox", worker="none", outbox_bytes=300_000, free_bytes=0, exit_timeout=0
    ) as mlflow:
        mlflow.set_experiment("e")
        api, outbox = mlflow.MlflowClient(), store(NOWHERE).outbox
        with mlflow.start_run():
            for number in range(4):
                mlflow.log_text(str(number) * 100_000, f"{number}.txt")
            outbox.guard.look()
            assert outbox.guard.reason()
            with mlflow.start_run(nested=True):
                mlflow.log_table({"n": [1]}, "table.json")
            made = mlflow.set_experiment(experiment_name)
            assert made.experiment_id == api.get_experiment_by_name(experiment_name).experiment_id
            model = api.create_logged_model(made.experiment_id, name="net", params={"depth": "3"}).model_id
            assert ("net", []) == (api.get_logged_model(model).name, api.list_logged_model_artifacts(model))
            assert "net" == api.finalize_logged_model(model, "READY").name
            room = f"experiment-{made.experiment_id}"
            assert 2 == len(store(NOWHERE).journals.unwritten(room))
            monkeypatch.setattr(outbox.guard, "_settings", dataclasses.replace(outbox.settings, outbox_bytes=10**9))
            outbox.guard.look()
            assert outbox.guard.reason() is None
            api.set_experiment_tag(made.experiment_id, "key", "value")
            api.set_logged_model_tags(model, {"key": "value"})
            assert 0 == len(store(NOWHERE).journals.unwritten(room))
    assert 0 == command("replay", the_outbox(tmp_path / "outbox"), "--to", sqlite_uri, "--timeout", 60)
    with client(sqlite_uri) as api:
        found = api.get_experiment_by_name(experiment_name)
        assert "value" == found.tags["key"]
        (held,) = api.search_logged_models([found.experiment_id])
    assert ("net", "3", "value") == (held.name, held.params["depth"], held.tags["key"])
