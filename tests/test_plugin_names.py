"""Names of files: what MLflow takes without an outbox is taken with one, and arrives under the same name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from mlflow_outbox.testing.proxy import FaultProxy
from plugin_world import NOWHERE, deliver, tracking
from servers import MlflowServer

NAMES = [
    *(
        "👩\u200d💻.txt",
        "\u0645\u06cc\u200c\u062e.txt",
        "soft\u00adhy.txt",
        "a:b.txt",
        "c:",
        "ends.",
        "v1./x.txt",
        "ends ",
        "...",
    ),
    *("del\x7fx.txt", "back\\slash.txt", "100%.txt", "a&b;c.txt", "\u202ex.txt"),
    "/".join(["d" * 200] * 6),
]
#: What an SQL store's directory takes, and MLflow's server does not, or cuts off, or cannot list.
MORE = ["tab\tx.txt", "q?x=1.txt", "a#b.txt", "a%23b.txt", "new\nline.txt", "d/ /x"]


def log_all(mlflow: Any, names: list[str], folder: Path) -> str:
    """Log a file of each name, and a directory with one of each; return the run's id."""
    folder.mkdir()
    with mlflow.start_run() as run:
        for name in names:
            mlflow.log_text(name[:100], name)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(name[:100])
        mlflow.log_artifacts(str(folder), "all")
    return str(run.info.run_id)


def listed(mlflow: Any, run: str) -> list[str]:
    """Return the paths of a run's files."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    repository = get_artifact_repository(mlflow.get_run(run).info.artifact_uri, tracking_uri=mlflow.get_tracking_uri())

    def below(path: str | None) -> list[str]:
        return [
            name
            for info in repository.list_artifacts(path)
            for name in (below(info.path) if info.is_dir else [info.path])
        ]

    return sorted(below(None))


@pytest.mark.parametrize("mode", ["up", "away from the start", "away from halfway"])
def test_a_server_gets_files_under_the_names_that_it_takes(
    mode: str, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Joined emoji, other scripts' joiners, colons, dots and spaces at the end, paths of more than 1000 characters."""
    with FaultProxy(mlflow_server.url) as proxy:
        uri = f"outbox+{proxy.url}"
        with tracking(uri, tmp_path / "outbox") as mlflow:
            if "start" in mode:
                proxy.down()
            mlflow.set_experiment(experiment_name)
            if "halfway" in mode:
                deliver(uri)
                proxy.down()
            log_all(mlflow, NAMES, tmp_path / "files")
            proxy.up()
            deliver(uri)
    with tracking(mlflow_server.url, tmp_path / "unused") as mlflow:
        (run,) = mlflow.search_runs(experiment_names=[experiment_name])["run_id"]
        mlflow.set_experiment(experiment_name)
        expected = listed(mlflow, log_all(mlflow, NAMES, tmp_path / "plain"))  # the server writes some in its own way
        assert {NAMES[0], "a:b.txt", "all/ends."} <= set(expected)
        assert expected == listed(mlflow, run)
        assert "ends " == mlflow.artifacts.load_text(f"runs:/{run}/all/ends ")


@pytest.mark.parametrize("prefix", ["", "outbox+"])
def test_a_directory_gets_files_under_all_names_that_it_takes(prefix: str, sqlite_uri: str, tmp_path: Path) -> None:
    """Those too that MLflow's server would refuse."""
    uri = f"{prefix}{sqlite_uri}"
    with tracking(uri, tmp_path / "outbox") as mlflow:
        run = log_all(mlflow, [*NAMES, *MORE], tmp_path / "files")
        deliver(uri)
        expected = sorted([*NAMES, *MORE, *(f"all/{name}" for name in [*NAMES, *MORE])])
        assert expected == listed(mlflow, run)


@pytest.mark.parametrize("name", ["a#b.txt", "new\nline.txt", "../x", "a%2e%2e/../../x"])
def test_what_the_server_refuses_is_refused_at_the_call_and_holds_back_nothing_else(name: str, tmp_path: Path) -> None:
    """The other files of a directory are kept, whatever their order; the error names the first one."""
    from mlflow.exceptions import MlflowException

    with tracking(NOWHERE, tmp_path / "outbox", exit_timeout=0) as mlflow, mlflow.start_run() as run:
        with pytest.raises(MlflowException):
            mlflow.log_text("x", name)
        if "/" not in name:
            (tmp_path / "files").mkdir()
            for one in ("a.txt", name, "z.txt"):
                (tmp_path / "files" / one).write_text(one)
            with pytest.raises(MlflowException, match="does not take"):
                mlflow.log_artifacts(str(tmp_path / "files"))
            assert ["a.txt", "z.txt"] == listed(mlflow, run.info.run_id)


def test_an_outbox_in_a_directory_that_is_logged_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the program's own is in its current directory: its journals, and copies of files, are no artifacts."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "a.txt").write_text("a")
    monkeypatch.chdir(tmp_path / "here")
    with tracking(NOWHERE, tmp_path / "here" / ".mlflow-outbox", exit_timeout=0) as mlflow, mlflow.start_run() as run:
        for _ in range(2):
            mlflow.log_artifacts(".")
        assert ["a.txt"] == listed(mlflow, run.info.run_id)


@pytest.mark.parametrize("prefix", ["", "outbox+"])
def test_a_file_that_cannot_be_read_is_told_as_the_system_tells_it(
    prefix: str, mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    """As MLflow does without an outbox: programs catch FileNotFoundError."""
    (tmp_path / "loop").symlink_to("loop")
    with tracking(f"{prefix}{mlflow_server.url}", tmp_path / "outbox") as mlflow, mlflow.start_run():
        for path, kind in (("missing", FileNotFoundError), ("loop", OSError)):
            with pytest.raises(kind) as caught:
                mlflow.log_artifact(str(tmp_path / path))
            assert os.fspath(tmp_path / path) == caught.value.filename


@pytest.mark.parametrize("kind", ["http", "sqlite"])
@pytest.mark.parametrize("path", ["../x", "a/../../x", "/x"])
def test_a_folder_outside_of_a_runs_files_is_not_listed(
    path: str, kind: str, mlflow_server: MlflowServer, sqlite_uri: str, tmp_path: Path
) -> None:
    """With and without an outbox, and offline."""
    from mlflow.exceptions import MlflowException
    from requests import HTTPError

    plain = {"http": mlflow_server.url, "sqlite": sqlite_uri}[kind]
    for uri, options in ((plain, {}), (f"outbox+{plain}", {}), (f"outbox+{plain}", {"create_timeout": 0})):
        with tracking(uri, tmp_path / "outbox", **options) as mlflow, mlflow.start_run() as run:
            mlflow.log_text("x", "a/x.txt")
            refusals = (MlflowException, HTTPError) if uri == plain else MlflowException
            with pytest.raises(refusals, match=r"Invalid|400"):
                mlflow.MlflowClient().list_artifacts(run.info.run_id, path)
            assert ["a/x.txt"] == [info.path for info in mlflow.MlflowClient().list_artifacts(run.info.run_id, "a/")]
