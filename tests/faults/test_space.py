"""Full disks and short writes: logging goes on, and what it said it kept arrives."""

from __future__ import annotations

import dataclasses
import logging
import re
import resource
import time
from collections import Counter
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

#: Milliseconds that 99.9 % of logging calls may take on a disk that is full or stalled, and any of them.
MANNERS_MS = (50.0, 1000.0)


def check_manners(row: Row, report: dict[str, Any]) -> None:
    """Check that no logging call of one child raised or waited; ``row`` does so for all of a test's together."""
    assert [] == report["raised"]
    row.worst("slowest_call_ms", float(report["max_ms"]))
    if report.get("calls", 0) >= 1000:  # of fewer, it would be the slowest one
        row.measure(p999_ms=report["p999_ms"])
        assert report["p999_ms"] < MANNERS_MS[0]
    assert report["max_ms"] < MANNERS_MS[1]


def check_accounts(report: dict[str, Any], acked: set[int], *, lines: int = 1) -> None:
    """Check that each call that was refused is in one counter, and each kind of trouble in one line (I7).

    Args:
        report: with the number of calls, the counters and what was said.
        acked: events whose call returned True.
        lines: of each kind, where a kind has one for each key.
    """
    refused = {name: n for name, n in report["counters"].items() if name.startswith("refused_")}
    failed = report["counters"].get("internal_errors", 0)
    assert report["calls"] - len(acked) == sum(refused.values()) + failed, report["counters"]
    assert [] == [line for line, count in Counter(report["said"]).items() if count > lines]


class Said(logging.Handler):
    """Keeps the lines that the library logs, each without its numbers, which would make every line another one.

    Args:
        lines: where they go.
    """

    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self._lines = lines
        logging.getLogger("mlflow_outbox").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line."""
        self._lines.append(re.sub(r"[0-9][0-9,.]*", "#", record.getMessage()))


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
        said: list[str] = []
        Said(said)
        if tracker.disabled:  # there was not even room for the directory: it said so, and keeps nothing
            run = tracker.start_run("nowhere")
            return {"disabled": True, "kept": sum(log_event(run, number) for number in range(20))}
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
            "disabled": False,
            "left": [left.pending, left.parked, left.dead],
            "calls": len(took),
            "said": said,
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
    chosen = row.sample(sizes, 8, len(sizes)) if row.tier == "commit" else sizes * row.pick(1, 8, 40)
    for number, options in enumerate(chosen):
        uri = f"sqlite:///{empty_database(tmp_path / f'{number}.db')}"
        folder = tmp_path / f"disk{number}"
        child = nest.start(fill, uri, str(folder), options, 400)
        report = child.report()
        if report["disabled"]:  # nothing was there to fill: not counted
            assert 0 == report["kept"], options
            continue
        assert [0, 0, 0] == report["left"], (options, report)
        check_manners(row, report)
        acked = child.acked()
        held(uri, "full").check(acked)
        check_accounts(report, acked)
        full = report["counters"]
        assert full.get("disk_errors", 0) + full.get("refused_full", 0) > 0, (options, full)
        row.done()
    assert row.times > len(chosen) / 2, "most of the disks took nothing at all"


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
        tracker._outbox.sync()  # type: ignore[union-attr]  # it was made
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
