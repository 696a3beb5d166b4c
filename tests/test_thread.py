"""The worker thread: what the call that starts it pays, and how it begins and ends."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from contents import QUICK, the_run
from mlflow_outbox import MLflowTracker
from mlflow_outbox.counters import Counters
from mlflow_outbox_worker import thread
from mlflow_outbox_worker.delivery import Delivery
from mlflow_outbox_worker.thread import ThreadWorker
from servers import eventually


def said_by(program: str, folder: Path) -> list[str]:
    """Run a program in a process of its own, with a folder as its argument; return the lines that it prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(folder)],
        capture_output=True,
        check=False,
        timeout=120,
        text=True,
    )
    assert 0 == done.returncode, done.stderr
    return done.stdout.splitlines()


_BEGIN = """
    import os, sys, threading, types, mlflow_outbox
    tracker = mlflow_outbox.MLflowTracker("e", "http://127.0.0.1:9", outbox_dir=sys.argv[1], worker="thread")
"""


def test_the_first_call_leaves_the_imports_of_the_loop_to_the_thread(tmp_path: Path) -> None:
    """Where mlflow is imported already, the loop runs here: the thread imports a hundred modules, the call none."""
    program = f"""{_BEGIN}
    sys.modules["mlflow"] = types.ModuleType("mlflow")
    importers, found = set(), threading.Event()

    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name in {{"diskcache", "tenacity", "sqlite3", "mlflow_outbox_worker.delivery"}}:
                importers.add(threading.current_thread().name)
                found.set()

    sys.meta_path.insert(0, Finder())
    tracker.start_run("r").log_metric("loss", 1.0)
    assert found.wait(60)
    print(sorted(importers), flush=True)
    os._exit(0)
    """
    assert ["['mlflow-outbox-worker']"] == said_by(program, tmp_path)


def test_a_fork_right_after_the_first_call_waits_until_the_loop_is_imported(tmp_path: Path) -> None:
    """A child that inherited a half imported module would wait for ever in its own first import."""
    program = f"""{_BEGIN}
    sys.modules["mlflow"] = types.ModuleType("mlflow")
    tracker.start_run("r").log_metric("loss", 1.0)
    child = os.fork()
    if child == 0:
        import mlflow_outbox_worker.delivery
        os._exit(7)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    os._exit(0)
    """
    assert ["7"] == said_by(program, tmp_path)


def test_a_loop_that_cannot_be_made_is_counted_and_said(caplog: pytest.LogCaptureFixture) -> None:
    """A broken installation, for instance: the thread ends, events stay on disk, the caretaker starts another."""

    def make() -> Delivery:
        msg = "no module named diskcache"
        raise ImportError(msg)

    counters = Counters()
    worker = ThreadWorker(make, counters)
    worker.start()
    eventually(lambda: not worker.is_alive())
    assert 1 == counters["worker_not_started"]
    assert "no module named diskcache" in caplog.text
    worker.wake()
    worker.stop(1.0)


def test_what_cannot_be_imported_beforehand_is_said_with_what_becomes_of_the_events(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tracker is made all the same, and the worker that comes with the first event tries again."""

    def broken(_name: str) -> None:
        msg = "no module named diskcache"
        raise ImportError(msg)

    outbox: Any = SimpleNamespace(counters=Counters())
    monkeypatch.setattr(thread, "is_mlflow_imported", lambda: True)
    monkeypatch.setattr(thread, "importlib", SimpleNamespace(import_module=broken))
    thread.prepare(outbox)
    assert 1 == outbox.counters["worker_not_prepared"]
    assert "no module named diskcache" in caplog.text
    assert "events stay on disk" in caplog.text


def test_a_loop_that_is_stopped_before_it_is_made_never_runs() -> None:
    """The end of a short program comes while the thread still imports."""
    may_go = threading.Event()
    ran: list[str] = []

    class Loop:
        def run(self) -> None:
            ran.append("run")

    def make() -> Delivery:
        may_go.wait(60)
        return cast("Delivery", Loop())

    worker = ThreadWorker(make, Counters())
    worker.start()
    worker.stop(0.0)
    may_go.set()
    eventually(lambda: not worker.is_alive())
    assert [] == ran


@pytest.mark.parametrize(("name", "value"), [("executable", ""), ("executable", None), ("frozen", True)])
def test_a_program_that_has_no_interpreter_to_start_delivers_by_a_thread_instead_of_a_process(
    name: str, value: object, sqlite_uri: str, experiment_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that embeds Python, and one that is frozen into a file, which would be started once more."""
    monkeypatch.setattr(sys, name, value, raising=False)
    tracker = MLflowTracker(experiment_name, sqlite_uri, outbox_dir=tmp_path, worker="process", settings=QUICK)
    with tracker, tracker.start_run("embedded") as run:
        run.log_metric("m", 1.0)
        assert tracker._outbox is not None
        assert isinstance(tracker._outbox._worker, ThreadWorker)
    assert {"m": 1.0} == the_run(sqlite_uri, experiment_name).data.metrics
