"""What is logged at the very end of the interpreter, when daemon threads have been stopped wherever they were."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from contents import QUICK, artifact_text, points, runs
from mlflow_outbox import MLflowTracker

_LOGS = """
import os, sys, threading, types
sys.path[:0] = {paths!r}
from mlflow_outbox import MLflowTracker, Settings

settings = Settings(exit_timeout={exit_timeout})
tracker = MLflowTracker({experiment!r}, {uri!r}, outbox_dir={outbox!r}, worker={worker!r}, settings=settings)
run = tracker.start_run("logs until the end")
logging = threading.Event()

def log(run=run, logging=logging):
    while True:
        run.log_metric("busy", 1.0)
        logging.set()

class Last:
    def __init__(self, tracker, run):
        self.tracker, self.run = tracker, run

    def __del__(self, say=os.write):
        kept = [
            self.run.log_metric("last", 1.0, step=7),
            self.run.log_text("written last", "last.txt"),
            self.tracker.start_run("begun last").log_metric("m", 2.0),
            self.run.end(),
        ]
        say(1, repr([kept, bool(self.tracker.flush(1)), bool(self.tracker.close(1))]).encode())

for _ in range(3):
    threading.Thread(target=log, daemon=True).start()
logging.wait()
# Not of this module, which the threads keep to themselves until the process is gone.
held = sys.modules["held"] = types.ModuleType("held")
held.last = Last(tracker, run)
"""


@pytest.mark.parametrize("worker", ["none", "thread", "process"])
def test_what_a_destructor_logs_waits_for_no_thread_that_the_end_has_stopped(
    worker: str, sqlite_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """Threads that log are stopped in the middle of a call: the program ends all the same, and what it logs is kept."""
    outbox = tmp_path / "outbox"
    code = _LOGS.format(
        paths=sys.path, experiment=experiment_name, uri=sqlite_uri, outbox=str(outbox), worker=worker, exit_timeout=0
    )
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (0, "[[True, True, True, True], False, False]") == (done.returncode, done.stdout), done.stderr
    with MLflowTracker(experiment_name, sqlite_uri, outbox_dir=outbox, settings=QUICK) as tracker:
        tracker.start_run("wakes the worker").end()
        left = tracker.flush(120)
    assert (0, 0, 0) == (left.pending, left.parked, left.dead)
    held = {run.info.run_name: run for run in runs(sqlite_uri, experiment_name)}
    ended = held["logs until the end"].info
    assert [(7, 1.0)] == list(points(sqlite_uri, ended.run_id, "last").elements())
    assert "written last" == artifact_text(sqlite_uri, ended.run_id, "last.txt")
    assert {"m": 2.0} == held["begun last"].data.metrics
