"""Many processes on one outbox, many workers for it, and locks that somebody tampers with."""

from __future__ import annotations

import http
import itertools
import os
import threading
import time
from pathlib import Path

import pytest

from faults import workload
from faults.children import Child, Nest
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
    tracker = MLflowTracker(experiment, uri, outbox_dir=outbox, worker=worker, settings=workload.settings())  # type: ignore[arg-type]  # one of the kinds
    run = tracker.start_run(f"run {first}")
    for n in range(first, first + count):
        if workload.log_event(run, n):
            workload.ack(fd, n)
    run.end()
    os._exit(0)


@pytest.mark.fault("F83", "many processes log to one outbox at once")
def test_many_processes_share_one_outbox(sqlite_uri: str, nest: Nest, row: Row, tmp_path: Path) -> None:
    """Every event of every process arrives once."""
    processes, count = row.pick(16, 64, 256), row.pick(200, 10_000, 100_000)
    step = 10_000 * -(-count // 10_000)  # the numbers of no two processes may meet
    outbox = tmp_path / "outbox"
    children = [
        nest.start(log_some, sqlite_uri, str(outbox), "many", n * step, count, "none") for n in range(1, processes + 1)
    ]
    acked: set[int] = set()
    for child in children:
        assert 0 == child.join(600 + processes * count / 1000)
        acked |= child.acked()
    assert processes * count == len(acked)
    row.done(processes)
    row.measure(processes=processes, events=len(acked))
    recovered(nest, sqlite_uri, outbox, "many", acked, acked, 50, patience=60 + len(acked) / 400)


def deliver_and_linger(fd: int, uri: str, outbox: str, experiment: str, first: int, count: int) -> None:
    """Log a little with a worker of one's own, say when it takes and gives back the lease, and stay for the others."""
    take, release = Lease._take, Lease.release

    def taken(lease: Lease) -> bool:
        got = take(lease)
        if got:
            os.writev(fd, [b"holds %.9f\n" % time.monotonic()])
        return got

    def released(lease: Lease) -> None:
        if lease.is_held():
            os.writev(fd, [b"leaves %.9f\n" % time.monotonic()])
        release(lease)

    Lease._take, Lease.release = taken, released  # type: ignore[method-assign]  # in this child only
    tracker = MLflowTracker(experiment, uri, outbox_dir=outbox, settings=workload.settings(batch_points=20))
    run = tracker.start_run(f"run {first}")
    for n in range(first, first + count):
        if workload.log_event(run, n):
            workload.ack(fd, n)
    run.end()
    threading.Event().wait()


def claims(child: Child, ended: float) -> list[tuple[float, float, int]]:
    """Return when a worker certainly held the lease: from, to, and its process.

    Args:
        child: the worker.
        ended: when it was killed; it held until then what it had not given back.
    """
    found, since = [], 0.0
    for line in child.lines():
        what, _, when = line.partition(" ")
        if what == "holds":
            assert not since, "it took what it held"
            since = float(when)
        elif what == "leaves":
            found.append((since, float(when), child.pid))
            since = 0.0
    return [*found, (since, ended, child.pid)] if since else found


def lock_holders(lock: Path) -> list[str]:
    """Return the kernel's own list of who has a lock on a file, of whatever kind: it decides who delivers."""
    try:
        inode = f":{lock.stat().st_ino}"
    except FileNotFoundError:
        return []
    lines = (line.split() for line in Path("/proc/locks").read_text().splitlines())
    return [words[4] for words in lines if words[1] == "FLOCK" and words[5].endswith(inode)]


@pytest.mark.fault(
    "F80", "16, 4 and 2 workers compete for one outbox, holder after holder killed, before a real server"
)
def test_of_many_workers_one_delivers(
    mlflow_server: MlflowServer, experiment_name: str, nest: Nest, row: Row, tmp_path: Path
) -> None:
    """There is one lease holder at any time, and the server gets no batch again after an answer that it has it."""
    from mlflow_outbox.testing.proxy import FaultProxy

    samples, takeovers = 0, 0
    with FaultProxy(mlflow_server.url) as proxy:
        for turn in range(row.pick(1, 50, 500)):
            outbox, experiment = str(tmp_path / f"outbox{turn}"), f"{experiment_name}-{turn}"
            workers = (16, 4, 2)[turn % 3]
            children = [
                nest.start(deliver_and_linger, proxy.url, outbox, experiment, n * 1000, 30)
                for n in range(1, workers + 1)
            ]
            directory = workload.directory_of(Path(outbox), proxy.url)

            def sampled(directory: Path = directory) -> bool:
                nonlocal samples
                samples += 1
                # A set: a list that changes while it is read can name one twice.
                found = set(lock_holders(directory / "worker.lock"))
                assert len(found) <= 1, f"several hold the lease: {found}"
                return True

            for child in children:
                child.wait_for_lines(30)
            acked = set().union(*(child.acked() for child in children))
            assert 30 * workers == len(acked)
            eventually(
                lambda acked=acked, experiment=experiment, sampled=sampled: (
                    sampled() and acked <= set(held(mlflow_server.database_uri, experiment).events)
                ),
                60,
                "all is delivered",
            )
            # One that is killed between an answer and its record leaves a batch that the next one has to send again.
            watch = Watch(OutboxDirectory.open(directory), workload.settings())
            eventually(lambda watch=watch, sampled=sampled: sampled() and watch.measure()[0], 60, "all is recorded")
            held_by: list[tuple[float, float, int]] = []
            for _ in range(min(2, workers - 1)):
                holder_pid = workload.lease_pid(outbox, proxy.url)
                (first,) = (child for child in children if child.pid == holder_pid)
                children.remove(first)
                ended = time.monotonic()
                first.kill()
                held_by += claims(first, ended)
                left = {child.pid for child in children}
                eventually(
                    lambda outbox=outbox, left=left, sampled=sampled: (
                        sampled() and workload.lease_pid(outbox, proxy.url) in left
                    ),
                    60,
                    "another takes over",
                )
                takeovers += 1
            for child in children:
                ended = time.monotonic()
                child.kill()
                held_by += claims(child, ended)
            held_by.sort()
            assert len(held_by) > min(2, workers - 1), "the lease was never seen to go from one to the next"
            overlaps = [pair for pair in itertools.pairwise(held_by) if pair[1][0] < pair[0][1]]
            assert [] == overlaps, "two workers held the lease at a time: (from, to, process)"
            held(mlflow_server.database_uri, experiment).check(acked)
            row.done()
        answers: dict[bytes, list[tuple[int | None, int | None]]] = {}
        for request in proxy.requests:
            if "log-batch" in request.path:
                answers.setdefault(request.body, []).append((request.status, request.backend_status))
    repeated = [found for found in answers.values() if len(found) > 1]
    row.measure(samples=samples, takeovers=takeovers, batches=len(answers), repeated=len(repeated))
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
    for turn in range(row.pick(2, 20, 100)):
        first = 100_000 * (turn + 1)
        nest.start(log_some, sqlite_uri, str(outbox), "locks", first, 10, "none").join()
        acked |= set(range(first, first + 10))
        lock = path / "worker.lock"
        lock.unlink(missing_ok=True)
        lock.write_bytes(b'{"host":"elsewhere","pid":%d,"kind":"process"}' % os.getpid())
        lock.chmod(0o600)
        assert holder(lock) is None, "nobody holds it, whatever it says"
        # So few events that it delivers them itself: with many it would hand over to a child, and let go for that.
        owner = nest.start(workload.log_forever, sqlite_uri, str(outbox), "locks", first + 1000, 1, "thread", {}, 0.5)
        eventually(lambda owner=owner: workload.lease_pid(str(outbox), sqlite_uri) == owner.pid)
        lock.unlink()
        lock.write_bytes(b"")
        lock.chmod(0o600)
        thief = Lease(lock, "command")
        assert thief.acquire()
        time_of_theft = time.monotonic()
        eventually(lambda: not _holders(path), 15, "the owner of the deleted file lets go, and its child too")
        row.measure(two_workers_at_most_s=time.monotonic() - time_of_theft)
        thief.release()
        eventually(
            lambda owner=owner: workload.lease_pid(str(outbox), sqlite_uri) == owner.pid, 60, "and takes it again"
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
