"""A new SQLite database is there as a whole or not at all, whatever ends the process that makes it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from contents import QUICK, the_run
from mlflow_outbox import MLflowTracker
from mlflow_outbox_worker.mlflow_sink.stores import open_store

_KILLED = """
import os, sys
import sqlalchemy.event
from mlflow_outbox_worker.mlflow_sink.stores import open_store

steps = 0

def step(*_):
    global steps
    steps += 1
    if steps == int(sys.argv[2]):
        os._exit(9)

sqlalchemy.event.listen(sqlalchemy.engine.Engine, "after_cursor_execute", step)
open_store(sys.argv[1], artifact_root=None, timeout=10, username=None, password=None)
"""


@pytest.mark.compatibility
@pytest.mark.parametrize("steps", [1, 40, 160])
def test_what_is_killed_while_it_makes_a_database_leaves_none_that_is_half_made(
    steps: int, experiment_name: str, tmp_path: Path
) -> None:
    """MLflow does not go on with its tables from the middle: nothing could ever be delivered into such a database."""
    folder = tmp_path / "store"
    folder.mkdir()
    uri = f"sqlite:///{folder}/new.db"
    killed = subprocess.run([sys.executable, "-c", _KILLED, uri, str(steps)], timeout=250, check=False)
    assert 9 == killed.returncode
    with MLflowTracker(experiment_name, uri, outbox_dir=tmp_path / "outbox", settings=QUICK) as tracker:
        tracker.start_run("after").log_metric("m", 1.0)
        assert tracker.flush(60)
    assert {"m": 1.0} == the_run(uri, experiment_name).data.metrics
    assert ["new.db"] == [path.name for path in folder.iterdir()]


def test_several_that_make_one_database_all_get_it(tmp_path: Path) -> None:
    """One of them is first; the others throw theirs away."""
    uri = f"sqlite:///{tmp_path}/new.db"
    code = _KILLED.replace("int(sys.argv[2])", "-1")
    others = [subprocess.Popen([sys.executable, "-c", code, uri]) for _ in range(3)]
    try:
        assert [0, 0, 0] == [other.wait(250) for other in others]
    finally:
        for other in others:
            other.kill()
            other.wait()
    opened = open_store(uri, artifact_root=None, timeout=10, username=None, password=None)
    opened.close()
    assert ["new.db"] == [path.name for path in tmp_path.iterdir()]


@pytest.mark.compatibility
@pytest.mark.parametrize("folder", ["lr=0.1, depth=3", "100% (\N{LATIN SMALL LETTER U WITH DIAERESIS}ber) #1"])
def test_a_database_in_a_directory_of_any_name_is_made_there_and_nowhere_else(
    folder: str, experiment_name: str, tmp_path: Path
) -> None:
    """A URI has another spelling of it, which SQLAlchemy 2.0 does not read, and by which MLflow makes a directory."""
    uri = f"sqlite:///{tmp_path}/store/{folder}/mlflow.db"
    with MLflowTracker(experiment_name, uri, outbox_dir=tmp_path / "outbox", settings=QUICK) as tracker:
        tracker.start_run("there").log_metric("m", 1.0)
        assert tracker.flush(60)
        assert [{"m": 1.0}] == [run["metrics"] for run in tracker.get_all_runs()]
    assert {"m": 1.0} == the_run(uri, experiment_name).data.metrics
    assert [folder] == [path.name for path in (tmp_path / "store").iterdir()]
