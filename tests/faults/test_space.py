"""Full disks, short writes, too few descriptors: logging goes on, and what it said it kept arrives."""

from __future__ import annotations

import dataclasses
import os
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from faults import workload
from faults.children import Nest
from faults.mounts import mount, own_namespace, tmpfs
from faults.oracle import held, log_event
from faults.table import Row
from mlflow_outbox import MLflowTracker
from servers import MlflowServer

#: Milliseconds that 99.9 % of logging calls may take on a disk that is full or stalled, and any of them.
MANNERS_MS = (50.0, 1000.0)


def check_manners(row: Row, report: dict[str, Any]) -> None:
    """Check that no logging call raised or waited, and note what was measured."""
    assert [] == report["raised"]
    row.measure(slowest_call_ms=report["max_ms"])
    if report.get("calls", 0) >= 1000:  # of fewer, it would be the slowest one
        row.measure(p999_ms=report["p999_ms"])
        assert report["p999_ms"] < MANNERS_MS[0]
    assert report["max_ms"] < MANNERS_MS[1] * (1 + workload.PATIENCE)


def log_timed(fd: int, run: Any, numbers: range, took: list[float], raised: list[str]) -> None:
    """Log events, acknowledge those that were kept, and note times and exceptions."""
    for number in numbers:
        started = time.perf_counter()
        try:
            kept = log_event(run, number)
        except Exception as error:  # noqa: BLE001 - the test is that there is none; it is reported
            raised.append(repr(error))
            continue
        took.append(time.perf_counter() - started)
        if kept:
            workload.ack(fd, number)


def fill(fd: int, uri: str, folder: str, options: str, count: int) -> None:
    """Log to a tmpfs until it is full and beyond, then make room; report how the calls went."""

    def work() -> dict[str, Any]:
        own_namespace()
        disk = tmpfs(Path(folder), options)
        given = workload.settings(free_bytes=0, sync_interval=0.02, **workload.TINY)
        tracker = MLflowTracker("full", uri, outbox_dir=disk / "outbox", worker="none", settings=given)
        if tracker.disabled:  # there was not even room for the directory: it said so, and keeps nothing
            run = tracker.start_run("nowhere")
            return {"raised": [], "p999_ms": 0, "max_ms": 0, "kept": int(log_event(run, 0)), "left": {}, "counters": {}}
        took: list[float] = []
        raised: list[str] = []
        run = tracker.start_run("full")
        log_timed(fd, run, range(count), took, raised)
        mount("-o", "remount,size=8m,nr_inodes=1000", str(disk))
        tracker._outbox.sync()  # type: ignore[union-attr]  # the background does the same, a moment later
        log_timed(fd, run, range(count, count + 10), took, raised)
        run.end()
        counters = tracker.counters
        swift = dataclasses.replace(given, batch_points=1000)
        left = MLflowTracker("full", uri, outbox_dir=disk / "outbox", settings=swift).flush(60)
        return {
            "raised": raised,
            "p999_ms": workload.quantile(took, 0.999),
            "max_ms": workload.quantile(took, 1.0),
            "kept": -1,
            "left": {"pending": left.pending, "parked": left.parked, "dead": left.dead},
            "counters": {**counters},
        }

    workload.reported(fd, work)


