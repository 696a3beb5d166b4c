"""SIGKILL at random times, at every system call, during recovery, and of whoever holds the lease."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from faults import workload
from faults.children import Child, Nest
from faults.oracle import held
from faults.table import Row
from servers import eventually

#: The calls that change what is on disk. A kill before each is a kill after each other one.
CALLS = ("write", "pwrite64", "openat", "fsync", "fdatasync", "ftruncate", "mkdir", "rename", "link", "unlink", "rmdir")


def recovered(
    nest: Nest,
    uri: str,
    outbox: Path,
    experiment: str,
    acked: set[int],
    issued: set[int],
    fresh: int,
    *,
    patience: float = 60.0,
) -> None:
    """Let the next program deliver what a killed one left, log more, and check what MLflow holds.

    Args:
        nest: starts that program.
        uri: of the store.
        outbox: root of the killed one's outbox.
        experiment: that all programs log to.
        acked: events whose logging call had returned True.
        issued: events that may be there.
        fresh: number of the first event that the next program logs.
        patience: seconds in which everything has to be delivered.
    """
    report = nest.start(workload.drain, uri, str(outbox), experiment, fresh, {}, patience).report(patience + 60)
    assert 10 == len(report["acked"]), report
    assert {"pending": 0, "parked": 0, "dead": 0} == {k: report["left"][k] for k in ("pending", "parked", "dead")}, (
        report
    )
    more = set(report["acked"])
    held(uri, experiment).check(acked | more, issued | more)


@pytest.mark.fault("F01", "SIGKILL at a random time while 4 threads log and a worker delivers")
@pytest.mark.parametrize("store", ["sqlite", "file"])
def test_kills_at_random_times_lose_and_double_nothing(
    store: str, part: slice, sqlite_uri: str, file_uri: str, nest: Nest, row: Row, rng: random.Random, tmp_path: Path
) -> None:
    """Each killed program is followed by another on its outbox; after every fifth kill all is delivered and judged."""
    uri = {"sqlite": sqlite_uri, "file": file_uri}[store]
    acked: set[int] = set()
    issued: set[int] = set()
    kills = range(row.pick(10, 500, 5000))[part]
    outbox = tmp_path / "outbox"
    for kill in range(1, len(kills) + 1):
        if kill % 50 == 0:  # an old outbox and a large store would only make it slow
            outbox, acked, issued = tmp_path / f"outbox{kill}", set(), set()
        experiment = f"kills-{kill // 50}"
        first = kill * 100_000
        child = nest.start(workload.log_forever, uri, str(outbox), experiment, first, 4, "thread", workload.TINY, 0.005)
        pause = rng.uniform(0, 0.3)
        child.wait_for_lines()
        child.process.join(pause)
        child.kill()
        acked |= child.acked()
        issued |= workload.issued_by(child.acked(), first, 4)
        row.done()
        if kill % 5 == 0 or kill == len(kills):
            recovered(nest, uri, outbox, experiment, acked, issued, first + 90_000)
            more = set(range(first + 90_000, first + 90_010))
            acked, issued = acked | more, issued | more
    row.measure(store=store)


def deliverer_of(program: Child) -> int:
    """Return the process that delivers for a program's worker thread."""
    for thread in Path(f"/proc/{program.pid}/task").iterdir():  # of which one has started it
        for name in (thread / "children").read_text().split():
            if b"mlflow_outbox_worker.child" in Path(f"/proc/{name}/cmdline").read_bytes():
                return int(name)
    failure = "there is no process that delivers"
    raise AssertionError(failure)


@pytest.mark.fault("F01", "SIGKILL of the process that delivers for a worker thread, then of the program")
def test_kills_of_a_program_and_of_its_delivering_process_lose_and_double_nothing(
    part: slice, sqlite_uri: str, file_uri: str, nest: Nest, row: Row, rng: random.Random, tmp_path: Path
) -> None:
    """Another process goes on; after the program's end nobody is left who delivers."""
    for number in range(row.pick(1, 18, 180))[part]:  # each needs three interpreters of its own, seconds each
        uri = (file_uri, sqlite_uri)[number % 2]
        experiment, outbox = f"apart-{number}", tmp_path / f"outbox{number}"
        child = nest.start(workload.log_with_delivery_apart, uri, str(outbox), experiment, 0)

        def goes_on(more: int, uri: str = uri, experiment: str = experiment) -> None:
            enough = len(held(uri, experiment).events) + more
            eventually(lambda: len(held(uri, experiment).events) >= enough, 60, "delivery goes on")

        goes_on(1)
        child.process.join(rng.uniform(0, 0.2))
        os.kill(deliverer_of(child), signal.SIGKILL)
        goes_on(10)
        child.process.join(rng.uniform(0, 0.2))
        child.kill()
        row.done(2)
        recovered(nest, uri, outbox, experiment, child.acked(), workload.issued_by(child.acked(), 0, 1), 90_000)


def points_of(trace: Path) -> Counter[str]:
    """Count the system calls of the main thread in strace's output, by name."""
    lines = trace.read_text(errors="replace").splitlines()
    main = lines[0].split(maxsplit=1)[0]
    names = (re.match(r"\d+\s+(\w+)\(", line) for line in lines if line.startswith(f"{main} "))
    return Counter(found[1] for found in names if found)


