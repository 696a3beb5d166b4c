"""Programs without a current directory or a home, as in jobs and containers, and those whose warnings are errors."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from contents import runs
from mlflow_outbox_worker import surroundings

_GONE = """
import os, shutil, sys
sys.path[:0] = {paths!r}
from mlflow_outbox import MLflowTracker
from mlflow_outbox.errors import DestinationError

def leave():
    os.makedirs({here!r})
    os.chdir({here!r})
    shutil.rmtree({here!r})
"""


def run(tmp_path: Path, text: str) -> subprocess.CompletedProcess[str]:
    """Run a program that can have its current directory deleted; modules are looked for there too, as with ``-c``.

    That itself will not do: of such a program, Python 3.13.0 looks at the current directory for each attribute that a
    module lacks, and fails in a way of its own where that is gone.
    """
    code = _GONE.format(paths=[*sys.path, ""], here=str(tmp_path / "scratch" / "job")) + textwrap.dedent(text)
    program = tmp_path / "program.py"
    program.write_text(code)
    command = [sys.executable, str(program)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)


@pytest.mark.parametrize("worker", ["thread", "process"])
def test_a_program_whose_directory_is_deleted_logs_on_and_is_delivered(
    worker: str, sqlite_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """Also by a worker that starts after that; of files, those that are there are logged."""
    (tmp_path / "there.txt").write_text("there")
    text = f"""
        box, there = {str(tmp_path / "box")!r}, {str(tmp_path / "there.txt")!r}
        tracker = MLflowTracker({experiment_name!r}, {sqlite_uri!r}, outbox_dir=box, worker={worker!r})
        leave()
        run = tracker.start_run("homeless")
        print([run.log_metric("m", 1.0), run.log_artifact(there), run.log_artifact("gone.txt")])
        run.end()
        print(bool(tracker.flush(200)))
    """
    done = run(tmp_path, text)
    assert (0, "[True, True, False]\nTrue\n") == (done.returncode, done.stdout), done.stderr
    assert [("homeless", {"m": 1.0})] == [
        (found.info.run_name, found.data.metrics) for found in runs(sqlite_uri, experiment_name)
    ]


def test_what_depends_on_a_directory_that_is_gone_is_refused_with_a_remedy(tmp_path: Path) -> None:
    """An outbox disables the tracker, as one that cannot be made does; where files of a store would be is an error."""
    text = """
        leave()
        print(MLflowTracker("e", "http://127.0.0.1:9", worker="none").disabled)
        for uri in ("sqlite:////nowhere/mlflow.db", "sqlite:///here.db", "mlruns", None):
            try:
                MLflowTracker("e", uri, outbox_dir="/nowhere", worker="none")
            except DestinationError as error:
                print("change to one that exists" in str(error))
    """
    done = run(tmp_path, text)
    assert (0, "True\n" * 5) == (done.returncode, done.stdout), done.stderr
    assert "'.mlflow-outbox' depends on the current directory, which is gone" in done.stderr
    assert "give a whole path" in done.stderr


@pytest.mark.parametrize("worker", ["thread", "process"])
def test_warnings_that_are_errors_in_a_program_are_none_in_what_delivers_for_it(
    worker: str, sqlite_uri: str, experiment_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's libraries warn when they are imported, and as a database is opened."""
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    text = f"""
        box = {str(tmp_path / "box")!r}
        tracker = MLflowTracker({experiment_name!r}, {sqlite_uri!r}, outbox_dir=box, worker={worker!r})
        tracker.start_run("strict").end()
        print(bool(tracker.flush(200)))
    """
    done = run(tmp_path, text)
    assert (0, "True\n", "") == (done.returncode, done.stdout, done.stderr)


def test_a_process_of_ours_has_a_home_where_its_user_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow cannot be imported without one; an experiment, which does not import it, needs none."""
    before = dict(os.environ)
    surroundings.settle()
    assert before == dict(os.environ)

    def unknown(user: int) -> pwd.struct_passwd:
        raise KeyError(user)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(RuntimeError):
        Path.home()
    surroundings.settle()
    assert Path("/") == Path.home()
