"""A program may fork while other threads import what is left of mlflow, or use a store; its child may do the same."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest

from mlflow_outbox_worker import database, forking
from mlflow_outbox_worker.database import Database
from servers import eventually

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
    done = subprocess.run(command, capture_output=True, timeout=250, check=False)
    assert 0 == done.returncode, done.stderr


def test_a_fork_waits_until_no_other_thread_uses_a_store() -> None:
    """SQLite's own locks would stay locked in the child; a use in the child does not wait for its parent's threads."""
    inside, left = threading.Event(), []

    def use() -> None:
        with forking.using_store():
            inside.set()
            eventually(lambda: forking._uses._forks, message="somebody forks")
            left.append(True)

    thread = threading.Thread(target=use)
    thread.start()
    inside.wait(60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads, which is what this is about
        child = os.fork()
    if child == 0:
        with forking.using_store():
            os._exit(0 if left else 1)
    _, status = os.waitpid(child, 0)
    thread.join(60)
    assert 0 == os.waitstatus_to_exitcode(status)
    with forking.using_store():
        assert [threading.get_ident()] == list(forking._uses._users)
    assert ({}, []) == (forking._uses._users, forking._uses._forks)


_INTERRUPTED = """
import os, signal, threading, time
from mlflow_outbox_worker import forking
forking.PATIENCE, forking.STORE_PATIENCE = 60.0, 30.0
imports, interrupted = threading.Event(), threading.Event()

def import_something():
    with forking.importing():
        imports.set()
        interrupted.wait(60)

def interrupt(*_):
    interrupted.set()
    raise KeyboardInterrupt

thread = threading.Thread(target=import_something, daemon=True)
thread.start()
imports.wait(60)
signal.signal(signal.SIGALRM, interrupt)
os.register_at_fork(before=lambda: signal.setitimer(signal.ITIMER_REAL, 0.2))  # the last is the first to be called
child = os.fork()
if child == 0:
    os._exit(0)
os.waitpid(child, 0)
thread.join(60)
begun = time.monotonic()
with forking.using_store():
    waited = time.monotonic() - begun
os._exit(7 if interrupted.is_set() and waited < 15 else 1)
"""


def test_a_signal_that_ends_the_wait_of_a_fork_slows_no_later_use_of_a_store() -> None:
    """Python goes on with the fork; each use of the ledger took a second more from then on."""
    command = [sys.executable, "-W", "ignore:.*fork:DeprecationWarning", "-c", _INTERRUPTED]
    done = subprocess.run(command, capture_output=True, timeout=250, check=False)
    assert 7 == done.returncode, done.stderr


def test_a_ledger_that_is_made_while_a_fork_is_under_way_is_not_in_use_at_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fork has asked all others for their locks by then; in the child SQLite would stay locked for ever."""
    monkeypatch.setattr(forking, "STORE_PATIENCE", 60.0)
    may_use, used = threading.Event(), threading.Event()
    made: list[Database] = []

    def make_and_use() -> None:
        made.append(Database.open(tmp_path / "ledger", timeout=60.0, report=pytest.fail))
        assert may_use.wait(60)
        assert [(1,)] == made[0].query("SELECT 1")
        used.set()

    worker = threading.Thread(target=make_and_use, daemon=True)
    database._before_fork()
    try:
        worker.start()
        eventually(lambda: made)
        forking._before_fork()
        try:
            may_use.set()
            assert not used.wait(0.5)
        finally:
            forking._after_fork_in_parent()
    finally:
        database._after_fork_in_parent()
    assert used.wait(60)
    worker.join(60)
    made[0].close()


_WARNED = """
import os, select, sys, threading
from mlflow_outbox import counters
counters._saying.patience = 60.0  # here a fork waits for a test, which may be slow
os.register_at_fork(before=lambda: os.write(1, b"forking\\n"))
text = "more than a pipe holds " * 10_000
threading.Thread(target=counters.Counters().warn_once, args=("about", text), daemon=True).start()
never = threading.Event()
while select.select([], [2], [], 0)[1]:
    never.wait(0.001)  # until the pipe is full, in the middle of the warning
child = os.fork()
if child == 0:
    os.write(1, b"forked\\n")
    print("the child's own word", file=sys.stderr, flush=True)
    os._exit(0)
_, status = os.waitpid(child, 0)
os._exit(os.waitstatus_to_exitcode(status))
"""


def test_a_fork_waits_for_a_warning_that_another_thread_is_writing() -> None:
    """The stream would stay locked in the child, and hang whoever prints there, for a warning that nobody asked for."""
    command = [sys.executable, "-W", "ignore:.*fork:DeprecationWarning", "-c", _WARNED]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as program:
        assert program.stdout is not None
        assert program.stderr is not None
        try:
            assert b"forking\n" == program.stdout.readline()
            # A fork that does not wait has come to its child long before.
            assert not select.select([program.stdout], [], [], 0.5)[0], program.stdout.readline()
            said = program.stderr.read()
            assert b"forked\n" == program.stdout.readline()
            assert 0 == program.wait(60)
        finally:
            program.kill()
    assert said.endswith(b"the child's own word\n")
