"""Processes of ours stand back behind the experiment on the processors; the experiment's own process does not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import pytest

from mlflow_outbox import MLflowTracker
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox_worker import thread
from mlflow_outbox_worker.host_lease import worker_of
from servers import eventually


def _standing(pid: int) -> tuple[int, int]:
    return os.sched_getscheduler(pid), os.getpriority(os.PRIO_PROCESS, pid)


@pytest.mark.parametrize("worker", ["process", "thread"])
def test_a_process_that_delivers_stands_back_and_the_experiment_does_not(
    worker: Literal["process", "thread"], sqlite_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its class keeps it from taking a processor away when it wakes, its niceness gives it the smaller share."""
    monkeypatch.setattr(thread, "is_mlflow_imported", lambda: False)  # as in a program that has not
    ours = _standing(0)
    with MLflowTracker("priority", sqlite_uri, outbox_dir=tmp_path / "outbox", worker=worker) as tracker:
        tracker.start_run().end()
        (path,) = (tmp_path / "outbox").iterdir()
        outbox = OutboxDirectory.open(path)

        def deliverer() -> int:
            found = worker_of(outbox)
            return found.pid if found is not None and found.pid != os.getpid() else 0

        assert (os.SCHED_BATCH, min(19, ours[1] + 5)) == _standing(eventually(deliverer, 120))
        assert ours == _standing(0)
