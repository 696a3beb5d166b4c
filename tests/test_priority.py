"""Processes of ours stand back behind the experiment on the processors; the experiment's own process does not."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from mlflow_outbox import MLflowTracker
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox_worker.host_lease import worker_of
from mlflow_outbox_worker.sink_process.client import Child
from servers import eventually


def _standing(pid: int) -> tuple[int, int]:
    return os.sched_getscheduler(pid), os.getpriority(os.PRIO_PROCESS, pid)


def test_a_worker_process_stands_back_and_the_experiment_does_not(sqlite_uri: str, tmp_path: Path) -> None:
    """Its class keeps it from taking a processor away when it wakes, its niceness gives it the smaller share."""
    ours = _standing(0)
    with MLflowTracker("priority", sqlite_uri, outbox_dir=tmp_path / "outbox", worker="process") as tracker:
        tracker.start_run().end()
        (path,) = (tmp_path / "outbox").iterdir()
        outbox = OutboxDirectory.open(path)
        eventually(lambda: worker_of(outbox) is not None, 30)
        found = worker_of(outbox)
        assert found is not None
        assert (os.SCHED_BATCH, min(19, ours[1] + 5)) == _standing(found.pid)
        assert ours == _standing(0)


def test_the_process_that_holds_mlflow_stands_back() -> None:
    """It answers a thread of the experiment, which waits for it without holding anything up."""
    ours = _standing(0)
    child = Child([sys.executable, "-m", "mlflow_outbox_worker.sink_process"])
    try:
        assert (os.SCHED_BATCH, min(19, ours[1] + 5)) == _standing(child.pid)
        assert ours == _standing(0)
    finally:
        child.end()