@pytest.mark.needs("mounts")
@pytest.mark.fault("F19", "ENOSPC, short writes and no inodes on a tiny tmpfs, then room again (F20)")
def test_a_full_disk_never_loses_what_a_call_said_it_kept(
    empty_database: Callable[[Path], Path], nest: Nest, row: Row, tmp_path: Path
) -> None:
    """Each size of disk fills at another byte; with room again, all that was kept in memory or on disk arrives."""
    sizes = [f"size={kib}k" for kib in range(12, 76, 4)] + ["size=1m,nr_inodes=14", "size=1m,nr_inodes=20"]
    for number, options in enumerate(
        row.sample(sizes, 4, len(sizes)) if row.pick(1, 9) == 1 else sizes * row.pick(1, 8)
    ):
        uri = f"sqlite:///{empty_database(tmp_path / f'{number}.db')}"
        folder = tmp_path / f"disk{number}"
        child = nest.start(fill, uri, str(folder), options, 400)
        report = child.report()
        assert {} == report["left"] or {"pending": 0, "parked": 0, "dead": 0} == report["left"], (options, report)
        if report["kept"] == -1:
            check_manners(row, report)
            held(uri, "full").check(child.acked())
            full = report["counters"]
            assert full.get("disk_errors", 0) + full.get("refused_full", 0) > 0 or "72k" in options, (options, full)
        row.done()


def log_with_limit(fd: int, uri: str, outbox: str, limit: int) -> None:
    """Log with a bound on the size of files: writes are short at that byte, and fail with EFBIG behind it."""

    def work() -> dict[str, Any]:
        given = workload.settings(free_bytes=0, sync_interval=0.02)
        tracker = MLflowTracker("limit", uri, outbox_dir=outbox, worker="none", settings=given)
        run = tracker.start_run("limit")
        took: list[float] = []
        raised: list[str] = []
        log_timed(fd, run, range(3), took, raised)
        files = Path(str(tracker.outbox_path), "runs")
        size = max(path.stat().st_size for path in files.glob("*/*.log"))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + limit, resource.RLIM_INFINITY))
        log_timed(fd, run, range(10, 20), took, raised)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        tracker._outbox.sync()  # type: ignore[union-attr]
        log_timed(fd, run, range(20, 23), took, raised)
        run.end()
        other = MLflowTracker("limit", uri, outbox_dir=outbox, settings=given)
        left = other.flush(60)
        return {
            "damage": other.counters.get("quarantined", 0) + other.counters.get("missing", 0),
            "raised": raised,
            "p999_ms": workload.quantile(took, 0.999),
            "max_ms": workload.quantile(took, 1.0),
            "left": bool(left),
            "counters": tracker.counters,
        }

    workload.reported(fd, work)


@pytest.mark.fault("F19", "RLIMIT_FSIZE at each byte of two frames: a short write of that many bytes")
def test_a_write_that_is_short_at_any_byte_leaves_no_torn_frame(
    empty_database: Callable[[Path], Path], nest: Nest, row: Row, tmp_path: Path
) -> None:
    """The file ends at a frame's end, the events behind wait in memory in their order, and all arrive."""
    uri = f"sqlite:///{empty_database(tmp_path / 'mlflow.db')}"
    acked: set[int] = set()
    for limit in row.sample(range(1, 90), 4, 89):
        child = nest.start(log_with_limit, uri, str(tmp_path / f"outbox{limit}"), limit)
        report = child.report()
        check_manners(row, report)
        assert report["left"], report
        assert report["counters"].get("disk_errors", 0) > 0, report["counters"]
        assert 0 == report["damage"], "the next program found a torn frame"
        fresh = child.acked()
        assert {*range(3), *range(10, 20), *range(20, 23)} == fresh, "memory took what the disk did not"
        acked |= fresh
        row.done()
    # Every child logs the same numbers to a run of its own, so each must be there once per run.
    counts = held(uri, "limit").events
    assert dict.fromkeys(acked, row.times) == dict(counts)


def log_without_descriptors(fd: int, uri: str, outbox: str) -> None:
    """Log while no descriptor is left, and then again with some."""

    def work() -> dict[str, Any]:
        given = workload.settings(sync_interval=0.02, **workload.TINY)
        tracker = MLflowTracker("descriptors", uri, outbox_dir=outbox, settings=given)
        run = tracker.start_run("descriptors")
        took: list[float] = []
        raised: list[str] = []
        log_timed(fd, run, range(20), took, raised)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1, hard))
        taken: list[int] = []
        try:
            while True:
                taken.append(os.dup(0))
        except OSError:
            pass
        log_timed(fd, run, range(20, 200), took, raised)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for each in taken:
            os.close(each)
        log_timed(fd, run, range(200, 220), took, raised)
        run.end()
        left = tracker.flush(60)
        return {
            "raised": raised,
            "p999_ms": workload.quantile(took, 0.999),
            "max_ms": workload.quantile(took, 1.0),
            "left": [left.pending, left.parked, left.dead],
            "counters": tracker.counters,
        }

    workload.reported(fd, work)


