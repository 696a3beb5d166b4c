"""Disks that fail: EIO on the Nth call, a slow fsync, directories that vanish or become read-only."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from faults import manners, workload
from faults.children import Child, Nest
from faults.mounts import mount, own_namespace, tmpfs, umount
from faults.oracle import held
from faults.table import Row
from faults.test_space import check_manners, log_timed
from mlflow_outbox import MLflowTracker
from servers import eventually

_FAILED = re.compile(r"(\d+) +(fsync|fdatasync)\((\d+)<([^>]*)>\) += -1 EIO")
_CALL = re.compile(r"(\d+) +(\w+)\(")
_SYNC = re.compile(r"(\d+) +(fsync|fdatasync)\((\d+)<([^>]*)>")

#: What is logged and delivered in one thread: one of them is an artifact, one a param that may be given another value.
EVENTS = range(40, 52)
PARAM = 43


def log_on_failing_disk(fd: int, uri: str, outbox: str, sync: str) -> None:
    """Log while strace makes calls fail or slow; at "interval", each part while the one before it is being synced."""

    def work() -> dict[str, Any]:
        given = workload.settings(sync=sync, sync_interval=0.02, **workload.TINY)
        if sync == "always":
            manners.excuse_syncs()
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


def deliver_on_failing_disk(fd: int, uri: str, outbox: str, conflicting: bool, seconds: float) -> None:
    """Log while strace makes calls fail, and deliver in the same thread; report whether all was delivered in time."""

    def work() -> dict[str, Any]:
        given = workload.settings(sync="always", retention=0.0, poll_interval=0.001, **workload.TINY)
        manners.excuse_syncs()
        tracker = MLflowTracker("failing", uri, outbox_dir=outbox, worker="none", settings=given)
        took: list[float] = []
        raised: list[str] = []
        run = tracker.start_run("failing")
        log_timed(fd, run, EVENTS, took, raised)
        conflict = conflicting and run.log_params({f"p{PARAM}": "another value"})
        run.end()
        tracker.close(0)
        delivered = False
        for _ in range(2):  # where the disk failed once, the outbox can be opened the second time
            with contextlib.suppress(OSError):
                delivered = workload.deliver(tracker, given, workload.is_sent, seconds=seconds)
                if delivered and not conflicting:
                    delivered = workload.deliver(tracker, given, workload.is_reclaimed, seconds=seconds)
                break
        return {
            "raised": raised,
            "p999_ms": workload.quantile(took, 0.999),
            "max_ms": workload.quantile(took, 1.0),
            "counters": tracker.counters,
            "conflict": conflict,
            "delivered": delivered,
        }

    workload.reported(fd, work)


def places_of(trace: Path, folder: str = "") -> list[tuple[str, int]]:
    """Return the calls in a trace that name a folder: each one's name, and its ordinal in its thread, as in strace."""
    counts: Counter[tuple[str, str]] = Counter()
    found = set()
    for line in trace.read_text(errors="replace").splitlines():
        call = _CALL.match(line)
        if call:
            counts[call[1], call[2]] += 1
            if folder in line:
                found.add((call[2], counts[call[1], call[2]]))
    return sorted(found)


def failed(trace: Path) -> bool:
    """Return whether a call failed as was asked for."""
    return "(INJECTED)" in trace.read_text(errors="replace")


