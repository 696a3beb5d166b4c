"""Many processes on one outbox, many workers for it, and locks that somebody tampers with."""

from __future__ import annotations

import http
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from faults import workload
from faults.children import Nest
from faults.oracle import held
from faults.table import Row
from faults.test_kills import recovered
from mlflow_outbox import MLflowTracker
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox_worker.flush import Watch
from mlflow_outbox_worker.lease import Lease, holder
from servers import MlflowServer, eventually


def log_some(fd: int, uri: str, outbox: str, experiment: str, first: int, count: int, worker: str) -> None:
    """Log a run of some events as fast as possible, and leave without waiting for anything."""
    tracker = MLflowTracker(experiment, uri, outbox_dir=outbox, worker=worker, settings=workload.settings())  # type: ignore[arg-type]
    run = tracker.start_run(f"run {first}")
    for n in range(first, first + count):
        if workload.log_event(run, n):
            workload.ack(fd, n)
    run.end()
    os._exit(0)


@pytest.mark.fault("F83", "many processes log to one outbox at once")
def test_many_processes_share_one_outbox(sqlite_uri: str, nest: Nest, row: Row, tmp_path: Path) -> None:
    """Every event of every process arrives once."""
    processes, count = row.pick(16, 64, 256), row.pick(200, 10_000, 10_000)
    outbox = tmp_path / "outbox"
    children = [
        nest.start(log_some, sqlite_uri, str(outbox), "many", n * 10_000, count, "none")
        for n in range(1, processes + 1)
    ]
    acked: set[int] = set()
    for child in children:
        assert 0 == child.join(600)
        acked |= child.acked()
    assert processes * count == len(acked)
    row.done(processes)
    row.measure(processes=processes, events=len(acked))
    recovered(nest, sqlite_uri, outbox, "many", acked, acked, 50, patience=60 + len(acked) / 400)


def deliver_and_linger(fd: int, uri: str, outbox: str, experiment: str, first: int) -> None:
    """Log a little with a worker of one's own, and stay for the others."""
    tracker = MLflowTracker(experiment, uri, outbox_dir=outbox, settings=workload.settings(batch_points=20))
    run = tracker.start_run(f"run {first}")
    for n in range(first, first + 100):
        if workload.log_event(run, n):
            workload.ack(fd, n)
    run.end()
    threading.Event().wait()


@pytest.mark.fault("F80", "many workers compete for one outbox, in front of a real server")
def test_of_many_workers_one_delivers(
    mlflow_server: MlflowServer, experiment_name: str, nest: Nest, row: Row, tmp_path: Path
) -> None:
    """There is one lease holder at any time, and the server gets no batch again after an answer that it has it."""
    from mlflow_outbox.testing.proxy import FaultProxy

    with FaultProxy(mlflow_server.url) as proxy:
        for turn in range(row.pick(1, 20, 200)):
            outbox, experiment = str(tmp_path / f"outbox{turn}"), f"{experiment_name}-{turn}"
            workers = row.pick(6, 16)
            children = [
                nest.start(deliver_and_linger, proxy.url, outbox, experiment, n * 1000) for n in range(1, workers + 1)
            ]
            for child in children:
                child.wait_for_lines(100)
            acked = set().union(*(child.acked() for child in children))
            eventually(
                lambda acked=acked, experiment=experiment: (
                    acked <= set(held(mlflow_server.database_uri, experiment).events)
                ),
                60,
                "all is delivered",
            )
            # One that is killed between an answer and its record leaves a batch that the next one has to send again.
            directory = OutboxDirectory.open(workload.directory_of(Path(outbox), proxy.url))
            watch = Watch(directory, workload.settings())
            eventually(lambda watch=watch: watch.measure()[0], 60, "all is recorded")
            for child in children:
                child.kill()
            held(mlflow_server.database_uri, experiment).check(acked)
            row.done()
        answers: dict[bytes, list[tuple[int | None, int | None]]] = {}
        for request in proxy.requests:
            if "log-batch" in request.path:
                answers.setdefault(request.body, []).append((request.status, request.backend_status))
    repeated = [found for found in answers.values() if len(found) > 1]
    row.measure(workers=workers, batches=len(answers), repeated=len(repeated))
    ok = http.HTTPStatus.OK
    needless = [found for found in repeated if any(status == ok for status, _ in found[:-1])]
    assert [] == needless, f"sent again after an answer (to the worker, of the server): {needless}"


