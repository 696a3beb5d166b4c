"""What child processes do in the fault tests. Importing this module imports all of MLflow that delivery needs.

Each function takes the descriptor for acknowledgements first. A line is one ``writev`` of less than PIPE_BUF bytes, so
that the lines of several threads do not mix, a kill cannot cut one in two, and a fault of ``write`` does not hit it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import json
import os
import sqlite3
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from contents import QUICK
from faults import manners
from faults.oracle import kind_of, log_event
from mlflow_outbox import MLflowTracker, Settings
from mlflow_outbox.counters import Counters
from mlflow_outbox.destination import resolve
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox_worker import thread
from mlflow_outbox_worker.delivery import Delivery
from mlflow_outbox_worker.lease import holder
from servers import eventually

# All that is otherwise imported at the first delivery, so that a forked child has it at once.
for _name in ("calls", "flush", "process", "thread", "reading", "mlflow_sink.stores", "mlflow_sink.rest"):
    importlib.import_module(f"mlflow_outbox_worker.{_name}")
for _name in ("tracking._tracking_service.utils", "store.tracking.sqlalchemy_store", "store.tracking.file_store"):
    importlib.import_module(f"mlflow.{_name}")
for _name in ("store.artifact.local_artifact_repo", "store.artifact.mlflow_artifacts_repo", "utils.rest_utils"):
    importlib.import_module(f"mlflow.{_name}")

# The newest revision of MLflow's tables: every store that is opened reads it from eighty files, always the same ones.
_tables: Any = importlib.import_module("mlflow.store.db.utils")
_tables._get_latest_schema_revision = functools.cache(_tables._get_latest_schema_revision)
_tables._get_latest_schema_revision()

#: Limits so small that a few dozen events make segments rotate and batches part.
TINY: Final = {"segment_bytes": 1024, "batch_points": 5}


def settings(**changed: Any) -> Settings:
    """Return quick settings with changes.

    Args:
        **changed: options by name.
    """
    return dataclasses.replace(QUICK, **changed)


def ack(fd: int, number: int) -> None:
    """Say that the logging call of an event has returned."""
    os.writev(fd, [b"%d\n" % number])


def tell(fd: int, **report: Any) -> None:
    """Say how it went, as the last line."""
    os.writev(fd, [json.dumps(report).encode() + b"\n"])


def reported(fd: int, work: Callable[[], dict[str, Any]]) -> None:
    """Run something whose result, or traceback, is the child's report."""
    try:
        tell(fd, **work())
    except BaseException:  # noqa: BLE001 - whatever it is, it is what the parent has to show
        tell(fd, error=traceback.format_exc()[-3500:])


def log_forever(
    fd: int,
    uri: str,
    outbox: str,
    experiment: str,
    first: int,
    threads: int,
    worker: str,
    changed: dict[str, Any],
    pause: float = 0.0005,
) -> None:
    """Log from several threads until somebody kills the process; thread k logs first + k * 10,000 and on.

    After every sixteenth event it pauses for some seconds: where the kill matters and not the events, for longer.
    """
    tracker = MLflowTracker(experiment, uri, outbox_dir=outbox, worker=worker, settings=settings(**changed))  # type: ignore[arg-type]  # one of the kinds
    run = tracker.start_run(f"run {first}")

    pace = threading.Event()  # never set: a training loop computes between its calls, and leaves the worker room

    def log(number: int) -> None:
        for n in range(number, number + 9_999):
            if log_event(run, n):
                ack(fd, n)
            if n % 16 == 0:
                pace.wait(pause)

    others = [threading.Thread(target=log, args=(first + 10_000 * k,), daemon=True) for k in range(1, threads)]
    for other in others:
        other.start()
    log(first)
    for other in others:
        other.join()
    threading.Event().wait()


def log_with_delivery_apart(fd: int, uri: str, outbox: str, experiment: str, first: int) -> None:
    """Log until somebody kills the process; a process of its own delivers, as where nothing has imported MLflow."""
    thread.is_mlflow_imported = lambda: False
    log_forever(fd, uri, outbox, experiment, first, 1, "thread", {"batch_points": 5}, 0.02)


def issued_by(acked: set[int], first: int, threads: int) -> set[int]:
    """Return what ``log_forever`` may have logged: what it acknowledged, and the call that each thread was in."""
    result = set(acked)
    for k in range(threads):
        start = first + 10_000 * k
        mine = [n for n in acked if start <= n < start + 10_000]
        result.add(max(mine) + 1 if mine else start)
    return result


def drain(
    fd: int,
    uri: str,
    outbox: str,
    experiment: str,
    fresh: int,
    changed: dict[str, Any],
    patience: float = 60.0,
    parked_too: bool = False,
) -> None:
    """Be the next program: log ten fresh events, deliver everything within some seconds, and report what came of it.

    With ``parked_too`` it waits for what waits for a person, too: until its own worker has been answered, the ledger
    says what the last one was told.
    """

    def work() -> dict[str, Any]:
        tracker = MLflowTracker(experiment, uri, outbox_dir=outbox, settings=settings(**changed))
        run = tracker.start_run(f"after {fresh}")
        acked = [n for n in range(fresh, fresh + 10) if log_event(run, n)]
        run.end()
        started = time.monotonic()
        left = tracker.flush(patience)
        while parked_too and left.parked and time.monotonic() < started + patience:
            left = tracker.flush(patience)
        took = time.monotonic() - started
        counters = tracker.counters
        tracker.close(5)
        counts = {"pending": left.pending, "parked": left.parked, "dead": left.dead, "delivered": left.delivered}
        return {"acked": acked, "counters": counters, "left": counts, "took": took}

    reported(fd, work)