@pytest.mark.needs("strace")
@pytest.mark.fault("F02", "SIGKILL at system calls of append, rotate, deliver, record, verify, file and reclaim")
@pytest.mark.fault("F33", "SIGKILL at system calls of append, rotate, deliver, record, verify, file and reclaim")
@pytest.mark.fault("F34", "SIGKILL at system calls of append, rotate, deliver, record, verify, file and reclaim")
def test_a_kill_at_any_system_call_loses_and_doubles_nothing(
    part: slice, empty_database: Callable[[Path], Path], nest: Nest, row: Row, tmp_path: Path
) -> None:
    """The session of one thread is killed before its Nth call of each kind; another program delivers the rest."""
    uri = f"sqlite:///{empty_database(tmp_path / 'mlflow.db')}"
    calls = ",".join(CALLS)
    whole = nest.traced(
        tmp_path / "trace", calls, "", workload.session, uri, str(tmp_path / "whole"), "whole", 0, 12, {}
    )
    assert 0 == whole.join()
    held(uri, "whole").check(whole.acked())
    counts = sorted(points_of(tmp_path / "trace").items())
    points = [(name, n) for name, count in counts for n in range(1, count + 1)[part]]
    chosen = row.sample(points, 14, len(points), len(points))
    fired = 0
    for index, (name, when) in enumerate(chosen):
        experiment, outbox = f"killed-{index}", tmp_path / f"outbox{index}"
        inject = f"{name}:signal=SIGKILL:when={when}"
        child = nest.traced(
            tmp_path / "trace", calls, inject, workload.session, uri, str(outbox), experiment, 0, 12, {}
        )
        killed = child.join() != 0
        assert killed or points_of(tmp_path / "trace")[name] < when, f"{name} {when} came, and nobody was killed"
        fired += killed
        row.done()
        recovered(nest, uri, outbox, experiment, child.acked(), set(range(12)), 100)
        shutil.rmtree(outbox)
    row.measure(points=len(points), fired=fired)


@pytest.mark.needs("strace")
@pytest.mark.fault("F03", "SIGKILL at system calls of the recovery from a kill")
def test_a_kill_during_the_recovery_from_a_kill_is_harmless(
    empty_database: Callable[[Path], Path], nest: Nest, row: Row, rng: random.Random, tmp_path: Path
) -> None:
    """A program is killed in the middle of delivery, the one that recovers is killed too, a third one delivers all."""
    uri = f"sqlite:///{empty_database(tmp_path / 'mlflow.db')}"
    for number in range(row.pick(4, 100, 1000)):
        experiment, outbox = f"twice-{number}", tmp_path / f"outbox{number}"
        acked: set[int] = set()
        for first in (0, 1000):
            name, when = rng.choice([("pwrite64", 60), ("write", 40), ("openat", 80), ("fdatasync", 12), ("rename", 3)])
            inject = f"{name}:signal=SIGKILL:when={rng.randint(1, when)}"
            child = nest.traced(
                tmp_path / "trace", name, inject, workload.session, uri, str(outbox), experiment, first, 12, {}
            )
            child.join()
            acked |= child.acked()
        row.done()
        recovered(nest, uri, outbox, experiment, acked, {*range(12), *range(1000, 1012)}, 2000)
        shutil.rmtree(outbox)


@pytest.mark.fault("F81", "SIGKILL of the worker that holds the lease; another stands by")
def test_a_killed_lease_holder_is_replaced_within_two_seconds(
    sqlite_uri: str, nest: Nest, row: Row, rng: random.Random, tmp_path: Path
) -> None:
    """The survivor takes over in time, and all events of both arrive once."""
    outbox = str(tmp_path / "outbox")
    acked: set[int] = set()
    issued: set[int] = set()
    slowest = 0.0
    holder: Child | None = None
    for number in range(row.pick(3, 100, 1000)):
        first = (number + 1) * 100_000
        if holder is None:
            holder = nest.start(workload.log_forever, sqlite_uri, outbox, "lease", first, 1, "thread", {}, 0.01)
            eventually(
                lambda holder=holder: workload.lease_pid(outbox, sqlite_uri) == holder.pid, 30, "the lease is taken"
            )
            continue
        other = nest.start(workload.log_forever, sqlite_uri, outbox, "lease", first, 1, "thread", {}, 0.01)
        other.wait_for_lines(20)
        assert holder.pid == workload.lease_pid(outbox, sqlite_uri), "two workers"
        holder.process.join(rng.uniform(0, 0.2))
        holder.kill()
        slowest = max(
            slowest, workload.seconds_until(lambda other=other: workload.lease_pid(outbox, sqlite_uri) == other.pid)
        )
        acked |= holder.acked()
        issued |= holder.acked() | {max(holder.acked()) + 1}
        holder = other
        row.done()
    assert holder is not None
    holder.kill()
    acked |= holder.acked()
    issued |= holder.acked() | {max(holder.acked()) + 1}
    row.measure(slowest_takeover_s=slowest)
    recovered(nest, sqlite_uri, tmp_path / "outbox", "lease", acked, issued, 50, patience=60 + len(acked) / 400)
    assert slowest <= 2.0 + workload.PATIENCE


@pytest.mark.fault("F01", "a worker killed between making and writing a file store's param")
def test_a_param_that_a_killed_worker_left_empty_is_written_again(
    file_uri: str, nest: Nest, row: Row, tmp_path: Path
) -> None:
    """The empty file that MLflow's own code leaves is not taken for somebody's value."""
    experiment, outbox = "torn", tmp_path / "outbox"
    report = nest.start(workload.drain, file_uri, str(outbox), experiment, 0, {}).report()
    (param,) = (tmp_path / "mlruns").glob("*/*/params/p3")
    param.write_bytes(b"")
    shutil.rmtree(workload.directory_of(outbox, file_uri) / "delivery")  # the worker died before it recorded anything
    filed = workload.directory_of(outbox, file_uri) / "delivered"
    for run in filed.iterdir():
        run.rename(filed.parent / "runs" / run.name)
    recovered(nest, file_uri, outbox, experiment, set(report["acked"]), set(report["acked"]), 100)
    row.done()
