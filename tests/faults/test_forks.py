"""Forks in every state, and the processes of a data loader: each writes segments of its own."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from faults import workload
from faults.children import Nest
from faults.table import Row
from faults.test_kills import recovered
from mlflow_outbox import MLflowTracker
from mlflow_outbox.spool.frame import unpack_header
from servers import eventually


def segments_written(pid: int) -> set[str]:
    """Return the segments that a process has open to write to; none of one that is gone.

    Those that it only reads, as one that delivers does, are opened anew and share no lock with anybody.
    """
    found = set()
    try:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            try:
                name = os.readlink(entry)
                info = Path(f"/proc/{pid}/fdinfo/{entry.name}").read_text()
            except OSError:  # closed meanwhile
                continue
            flags = int(next(line for line in info.splitlines() if line.startswith("flags:")).split()[1], 8)
            if name.endswith(".log") and flags & os.O_ACCMODE != os.O_RDONLY:
                found.add(name)
    except OSError:
        pass
    return found


def check_outbox(path: Path) -> None:
    """Check that the ledger is whole, and that each writer's segments are of one process."""
    with sqlite3.connect(path / "delivery" / "cache.db") as ledger:
        assert [("ok",)] == ledger.execute("PRAGMA integrity_check").fetchall()
    ledger.close()
    writers: dict[str, set[int]] = {}
    for segment in path.glob("*/*/*.log"):
        header, _ = unpack_header(segment.read_bytes())
        assert segment.name.startswith(header.writer)
        writers.setdefault(header.writer, set()).add(header.pid)
    assert len(writers) > 1
    assert {1} == {len(pids) for pids in writers.values()}


def fork_while(  # noqa: PLR0912 - one state after the other
    fd: int, uri: str, outbox: str, state: str, first_out: str, base: int
) -> None:
    """Fork while threads log and a worker delivers; parent and child both log to the run, in their own numbers."""
    tracker = MLflowTracker("forks", uri, outbox_dir=outbox, settings=workload.settings(**workload.TINY))
    run = tracker.start_run(f"forked {base}")
    if state != "before the first event":
        for n in range(base, base + 20):
            assert workload.log_event(run, n)
            workload.ack(fd, n)
    over = threading.Event()

    def log(first: int) -> None:
        n = first
        while not over.is_set() and n < first + 3000:
            if workload.log_event(run, n):
                workload.ack(fd, n)
            n += 1
            if n % 8 == 0:
                over.wait(0.0005)  # let the others have a turn

    threads = (
        [threading.Thread(target=log, args=(base + 10_000 * k,)) for k in (1, 2)]
        if state == "while threads log"
        else []
    )
    for thread in threads:
        thread.start()
    if state == "while the worker delivers":
        eventually(lambda: tracker.counters.get("delivered"))
    if state == "after close":
        tracker.close(0.5)
    parent, child = os.getpid(), os.fork()
    if child == 0:
        inherited = segments_written(parent)
        faulthandler.dump_traceback_later(100, exit=True)  # a child that hangs shows where
        for n in range(base + 40_000, base + 40_200):
            if workload.log_event(run, n):
                workload.ack(fd, n)
        mine = segments_written(os.getpid())
        if not mine or mine & inherited:
            mine, inherited = ({Path(name).name for name in names} for names in (mine, inherited))
            os.writev(fd, [f"shared: {mine} and {inherited}\n".encode()])
        if first_out == "parent":
            eventually(lambda: os.getppid() != parent, 60, "the parent has ended")
        os._exit(0)
    for n in range(base + 50_000, base + 50_200):
        if workload.log_event(run, n):
            workload.ack(fd, n)
    over.set()
    for thread in threads:
        thread.join()
    if first_out == "child":
        os.waitpid(child, 0)
    os._exit(0)


@pytest.mark.fault("F05", "fork before the first event, while idle, while threads log, while delivering, after close")
@pytest.mark.parametrize("first_out", ["child", "parent"])
def test_a_fork_in_any_state_loses_and_doubles_nothing(
    first_out: str, empty_database: Callable[[Path], Path], nest: Nest, row: Row, tmp_path: Path
) -> None:
    """Parent and child write segments of their own; the next program delivers both."""
    states = ["before the first event", "idle", "while threads log", "while the worker delivers", "after close"]
    for turn in range(row.pick(1, 40, 400)):
        uri = f"sqlite:///{empty_database(tmp_path / f'{turn}.db')}"
        outbox = tmp_path / f"outbox{turn}"
        acked: set[int] = set()
        issued: set[int] = set()
        for number, state in enumerate(states, 1):
            base = 100_000 * number
            child = nest.start(fork_while, uri, str(outbox), state, first_out, base)
            child.join()
            eventually(lambda child=child: not child.is_heard(), 120, "the grandchild is gone")
            assert [] == [line for line in child.lines() if line.startswith("shared")], "descriptors of the parent"
            said = child.acked()
            assert {*range(base + 40_000, base + 40_200), *range(base + 50_000, base + 50_200)} <= said, state
            acked |= said
            issued |= workload.issued_by(said, base, 3)
            row.done()
        recovered(nest, uri, outbox, "forks", acked, issued, 50)
        check_outbox(workload.directory_of(outbox, uri))


def load_data(fd: int, uri: str, outbox: str, base: int) -> None:
    """Train with the processes of a data loader: forked beside running threads, they log as they load, and end."""
    tracker = MLflowTracker("loaders", uri, outbox_dir=outbox, settings=workload.settings(**workload.TINY))
    run = tracker.start_run(f"training {base}")

    def log(first: int, count: int) -> None:
        for n in range(first, first + count):
            if workload.log_event(run, n):
                workload.ack(fd, n)

    def load(first: int) -> None:
        faulthandler.dump_traceback_later(60, exit=True)  # a loader that hangs shows where
        log(first, 50)

    fork = multiprocessing.get_context("fork")
    log(base, 40)
    for epoch in range(2):  # a data loader forks anew for each
        loaders = [
            fork.Process(target=load, args=(base + 10_000 * (1 + 4 * epoch + k),), daemon=True) for k in range(4)
        ]
        for loader in loaders:
            loader.start()
        log(base + 40 * (epoch + 1), 40)
        for loader in loaders:
            loader.join()
            assert 0 == loader.exitcode
    os._exit(0)


@pytest.mark.fault("F05", "eight processes of a data loader, forked in two epochs while the training logs and delivers")
def test_the_processes_of_a_data_loader_log_to_the_run(
    empty_database: Callable[[Path], Path], nest: Nest, row: Row, tmp_path: Path
) -> None:
    """All of them end, and every event of each is there once."""
    for turn in range(row.pick(1, 20, 200)):
        uri = f"sqlite:///{empty_database(tmp_path / f'{turn}.db')}"
        outbox = tmp_path / f"outbox{turn}"
        child = nest.start(load_data, uri, str(outbox), 0)
        assert 0 == child.join()
        expected = {*range(120), *(n for k in range(1, 9) for n in range(10_000 * k, 10_000 * k + 50))}
        assert expected == child.acked()
        recovered(nest, uri, outbox, "loaders", expected, expected, 90_000)
        check_outbox(workload.directory_of(outbox, uri))
        row.done(8)