class Disk:
    """What comes of a program on a disk that fails, and of the next one on the same outbox.

    Args:
        nest: starts programs.
        row: gets what was measured.
        folder: for the outbox, the store and the trace.
        database: makes a store.
    """

    def __init__(self, nest: Nest, row: Row, folder: Path, database: Callable[[Path], Path]) -> None:
        folder.mkdir()
        self._nest, self._row = nest, row
        self.uri = f"sqlite:///{database(folder / 'mlflow.db')}"
        self.outbox, self.trace = folder / "outbox", folder / "trace"

    def run(self, calls: str, inject: str, target: Callable[..., object], *given: Any, ledger: bool = False) -> Child:
        """Run a program to its end; with ``ledger`` only what is done to the ledger's files is traced and fails."""
        delivery = workload.directory_of(self.outbox, self.uri) / "delivery"
        only = [delivery / f"cache.db{end}" for end in ("", "-wal", "-shm", "-journal")] if ledger else []
        child = self._nest.traced(self.trace, calls, inject, target, self.uri, str(self.outbox), *given, only=only)
        child.join()
        return child

    def check(self, child: Child, numbers: range) -> set[int]:
        """Check how it behaved, and what the store holds after the next program; return what was lost, and counted."""
        report = child.report()
        check_manners(self._row, report)
        assert [] == second_syncs(self.trace)
        after = self._nest.start(workload.drain, self.uri, str(self.outbox), "failing", 90_000, {}).report()
        assert (0, 0) == (after["left"]["pending"], after["left"]["parked"]), after
        assert int(report.get("conflict", False)) == after["left"]["dead"], (report, after)
        assert after["left"]["dead"] == len(workload.letters_of(self.outbox, self.uri)), after
        fresh = set(after["acked"])
        assert set(range(90_000, 90_010)) == fresh, after
        found = held(self.uri, "failing")
        missing = child.acked() - set(found.events)
        counted = report["counters"]
        lost = counted.get("lost_in_memory", 0) + counted.get("unsynced_not_rewritten", 0)
        assert len(missing) <= lost, f"{sorted(missing)} are lost, {counted}"
        found.check((child.acked() - missing) | fresh, set(numbers) | fresh)
        return missing


@pytest.mark.needs("strace")
@pytest.mark.fault("F21", "EIO on the Nth fdatasync, fsync, write, mkdir, openat, link, unlink, once and for ever")
@pytest.mark.parametrize("sync", ["interval", "always"])
def test_an_input_output_error_at_any_call_loses_nothing_that_was_kept(
    sync: str, empty_database: Callable[[Path], Path], nest: Nest, row: Row, rng: random.Random, tmp_path: Path
) -> None:
    """No call raises, no failed descriptor is synced a second time, and what was kept arrives when the disk is well."""
    calls = ("fdatasync", "fsync", "write", "mkdir", "openat", "link", "unlink")
    whole = Disk(nest, row, tmp_path / "whole", empty_database)
    whole.check(whole.run(",".join(calls), "", log_on_failing_disk, sync), range(60))
    some = [calls[0], *rng.sample(calls[1:], 3 if row.tier == "commit" else len(calls) - 1)]
    for number, (call, when, plus) in enumerate(chosen(whole, row, rng, some, 1, 8, 64)):
        disk = Disk(nest, row, tmp_path / str(number), empty_database)
        child = disk.run(call, f"{call}:error=EIO:when={when}{plus}", log_on_failing_disk, sync)
        missing = disk.check(child, range(60))
        if not plus and call in {"write", "fdatasync"}:
            assert set() == missing, f"{call} failed once"
        row.done(int(failed(disk.trace)))
    assert row.times > 0


def chosen(
    whole: Disk, row: Row, rng: random.Random, calls: Sequence[str], *counts: int
) -> Iterator[tuple[str, int, str]]:
    """Return so many places of each call that are in a clean trace: the call, its ordinal, and "+" for ever after.

    What Python reads and opens for itself is no disk of ours: such a call fails once only.
    """
    places = places_of(whole.trace, str(whole.outbox))
    for call in calls:
        ends = ("",) if call in {"openat", "read"} else ("", "+")
        of_call = [(call, when, plus) for name, when in places for plus in ends if name == call]
        assert of_call, f"{call} is never called"
        yield from rng.sample(of_call, min(len(of_call), row.pick(*counts)))


