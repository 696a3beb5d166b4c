"""An experiment is renamed in MLflow while one worker goes on: which runs go there, and which do not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from contents import QUICK, client, runs
from mlflow_outbox import MLflowTracker
from mlflow_outbox.spool.directory import OutboxDirectory
from servers import eventually
from workers import delivering

PROGRAM = """
import sys
from mlflow_outbox import MLflowTracker

experiment, uri, root = sys.argv[1:]
with MLflowTracker(experiment, uri, outbox_dir=root, worker="none") as tracker:
    tracker.start_run("third").end()
"""


def test_an_experiment_that_was_renamed_gets_no_run_of_a_program_that_begins_afterwards(
    sqlite_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """It gets a new one of the name, as without an outbox; a program that had the old one before goes on in that."""
    root, old = tmp_path / "outbox", f"{experiment_name}-old"

    def names(experiment: str) -> set[str]:
        return {run.info.run_name for run in runs(sqlite_uri, experiment)}

    tracker = MLflowTracker(experiment_name, sqlite_uri, outbox_dir=root, worker="none", settings=QUICK)
    tracker.start_run("first").end()
    assert tracker.outbox_path is not None
    with delivering(OutboxDirectory.open(tracker.outbox_path), sqlite_uri, QUICK):
        eventually(lambda: {"first"} == names(experiment_name), 60)
        with client(sqlite_uri) as mlflow:
            mlflow.rename_experiment(mlflow.get_experiment_by_name(experiment_name).experiment_id, old)
        tracker.start_run("second").end()
        eventually(lambda: {"first", "second"} == names(old), 60)
        subprocess.run([sys.executable, "-c", PROGRAM, experiment_name, sqlite_uri, str(root)], check=True, timeout=200)
        eventually(lambda: {"third"} == names(experiment_name), 60)
    tracker.close(0)
    assert {"first", "second"} == names(old)
