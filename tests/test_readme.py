"""The README says what the code does: its table of settings is the code's, its commands run."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import textwrap
from pathlib import Path

import pytest

from commands import console_script
from contents import numbered, points, runs
from mlflow_outbox.settings import Settings, variable_name
from servers import MlflowServer

README = Path(__file__).parent.parent / "README.md"
TRAINING = """
    from mlflow_outbox import MLflowTracker
    tracker = MLflowTracker("{experiment}", worker="none")
    with tracker.start_run("offline") as run:
        for i in range(200):
            run.log_metric("loss", i / 2, step=i)
        run.log_text("notes", "notes.txt")
"""


def test_every_setting_stands_in_the_table_with_its_variable_and_default() -> None:
    """One row per option, in the order of the class."""
    rows = [
        tuple(cell.strip() for cell in line.strip().strip("|").split("|"))[:3]
        for line in README.read_text(encoding="utf-8").splitlines()
        if line.startswith("| `") and "`MLFLOW_OUTBOX_" in line
    ]
    expected = [
        (f"`{field.name}`", f"`{variable_name(field.name)}`", f"`{field.default!r}`")
        for field in dataclasses.fields(Settings)
    ]
    assert expected == rows


def commands(name: str) -> str:
    """Return the shell commands that stand in the README under a name."""
    text = README.read_text(encoding="utf-8")
    found = re.search(rf"<!-- run: {name} -->\n```sh\n(.*?)```", text, re.DOTALL)
    assert found, f"the README has no commands called {name}"
    return found.group(1)


def shell(script: str, folder: Path, server: str) -> subprocess.CompletedProcess[str]:
    """Run commands of the README: its server and its paths are the test's, its programs this environment's."""
    script = script.replace("http://tracking.example:5000", server).replace("/scratch/", f"{folder}/")
    environment = {**os.environ, "PATH": f"{console_script().parent}:{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


@pytest.fixture
def offline(tmp_path: Path, experiment_name: str) -> Path:
    """A directory with the training program of the README."""
    (tmp_path / "train_offline.py").write_text(textwrap.dedent(TRAINING).format(experiment=experiment_name))
    return tmp_path


def test_cluster_without_internet_and_moving(offline: Path, mlflow_server: MlflowServer, experiment_name: str) -> None:
    """The commands of both sections, one after the other, bring every point to the server once."""
    done = shell(commands("cluster"), offline, mlflow_server.url)
    assert 0 == done.returncode, done.stdout + done.stderr
    held = runs(mlflow_server.url, experiment_name)
    assert ["offline"] == [run.info.run_name for run in held]
    assert numbered(200) == points(mlflow_server.url, held[0].info.run_id, "loss")

    moving = commands("moving").replace("imported", f"{experiment_name}-imported")
    done = shell(moving, offline, mlflow_server.url)
    assert 0 == done.returncode, done.stdout + done.stderr
    copies = runs(mlflow_server.url, f"{experiment_name}-imported")
    assert ["offline"] == [run.info.run_name for run in copies]
    assert numbered(200) == points(mlflow_server.url, copies[0].info.run_id, "loss")
    assert 1 == len(runs(mlflow_server.url, experiment_name)), "the import found the run that was there"


def test_before_a_machine_shuts_down(offline: Path, mlflow_server: MlflowServer, experiment_name: str) -> None:
    """The shutdown line delivers what an earlier program has left."""
    training = f"MLFLOW_OUTBOX_DIR={offline}/outbox MLFLOW_TRACKING_URI={mlflow_server.url} python train_offline.py"
    done = shell(f"{training}\n{commands('shutdown')}", offline, mlflow_server.url)
    assert 0 == done.returncode, done.stdout + done.stderr
    assert "left on disk" not in done.stdout
    held = runs(mlflow_server.url, experiment_name)
    assert numbered(200) == points(mlflow_server.url, held[0].info.run_id, "loss")
