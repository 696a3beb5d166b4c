"""Disks that fail: EIO on the Nth call, a slow fsync, directories that vanish or become read-only."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from faults import workload
from faults.children import Nest
from faults.mounts import mount, own_namespace, tmpfs, umount
from faults.oracle import held
from faults.table import Row
from faults.test_space import check_manners, log_timed
from mlflow_outbox import MLflowTracker

_FAILED = re.compile(r"(\d+) +(fsync|fdatasync)\((\d+)<([^>]*)>\) += -1 EIO")
_SYNC = re.compile(r"(\d+) +(fsync|fdatasync)\((\d+)<([^>]*)>")


def log_on_failing_disk(fd: int, uri: str, outbox: str, sync: str) -> None:
    """Log while strace makes calls fail or slow; at "interval", each part while the one before it is being synced."""

    def work() -> dict[str, Any]:
        given = workload.settings(sync=sync, sync_interval=0.02, **workload.TINY)
        tracker = MLflowTracker("failing", uri, outbox_dir=outbox, worker="none", settings=given)
        run = tracker.start_run("failing")
        took: list[float] = []
        raised: list[str] = []
        for first in range(0, 60, 10):
            log_timed(fd, run, range(first, first + 10), took, raised)
            if sync == "interval":
                workload.wait_for_round(tracker)
        run.end()
        tracker.close(0)
        return {
            "raised": raised,
            "p999_ms": workload.quantile(took, 0.999),
            "max_ms": workload.quantile(took, 1.0),
            "counters": tracker.counters,
        }

    workload.reported(fd, work)


def second_syncs(trace: Path) -> list[str]:
    """Return the syncs in a trace that follow a failed one of the same file: the kernel would answer with a lie."""
    failed: set[str] = set()
    found = []
    for line in trace.read_text(errors="replace").splitlines():
        sync = _SYNC.match(line)
        if sync and sync[4].endswith(".log"):
            if sync[4] in failed:
                found.append(line)
            if _FAILED.match(line) or "EIO" in line:
                failed.add(sync[4])
    return found


@pytest.mark.needs("strace")
@pytest.mark.fault("F21", "EIO on the Nth write, fdatasync, fsync, ftruncate, mkdir or openat, once and for ever")
@pytest.mark.parametrize("sync", ["interval", "always"])
def test_an_input_output_error_at_any_call_loses_nothing_that_was_kept(
    sync: str, empty_database: Callable[[Path], Path], nest: Nest, row: Row, tmp_path: Path
) -> None:
    """No call raises, no failed descriptor is synced a second time, and what was kept arrives when the disk is well."""
    places = [
        (call, n, plus) for call in ("write", "fdatasync", "fsync", "mkdir") for n in range(1, 9) for plus in ("", "+")
    ]
    for number, (call, when, plus) in enumerate(row.sample(places, 5, 64)):
        uri = f"sqlite:///{empty_database(tmp_path / f'{number}.db')}"
        outbox = tmp_path / f"outbox{number}"
        trace = tmp_path / f"trace{number}"
        inject = f"{call}:error=EIO:when={when}{plus}"
        child = nest.traced(trace, call, inject, log_on_failing_disk, uri, str(outbox), sync)
        report = child.report()
        check_manners(row, report)
        assert [] == second_syncs(trace)
        acked = child.acked()
        lost = report["counters"].get("lost_in_memory", 0) + report["counters"].get("unsynced_not_rewritten", 0)
        after = nest.start(workload.drain, uri, str(outbox), "failing", 90_000, {}).report()
        assert 0 == after["left"]["pending"] + after["left"]["parked"] + after["left"]["dead"], after
        found = held(uri, "failing")
        there = set(found.events)
        missing = acked - there
        assert len(missing) <= lost, f"{call} {when}{plus}: {sorted(missing)} are lost, {report['counters']}"
        found.check(acked - missing, set(range(60)) | set(range(90_000, 90_010)))
        if not plus and call in {"write", "fdatasync"}:
            assert not missing, f"{call} failed once: {sorted(missing)}, {report['counters']}"
        row.done()


@pytest.mark.needs("strace")
@pytest.mark.fault("F23", "each fdatasync takes 0.2 s (2 s nightly)")
def test_a_slow_disk_is_never_waited_for(
    empty_database: Callable[[Path], Path], nest: Nest, row: Row, tmp_path: Path
) -> None:
    """At sync="interval" the background waits for the disk, a logging call does not."""
    for number in range(row.pick(1, 5, 20)):
        uri = f"sqlite:///{empty_database(tmp_path / f'{number}.db')}"
        outbox = tmp_path / f"outbox{number}"
        delay = 200_000 if row.tier == "commit" else 2_000_000
        child = nest.traced(
            tmp_path / "trace",
            "fdatasync",
            f"fdatasync:delay_enter={delay}",
            log_on_failing_disk,
            uri,
            str(outbox),
            "interval",
        )
        report = child.report()
        check_manners(row, report)
        after = nest.start(workload.drain, uri, str(outbox), f"slow{number}", 90_000, {}).report()
        assert 0 == after["left"]["pending"] + after["left"]["dead"], after
        assert set(range(60)) == child.acked()
        held(uri, "failing").check(child.acked())
        row.done()


def log_while(fd: int, uri: str, folder: str, what: str) -> None:
    """Log on a tmpfs to which something happens, then put it right, and report."""

    def work() -> dict[str, Any]:
        own_namespace()
        disk = tmpfs(Path(folder), "size=8m")
        outbox = disk / "outbox"
        given = workload.settings(sync_interval=0.02, free_bytes=0, **workload.TINY)
        tracker = MLflowTracker("changed", uri, outbox_dir=outbox, settings=given)
        path = Path(str(tracker.outbox_path))
        run = tracker.start_run("changed")
        took: list[float] = []
        raised: list[str] = []
        log_timed(fd, run, range(30), took, raised)
        tracker.flush(30)
        aside = disk / "aside"
        if what == "read-only":
            with contextlib.suppress(Exception):
                mount("-o", "remount,ro", str(disk))
        elif what == "moved away":
            os.rename(path, aside)
        elif what == "swapped":
            os.rename(path, aside)
            shutil.copytree(aside, path)
        elif what == "run removed":
            shutil.rmtree(path / "runs" / run.run_id)
        elif what == "hidden":
            tmpfs(disk / "outbox", "size=1m")
        elif what == "unmounted":
            umount(disk, "-l")
        log_timed(fd, run, range(30, 60), took, raised)
        workload.wait_for_round(tracker)
        if what == "read-only":
            mount("-o", "remount,rw", str(disk))
        elif what in {"moved away", "swapped"}:
            shutil.rmtree(path, ignore_errors=True)
            os.rename(aside, path)
        elif what == "hidden":
            umount(disk / "outbox", "-l")
        workload.wait_for_round(tracker)
        log_timed(fd, run, range(60, 70), took, raised)
        run.end()
        left = tracker.flush(20 if what != "unmounted" else 2)
        return {
            "raised": raised,
            "p999_ms": workload.quantile(took, 0.999),
            "max_ms": workload.quantile(took, 1.0),
            "left": [left.pending, left.parked, left.dead],
            "counters": tracker.counters,
        }

    workload.reported(fd, work)


@pytest.mark.needs("mounts")
@pytest.mark.fault(
    "F22", "outbox read-only, moved, swapped, hidden by a mount, unmounted, its run removed; then put right"
)
@pytest.mark.parametrize("what", ["read-only", "moved away", "swapped", "run removed", "hidden", "unmounted"])
def test_whatever_happens_to_the_directory_logging_goes_on(
    what: str, empty_database: Callable[[Path], Path], nest: Nest, row: Row, tmp_path: Path
) -> None:
    """Nothing raises or waits; when the directory is right again, what was kept arrives."""
    for number in range(row.pick(1, 10, 50)):
        uri = f"sqlite:///{empty_database(tmp_path / f'{number}.db')}"
        child = nest.start(log_while, uri, str(tmp_path / f"disk{number}"), what)
        report = child.report()
        check_manners(row, report)
        if what == "unmounted":
            held(uri, "changed").check(set(range(20)), set(range(70)))  # the disk is gone, with what was on it
        else:
            assert [0, 0, 0] == report["left"], report
            held(uri, "changed").check(child.acked())
        row.measure(what=what)
        row.done()