@pytest.mark.needs("strace")
@pytest.mark.fault("F21", "EIO on the Nth rename, unlink, link, read and others of a worker's, once and for ever")
def test_an_input_output_error_at_any_call_of_a_worker_holds_up_nothing_for_long(
    empty_database: Callable[[Path], Path],
    nest: Nest,
    row: Row,
    rng: random.Random,
    fault_seed: str | None,
    tmp_path: Path,
) -> None:
    """A call that failed once is made again by the same worker; what failed for ever the next one does."""
    calls = ("rename", "unlink", "unlinkat", "rmdir", "link", "ftruncate", "openat", "read", "mkdir", "fsync", "write")
    whole = Disk(nest, row, tmp_path / "whole", empty_database)
    first = whole.run(",".join(calls), "", deliver_on_failing_disk, False, 30.0)
    assert set() == whole.check(first, EVENTS)
    assert first.report()["delivered"]
    some = rng.sample(calls, 5 if row.tier == "commit" else len(calls))
    every = 4 if fault_seed else 10_000  # a kept seed says which few they were
    for number, (call, when, plus) in enumerate(chosen(whole, row, rng, some, 1, every, every)):
        disk = Disk(nest, row, tmp_path / str(number), empty_database)
        inject = f"{call}:error=EIO:when={when}{plus}"
        child = disk.run(call, inject, deliver_on_failing_disk, False, 2.0 if plus else 30.0)
        missing = disk.check(child, EVENTS)
        if not plus:
            assert set() == missing, inject
            assert child.report()["delivered"], inject
        row.done(int(failed(disk.trace)))
    assert row.times > 0


@pytest.mark.needs("strace")
@pytest.mark.fault("F33", "EIO on the Nth pwrite64 and fdatasync of the ledger: record, acknowledge, dead letter")
def test_a_ledger_that_cannot_be_written_is_written_later(
    empty_database: Callable[[Path], Path],
    nest: Nest,
    row: Row,
    rng: random.Random,
    fault_seed: str | None,
    tmp_path: Path,
) -> None:
    """After one failure the same worker records all; after endless ones the next; one event becomes a dead letter."""
    calls = "pwrite64,fdatasync"
    whole = Disk(nest, row, tmp_path / "whole", empty_database)
    first = whole.run(calls, "", deliver_on_failing_disk, True, 30.0, ledger=True)
    assert set() == whole.check(first, EVENTS)
    assert first.report()["delivered"]
    places = [(call, when, plus) for call, when in places_of(whole.trace) for plus in ("", "+")]
    some = row.pick(4, 60 if fault_seed else len(places), len(places))
    for number, (call, when, plus) in enumerate(rng.sample(places, min(len(places), some))):
        disk = Disk(nest, row, tmp_path / str(number), empty_database)
        inject = f"{call}:error=EIO:when={when}{plus}"
        child = disk.run(call, inject, deliver_on_failing_disk, True, 1.0 if plus else 30.0, ledger=True)
        assert set() == disk.check(child, EVENTS), inject
        assert plus or child.report()["delivered"], inject
        row.done(int(failed(disk.trace)))
    assert row.times > 0
    row.measure(places=len(places))


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
        assert [0, 0, 0] == [after["left"][k] for k in ("pending", "parked", "dead")], after
        assert set(range(60)) == child.acked()
        held(uri, "failing").check(child.acked())
        assert set(range(90_000, 90_010)) == set(after["acked"])
        held(uri, f"slow{number}").check(set(after["acked"]))
        row.done()


def put_back(aside: Path, path: Path) -> bool:
    """Put a directory back to its place; return False when somebody has written to what was there in the meantime."""
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        os.rename(aside, path)
    return not aside.exists()


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
        before = tracker.flush(30)
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
            eventually(lambda: put_back(aside, path))
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
            "before": [before.pending, before.parked, before.dead],
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
        assert [0, 0, 0] == report["before"], report
        if what == "unmounted":
            held(uri, "changed").check(set(range(30)), set(range(70)))  # the disk is gone, with what was on it
        else:
            assert [0, 0, 0] == report["left"], report
            held(uri, "changed").check(child.acked())
        row.measure(what=what)
        row.done()
