"""A new SQLite database is there as a whole or not at all, and an older one's tables, whatever ends who makes them."""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from mlflow.store.db import utils
from mlflow.utils import file_utils

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


#: What MLflow's tables were before there were any for spans.
_OLDER = "770bee3ae1dd"
_KILLED_AT = _KILLED.replace("def step(*_):", "def step(_connection, _cursor, statement, *_):").replace(
    "if steps == int(sys.argv[2]):", "if statement.lstrip().startswith(sys.argv[2]):"
)


def older_database(file: Path) -> str:
    """Make a database as an older version of MLflow did, with an experiment of the number 7, and return its URI."""
    uri = f"sqlite:///{file}"
    engine = utils.create_sqlalchemy_engine(uri)
    utils.InitialBase.metadata.create_all(engine)
    config = utils._get_alembic_config(uri)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, _OLDER)
    engine.dispose()
    with contextlib.closing(sqlite3.connect(file)) as held, held:
        held.execute("INSERT INTO experiments (experiment_id, name, lifecycle_stage) VALUES (7, 'kept', 'active')")
    return uri


@pytest.mark.parametrize("statement", ["CREATE TABLE spans", "CREATE TABLE _alembic_tmp_"])
def test_what_is_killed_while_it_upgrades_a_database_leaves_one_that_can_be_upgraded(
    statement: str, experiment_name: str, tmp_path: Path
) -> None:
    """Half a step of it could not be gone on with, by MLflow itself neither; the process may end with its program."""
    file = tmp_path / "store" / "older.db"
    file.parent.mkdir()
    uri = older_database(file)
    killed = subprocess.run([sys.executable, "-c", _KILLED_AT, uri, statement], timeout=250, check=False)
    assert 9 == killed.returncode
    with MLflowTracker(experiment_name, uri, outbox_dir=tmp_path / "outbox", settings=QUICK) as tracker:
        tracker.start_run("after").log_metric("m", 1.0)
        assert tracker.flush(60)
    assert {"m": 1.0} == the_run(uri, experiment_name).data.metrics
    with contextlib.closing(sqlite3.connect(file)) as held:
        assert [("kept",)] == held.execute("SELECT name FROM experiments WHERE experiment_id = 7").fetchall()


@pytest.mark.parametrize("is_older", [False, True])
def test_the_lock_of_another_user_s_process_keeps_nobody_from_a_database(
    is_older: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """MLflow's is a file in the temporary directory, named after the URI, which only who came first may open."""

    def refuse(lock: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), lock.path)

    monkeypatch.setattr(file_utils.ExclusiveFileLock, "__enter__", refuse)
    file = tmp_path / "shared.db"
    uri = older_database(file) if is_older else f"sqlite:///{file}"
    opened = open_store(uri, artifact_root=None, timeout=10, username=None, password=None)
    opened.close()
    with contextlib.closing(sqlite3.connect(file)) as held:
        assert [("spans",)] == held.execute("SELECT name FROM sqlite_master WHERE name = 'spans'").fetchall()


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
