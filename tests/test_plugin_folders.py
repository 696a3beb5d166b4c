"""All files of a run or model, by their URI: MLflow asks for them in the folder that they are in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from plugin_world import WAYS, world
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
