"""All files of a run or model, by their URI: MLflow asks for them in the folder that they are in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from contents import client
from plugin_world import WAYS, deliver, tracking, world
from servers import MlflowServer


def files_below(directory: str) -> list[str]:
    """Return the paths of all files below a directory."""
    return sorted(str(path.relative_to(directory)) for path in Path(directory).rglob("*") if path.is_file())


@pytest.mark.parametrize("way", WAYS)
def test_all_files_of_a_run_are_downloaded_by_their_uri(
    way: str, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """As the program knows it, with what has not arrived; a model's too."""
    with world(way, mlflow_server, tmp_path / "outbox") as here:
        mlflow = here.mlflow
        mlflow.set_experiment(experiment_name)
        with mlflow.start_run() as run:
            mlflow.log_text("a", "a.txt")
            model = mlflow.initialize_logged_model(name="m", source_run_id=run.info.run_id)
            here.kill()
            mlflow.log_text("b", "deep/b.txt")
            (tmp_path / "c.txt").write_text("c")
            mlflow.MlflowClient().log_model_artifact(model.model_id, str(tmp_path / "c.txt"))
        for uri, expected in ((run.info.artifact_uri, ["a.txt", "deep/b.txt"]), (model.artifact_location, ["c.txt"])):
            found = mlflow.artifacts.download_artifacts(artifact_uri=uri)
            assert expected == files_below(found)
            (tmp_path / "copies").mkdir(exist_ok=True)
            copied = mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(tmp_path / "copies"))
            assert str(tmp_path / "copies" / "artifacts") == os.path.normpath(copied)


def test_a_folder_below_a_file_has_nothing_in_it(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """While the file is on its way too."""
    with world("killed", mlflow_server, tmp_path) as here:
        here.mlflow.set_experiment(experiment_name)
        with here.mlflow.start_run() as run:
            here.kill()
            here.mlflow.log_text("a", "a.txt")
            assert [] == here.mlflow.MlflowClient().list_artifacts(run.info.run_id, "a.txt/x")


@pytest.mark.parametrize("deleted", ["before", "by this process"])
@pytest.mark.parametrize("prefix", ["", "outbox+"])
def test_a_version_in_the_registry_has_the_files_of_a_model_that_was_deleted(
    prefix: str, deleted: str, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """They are there until ``mlflow gc``, and the version says where; the model itself is not found any more."""
    from mlflow.exceptions import MlflowException

    files = {"x.txt": "x", "data/y.txt": "y"}
    for name, text in files.items():
        place = tmp_path / "model" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    with client(mlflow_server.url) as api:
        number = api.create_experiment(experiment_name)
        model = api.create_logged_model(number, name="m").model_id
        api.log_model_artifacts(model, str(tmp_path / "model"))
        api.create_registered_model(experiment_name)
        api.create_model_version(experiment_name, f"models:/{model}", model_id=model)
        if deleted == "before":
            api.delete_logged_model(model)
    uri = f"{prefix}{mlflow_server.url}"
    with tracking(uri, tmp_path / "outbox") as mlflow:
        if deleted != "before":
            mlflow.MlflowClient().delete_logged_model(model)
            deliver(uri)
        found = Path(mlflow.artifacts.download_artifacts(f"models:/{experiment_name}/1"))
        assert files == {name: (found / name).read_text() for name in files}
        with pytest.raises(MlflowException, match="not found") as raised:
            mlflow.artifacts.download_artifacts(f"models:/{model}")
        assert "RESOURCE_DOES_NOT_EXIST" == raised.value.error_code