def session(
    fd: int,
    uri: str,
    outbox: str,
    experiment: str,
    first: int,
    count: int,
    changed: dict[str, Any],
    conflicting: bool = False,
) -> None:
    """Log a run and deliver it in this one thread: append, rotate, send, record, verify, file, reclaim; then exit 0.

    The worker's loop runs in the main thread, so that the system calls come in the same order every time. With
    ``count`` 0 nothing is logged, and what somebody has left is delivered. With ``conflicting`` a param gets a second
    value, which becomes a dead letter; a run with one is never reclaimed.
    """
    given = settings(sync="always", retention=0.0, poll_interval=0.001, **{**TINY, **changed})
    manners.excuse_syncs()
    tracker = MLflowTracker(experiment, uri, outbox_dir=outbox, worker="none", settings=given)
    if count:
        log_run(fd, tracker, range(first, first + count), conflicting=conflicting)
    deliver(tracker, given, is_sent)
    if not conflicting:
        deliver(tracker, given, is_reclaimed)
    os._exit(0)


def log_run(fd: int, tracker: MLflowTracker, numbers: range, *, conflicting: bool) -> None:
    """Log a run; a conflicting value is acknowledged by a word."""
    run = tracker.start_run(f"run {numbers[0]}")
    for n in numbers:
        if log_event(run, n):
            ack(fd, n)
    if conflicting:
        param = next(n for n in numbers if kind_of(n) == "param")
        if run.log_params({f"p{param}": "another value"}):
            os.writev(fd, [b"conflict\n"])
    run.end()


def is_sent(delivery: Delivery, outbox: OutboxDirectory) -> bool:
    """Return whether everything on disk is delivered, and each run that has ended is verified and filed."""
    return not os.listdir(outbox.runs) or (bool(delivery.standings()) and delivery.is_idle())


def is_reclaimed(delivery: Delivery, outbox: OutboxDirectory) -> bool:
    """Return whether only runs that go on have something filed."""
    return set(os.listdir(outbox.delivered)) <= set(os.listdir(outbox.runs))


def deliver(
    tracker: MLflowTracker,
    given: Settings,
    done: Callable[[Delivery, OutboxDirectory], bool],
    *,
    seconds: float = 30.0,
) -> bool:
    """Run the worker's loop in this thread until something is true, or a time is over; return whether it is true."""
    over = threading.Event()
    directory = OutboxDirectory.open(Path(str(tracker.outbox_path)))
    delivery = Delivery(directory, resolve(tracker.tracking_uri), given, Counters(), kind="command")
    found = [False]

    def watch() -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):  # where the disk fails, a look may fail too
                found[0] = done(delivery, directory)
            if found[0] or over.wait(0.02):
                break
        delivery.stop()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    delivery.run()
    over.set()
    watcher.join()
    return found[0]


def timed(calls: list[float], log: Callable[[], Any]) -> Any:
    """Call something and keep how long it took, in seconds."""
    started = time.perf_counter()
    result = log()
    calls.append(time.perf_counter() - started)
    return result


def quantile(calls: list[float], share: float) -> float:
    """Return a quantile of times, in milliseconds."""
    return 1000 * sorted(calls)[min(len(calls) - 1, int(share * len(calls)))] if calls else 0.0


#: Seconds by which a busy machine may be late.
PATIENCE: Final = 1.0


def directory_of(outbox: str | Path, uri: str) -> Path:
    """Return the outbox directory of a destination under a root."""
    return Path(outbox) / resolve(uri).slug


def letters_of(outbox: str | Path, uri: str) -> list[bytes]:
    """Return the dead letters that the ledger of a destination holds, as they are stored."""
    ledger = sqlite3.connect(directory_of(outbox, uri) / "delivery" / "cache.db")
    with contextlib.closing(ledger):
        return [bytes(row[0]) for row in ledger.execute("SELECT value FROM Cache WHERE key LIKE 'dead/%'")]


def lease_pid(outbox: str, uri: str) -> int:
    """Return the process that holds the lease of an outbox, 0 when none does."""
    found = holder(directory_of(outbox, uri) / "worker.lock")
    return found.pid if found is not None else 0


def wait_for_round(tracker: MLflowTracker) -> None:
    """Wait until the background begins to look after the journals again, so that it has been through with them once."""
    if tracker._outbox is None:  # the directory could not be made yet, so there is no background either
        return
    caretaker, began = tracker._outbox._caretaker, threading.Event()
    whole = caretaker._each_round

    def look() -> None:
        began.set()
        whole()

    caretaker._each_round = look
    eventually(began.is_set, 60, "the background's next round")
    caretaker._each_round = whole


def seconds_until(condition: Callable[[], bool], timeout: float = 30.0) -> float:
    """Wait for a condition and return how long it took, in seconds."""
    started = time.monotonic()
    eventually(condition, timeout)
    return time.monotonic() - started
