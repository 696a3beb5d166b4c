"""Files that change after they were logged: what is uploaded is what they held when the call returned."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from contents import QUICK, artifact_text, the_run
from faults.table import Row
from mlflow_outbox import MLflowTracker


def _symlinked(path: Path) -> None:
    secret = path.with_name("secret")
    secret.write_text("somebody else's")
    path.unlink()
    path.symlink_to(secret)


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


CHANGES: dict[str, Callable[[Path], object]] = {
    "written over": lambda path: path.write_text("another content"),
    "cut": lambda path: os.truncate(path, 0),
    "deleted": Path.unlink,
    "a link": _symlinked,
    "a FIFO": _fifo,
}


@pytest.mark.fault("F68", "an artifact's source written over, cut, deleted, made a link or a FIFO before the upload")
def test_an_artifact_is_what_its_source_held_when_it_was_logged(
    sqlite_uri: str, experiment_name: str, row: Row, tmp_path: Path
) -> None:
    """Logged again as it is now, a FIFO is refused and counted, and nobody waits for it."""
    for number in range(row.pick(1, 10, 40)):
        experiment, outbox = f"{experiment_name}-{number}", tmp_path / f"outbox{number}"
        offline = MLflowTracker(experiment, sqlite_uri, outbox_dir=outbox, worker="none", settings=QUICK)
        with offline.start_run("sources") as run:
            for kind, change in CHANGES.items():
                source = tmp_path / f"{kind} {number}.txt"
                source.write_text(f"content, later {kind}")
                assert run.log_artifact(source)
                change(source)
                row.done()
            before, started = sum(offline.counters.values()), time.monotonic()
            assert not run.log_artifact(tmp_path / f"a FIFO {number}.txt")
            assert time.monotonic() - started < 30.0, "whoever opens one waits until somebody writes to it"
            assert before < sum(offline.counters.values())
        with MLflowTracker(experiment, sqlite_uri, outbox_dir=outbox, settings=QUICK) as tracker:
            left = tracker.flush(60)
        assert (0, 0, 0) == (left.pending, left.parked, left.dead)
        remote = the_run(sqlite_uri, experiment).info.run_id
        for kind in CHANGES:
            assert f"content, later {kind}" == artifact_text(sqlite_uri, remote, f"{kind} {number}.txt")
