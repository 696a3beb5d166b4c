"""The README says what the code does: its table of settings is the code's, its commands run."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import textwrap
from pathlib import Path
from typing import get_args

import pytest

from commands import console_script
from contents import numbered, points, runs
from mlflow_outbox.settings import Settings, SyncLevel, VerifyLevel, WorkerKind, variable_name
from mlflow_outbox_worker.cli.exits import ExitCode
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


def test_every_word_that_a_setting_takes_is_said() -> None:
    """A value that is none ends a program at its start, so nobody should have to guess."""
    text = README.read_text(encoding="utf-8")
    words = [word for kind in (SyncLevel, VerifyLevel, WorkerKind) for word in get_args(kind)]
    assert [] == [word for word in words if f'"{word}"' not in text]


def test_every_exit_code_is_explained() -> None:
    """In the README as in --help."""
    (text,) = re.findall(r"Exit codes are stable: (.*?)\.\n", README.read_text(encoding="utf-8"), re.DOTALL)
    assert [str(int(code)) for code in ExitCode] == re.findall(r"(?:^|, )(\d+) ", text.replace("\n", " "))


def commands(name: str) -> str:
    """Return the shell commands that stand in the README under a name."""
    text = README.read_text(encoding="utf-8")
    found = re.search(rf"<!-- run: {name} -->\n```sh\n(.*?)```", text, re.DOTALL)
    assert found, f"the README has no commands called {name}"
    return found.group(1)


def located(script: str, folder: Path, server: str) -> str:
    """Return commands of the README with the test's server and paths."""
    return script.replace("http://tracking.example:5000", server).replace("/scratch/", f"{folder}/")


def surroundings() -> dict[str, str]:
    """Return the environment in which the programs are those of the tests."""
    return {**os.environ, "PATH": f"{console_script().parent}:{os.environ['PATH']}"}


def shell(script: str, folder: Path, server: str, program: str = "bash") -> subprocess.CompletedProcess[str]:
    """Run commands of the README: its server and its paths are the test's, its programs this environment's."""
    return subprocess.run(
        [program, "-eu", "-c", located(script, folder, server)],
        cwd=folder,
        env=surroundings(),
        capture_output=True,
        text=True,
        timeout=280,
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
    """Batch script, hook and unit, one after the other on one outbox, in a plain shell; what was logged arrives."""
    done = shell(commands("slurm"), offline, mlflow_server.url, "sh")
    assert 0 == done.returncode, done.stdout + done.stderr
    assert "left on disk" not in done.stdout
    assert "203 events delivered" in done.stdout
    held = runs(mlflow_server.url, experiment_name)
    assert numbered(200) == points(mlflow_server.url, held[0].info.run_id, "loss")

    text = README.read_text(encoding="utf-8")
    [stop] = re.findall(r"^ExecStop=(.*)$", text, re.MULTILINE)
    [hook] = re.findall(r'command: \["/bin/sh", "-c", "(.*)"\]', text)
    for line in (commands("shutdown"), stop, hook):
        done = shell(line, offline, mlflow_server.url, "sh")
        assert (0, "") == (done.returncode, done.stderr), line
        assert "nothing waits" in done.stdout


def test_a_batch_job_whose_time_is_over_flushes(offline: Path, mlflow_server: MlflowServer) -> None:
    """TERM to the batch script reaches the training, which ends; then what it has logged is delivered."""
    program = offline / "train_offline.py"
    program.write_text(f"{program.read_text()}\nimport signal\nprint('logged', flush=True)\nsignal.pause()\n")
    script = located(commands("slurm"), offline, mlflow_server.url)
    job = subprocess.Popen(["sh", "-c", script], cwd=offline, env=surroundings(), stdout=subprocess.PIPE, text=True)
    assert job.stdout is not None
    assert "logged\n" == job.stdout.readline()
    job.send_signal(signal.SIGTERM)
    out, _ = job.communicate(timeout=250)
    assert 0 == job.returncode
    assert "the training ended with 143" in out
    assert "203 events delivered" in out
