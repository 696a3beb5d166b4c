"""A program may fork while the worker thread imports what is left of mlflow, and its child may import what it likes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_PROGRAM = """
import os, sys, threading
import mlflow  # so that the worker's MLflow lives in this process too
from mlflow_outbox import MLflowTracker
tracker = MLflowTracker("e", "http://127.0.0.1:9", outbox_dir=sys.argv[1])
tracker.start_run("x").log_metric("loss", 1.0)
never = threading.Event()
while "mlflow_outbox_worker.mlflow_sink" not in sys.modules:
    never.wait(0.0001)  # the worker thread has just begun to import its stores
child = os.fork()
if child == 0:
    import mlflow.store.tracking.sqlalchemy_store
    os._exit(0 if mlflow.store.tracking.sqlalchemy_store.SqlAlchemyStore else 1)
_, status = os.waitpid(child, 0)
os._exit(os.waitstatus_to_exitcode(status))
"""


def test_a_fork_in_the_middle_of_the_import_leaves_no_locked_module(tmp_path: Path) -> None:
    """The child imports a store, which its parent's worker thread was importing at the fork, and ends."""
    command = [sys.executable, "-W", "ignore:.*fork:DeprecationWarning", "-c", _PROGRAM, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, timeout=120, check=False)
    assert 0 == done.returncode, done.stderr