@pytest.mark.fault("F24", "no file descriptor left in the process, worker running")
def test_no_descriptor_left_loses_nothing(
    empty_database: Callable[[Path], Path], nest: Nest, row: Row, tmp_path: Path
) -> None:
    """Events wait in memory, the worker survives, and with descriptors again everything arrives."""
    for number in range(row.pick(1, 20, 100)):
        uri = f"sqlite:///{empty_database(tmp_path / f'{number}.db')}"
        child = nest.start(log_without_descriptors, uri, str(tmp_path / f"outbox{number}"))
        report = child.report()
        check_manners(row, report)
        assert [0, 0, 0] == report["left"], report
        held(uri, "descriptors").check(child.acked())
        row.done()


def log_mannerly(fd: int, uri: str, folder: str, what: str, count: int) -> None:
    """Log many metrics in some trouble; report how long the calls took, by the clock and in processor time."""

    def work() -> dict[str, Any]:
        outbox = Path(folder)
        if what == "full disk":
            own_namespace()
            outbox = tmpfs(Path(folder), "size=128k") / "outbox"
        given = workload.settings(free_bytes=0, sync_interval=0.05)
        tracker = MLflowTracker("manners", uri, outbox_dir=outbox, settings=given)
        run = tracker.start_run("manners")
        took: list[float] = []
        used: list[float] = []
        raised: list[str] = []
        pace = threading.Event()  # never set: a training loop computes between its calls
        for step in range(count):
            started, spent = time.perf_counter(), time.thread_time()
            try:
                run.log_metric("loss", step / 2, step=step)
            except Exception as error:  # noqa: BLE001 - the test is that there is none; it is reported
                raised.append(repr(error))
            used.append(time.thread_time() - spent)
            took.append(time.perf_counter() - started)
            if step % 20 == 0:
                pace.wait(0.001)
        return {
            "raised": raised,
            "calls": count,
            "median_us": 1000 * workload.quantile(took, 0.5),
            "p999_ms": workload.quantile(took, 0.999),
            "used_p999_ms": workload.quantile(used, 0.999),
            "max_ms": workload.quantile(took, 1.0),
        }

    workload.reported(fd, work)


@pytest.mark.needs("mounts", "strace")
@pytest.mark.fault("I5", "logging calls timed: server there, server away, disk full, each fdatasync 0.2 s")
@pytest.mark.parametrize("what", ["delivering", "server away", "full disk", "stalled disk"])
def test_a_logging_call_waits_for_nobody(
    what: str, mlflow_server: MlflowServer, nest: Nest, row: Row, tmp_path: Path
) -> None:
    """No call raises; 99.9 % need less than 1 ms of processor time, and less than 50 ms by the clock in any trouble."""
    uri = "http://127.0.0.1:9" if what == "server away" else mlflow_server.url
    count = row.pick(5_000, 50_000, 500_000)
    arguments = (uri, str(tmp_path / "outbox"), what, count)
    if what == "stalled disk":
        slow = "fdatasync:delay_enter=200000"
        child = nest.traced(tmp_path / "trace", "fdatasync", slow, log_mannerly, *arguments)
    else:
        child = nest.start(log_mannerly, *arguments)
    report = child.report()
    row.measure(what=what, median_us=report["median_us"], p999_processor_ms=report["used_p999_ms"])
    check_manners(row, report)
    if what in {"delivering", "server away"}:
        assert report["used_p999_ms"] < 1.0
    row.done(count)