@pytest.mark.fault(
    "F82", "a stale lock file with a living process's id; the lock file deleted and replaced under its owner"
)
def test_only_the_kernel_s_lock_decides_who_delivers(sqlite_uri: str, nest: Nest, row: Row, tmp_path: Path) -> None:
    """A stale note excludes nobody; the owner of a deleted lock file stops, so that there are never two for long."""
    outbox = tmp_path / "outbox"
    path = workload.directory_of(outbox, sqlite_uri)
    acked: set[int] = set()
    for turn in range(row.pick(1, 20, 100)):
        first = 100_000 * (turn + 1)
        nest.start(log_some, sqlite_uri, str(outbox), "locks", first, 10, "none").join()
        acked |= set(range(first, first + 10))
        lock = path / "worker.lock"
        lock.unlink(missing_ok=True)
        lock.write_bytes(b'{"host":"elsewhere","pid":%d,"kind":"process"}' % os.getpid())
        lock.chmod(0o600)
        assert holder(lock) is None, "nobody holds it, whatever it says"
        owner = nest.start(workload.log_forever, sqlite_uri, str(outbox), "locks", first + 1000, 1, "thread", {}, 0.01)
        eventually(lambda owner=owner: workload.lease_pid(str(outbox), sqlite_uri) == owner.pid, 30)
        lock.unlink()
        lock.write_bytes(b"")
        lock.chmod(0o600)
        thief = Lease(lock, "command")
        assert thief.acquire()
        time_of_theft = time.monotonic()
        eventually(lambda owner=owner: owner.pid not in _holders(path), 15, "the owner of the deleted file lets go")
        row.measure(two_workers_at_most_s=time.monotonic() - time_of_theft)
        thief.release()
        eventually(
            lambda owner=owner: workload.lease_pid(str(outbox), sqlite_uri) == owner.pid, 15, "and takes it again"
        )
        owner.kill()
        acked |= owner.acked()
        recovered(nest, sqlite_uri, outbox, "locks", acked, acked | {max(owner.acked()) + 1}, first + 90_000)
        acked |= set(range(first + 90_000, first + 90_010)) | (set(held(sqlite_uri, "locks").events))
        row.done()


def _holders(path: Path) -> set[int]:
    """Return the processes that have a lock file of an outbox open, deleted ones too."""
    found = set()
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                names = [os.readlink(entry) for entry in (process / "fd").iterdir()]
            except OSError:
                continue
            if any(name.startswith(f"{path}/worker.lock") and name.endswith("(deleted)") for name in names):
                found.add(int(process.name))
    return found


def with_clock(fd: int, uri: str, outbox: str, jumps: list[float]) -> None:
    """Log and deliver with a wall clock that jumps, and report."""
    import mlflow_outbox.run as run_module
    from mlflow_outbox_worker import delivery

    def work() -> dict[str, Any]:
        shift = [0.0]
        true_ns = time.time_ns
        run_module._time_ns = lambda: max(0, true_ns() + int(shift[0] * 1e9))
        delivery.time.time_ns = run_module._time_ns  # type: ignore[attr-defined]
        tracker = MLflowTracker("clock", uri, outbox_dir=outbox, settings=workload.settings())
        run = tracker.start_run("clock")
        n = 0
        for jump in [0.0, *jumps]:
            shift[0] = jump
            for _ in range(10):
                if workload.log_event(run, n):
                    workload.ack(fd, n)
                n += 1
            run.set_tag("last", str(n))
            tracker.flush(20)
        run.end()
        left = tracker.flush(30)
        return {"left": [left.pending, left.parked, left.dead], "last": n, "counters": tracker.counters}

    workload.reported(fd, work)


@pytest.mark.fault(
    "F40", "the wall clock jumps -1 h, +1 h, -10 y, to 0, and back, while logging and delivering (F41: the same gap)"
)
def test_a_wall_clock_that_jumps_costs_nothing(
    empty_database: Callable[[Path], Path], nest: Nest, row: Row, tmp_path: Path
) -> None:
    """All events arrive, none expires, and the last value of a tag is the last one that was logged."""
    import sqlite3

    year = 365 * 86400.0
    for number in range(row.pick(1, 20, 100)):
        database = empty_database(tmp_path / f"{number}.db")
        jumps = [-3600.0, 3600.0, -10 * year, -100 * year, 10 * year, 0.0]
        child = nest.start(with_clock, f"sqlite:///{database}", str(tmp_path / f"outbox{number}"), jumps)
        report = child.report()
        assert [0, 0, 0] == report["left"], report
        held(f"sqlite:///{database}", "clock").check(child.acked())
        connection = sqlite3.connect(database)
        ((last,),) = connection.execute("SELECT value FROM tags WHERE key = 'last'").fetchall()
        connection.close()
        assert str(report["last"]) == last
        row.done(len(jumps))
