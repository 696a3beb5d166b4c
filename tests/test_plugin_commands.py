"""MLflow's own command line, with an outbox for its tracking URI: each command is a program that begins and ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from mlflow_outbox.testing.proxy import FaultProxy
from plugin_world import deliver, environment_with_plugin, picture, tracking
from servers import MlflowServer

PROJECT = """
name: demo
entry_points:
  main:
    parameters:
      alpha: {type: float, default: 0.1}
    command: "python train.py {alpha}"
"""
TRAIN = """
import sys
import mlflow

with mlflow.start_run():
    mlflow.log_metric("loss", float(sys.argv[1]))
    mlflow.log_param("depth", 3)
    mlflow.log_text("hello", "notes/out.txt")
"""


class Terminal(NamedTuple):
    """Where commands are given."""

    folder: Path
    environment: dict[str, str]

    def mlflow(self, *arguments: str) -> str:
        """Run one of MLflow's commands; return what it printed."""
        done = subprocess.run(
            [sys.executable, "-m", "mlflow", *arguments],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert 0 == done.returncode, done.stderr
        return done.stdout


def terminal(uri: str, folder: Path) -> Terminal:
    """Return a terminal whose programs have a tracking URI."""
    folder.mkdir()
    environment = environment_with_plugin(folder)
    environment |= {"MLFLOW_TRACKING_URI": uri, "MLFLOW_OUTBOX_DIR": str(folder.parent / "outbox")}
    environment["MLFLOW_OUTBOX_EXIT_TIMEOUT"] = "1"  # while the server is away, each of the programs waits so long
    # A project's command is "python", which is to be this one.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    return Terminal(folder, environment)


def run_project(at: Terminal, experiment: str) -> None:
    """Run a project whose training logs, in the experiment of a name."""
    project = at.folder.parent / "project"
    project.mkdir(exist_ok=True)
    (project / "MLproject").write_text(PROJECT)
    (project / "train.py").write_text(TRAIN)
    at.mlflow("run", str(project), "--env-manager", "local", "-P", "alpha=0.5", "--experiment-name", experiment)


def test_a_project_that_is_run_while_the_server_is_away_arrives_as_it_does_without_an_outbox(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Three programs log to one run: the command, the training that it starts, and what delivers at last."""
    plain, ours = f"plain-{experiment_name}", f"outbox-{experiment_name}"
    run_project(terminal(mlflow_server.url, tmp_path / "plain"), plain)
    with FaultProxy(mlflow_server.url) as proxy:
        uri = f"outbox+{proxy.url}"
        proxy.down()
        run_project(terminal(uri, tmp_path / "away"), ours)
        proxy.up()
        with tracking(uri, tmp_path / "outbox"):
            deliver(uri)
    expected, found = picture(mlflow_server.url, plain), picture(mlflow_server.url, ours)
    for one in (expected, found):
        for run in one["runs"]:
            assert run.pop("name"), "MLflow thinks of one, another each time"
            del run["tags"]["mlflow.runName"]
    assert expected == found
    (run,) = found["runs"]
    assert ("FINISHED", {"loss": [[0, "0.5"]]}, {"alpha": "0.5", "depth": "3"}) == (
        run["status"],
        run["metrics"],
        run["params"],
    )
    assert [["notes/out.txt", 5]] == run["files"]


def test_commands_about_runs_and_their_files_take_the_id_that_a_run_began_with(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """It was given while the server was away; each command is another program."""
    with FaultProxy(mlflow_server.url) as proxy:
        uri = f"outbox+{proxy.url}"
        proxy.down()
        with tracking(uri, tmp_path / "outbox") as mlflow:
            mlflow.set_experiment(experiment_name)
            with mlflow.start_run() as run:
                mlflow.log_text("hello", "out.txt")
            proxy.up()
            deliver(uri)
        at = terminal(uri, tmp_path / "terminal")
        (at.folder / "more.txt").write_text("more")
        at.mlflow("artifacts", "log-artifact", "-l", "more.txt", "-r", run.info.run_id)
        listed = at.mlflow("artifacts", "list", "-r", run.info.run_id)
        assert '"out.txt"' in listed
        assert '"more.txt"' in listed
        at.mlflow("runs", "delete", "--run-id", run.info.run_id)
        with tracking(uri, tmp_path / "outbox") as mlflow:
            deliver(uri)
            assert "deleted" == mlflow.get_run(run.info.run_id).info.lifecycle_stage
