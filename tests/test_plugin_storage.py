"""Files of runs whose artifacts lie in a storage that MLflow's clients write to themselves, as they do with ``s3:``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from contents import client
from plugin_world import deliver, store, tracking
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
        owner = store(f"outbox+{sqlite_uri}").owner_of(shown.format(run=run.info.run_id))
        assert ("run", run.info.run_id, "a/b") == owner
