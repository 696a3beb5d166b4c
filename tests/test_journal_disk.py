"""The journal on a disk that fails: events wait in memory, in order, and none vanishes without a word (F19 to F22)."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mlflow_outbox.counters import Counters
from mlflow_outbox.spool import notices
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox.spool.events import encode
from mlflow_outbox.testing import FailingDisk
from spools import RUN, make_journal, metric, read


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG])
def test_events_wait_in_memory_while_the_disk_refuses_and_arrive_in_order(
    outbox: OutboxDirectory, disk: FailingDisk, later: Callable[[float], None], error: int
) -> None:
    """F19 to F21: no call raises, order is kept, and one good round writes all of them."""
    counters = Counters()
    writer = make_journal(outbox, disk, counters=counters)
    for number in range(10):
        writer.append(metric(number))
    disk.fail("write", error=error, times=None)
    assert all(writer.append(metric(number)) for number in range(10, 30))
    assert 20 == writer.in_memory
    later(1)
    assert writer.append(metric(30))
    disk.clear()
    writer.sync()
    assert 0 == writer.in_memory
    writer.append(metric(31))
    writer.close()
    found = read(outbox)
    assert (list(range(32)), 0, []) == (found.steps, found.missing, found.broken)
    assert counters["disk_errors"] > 0


def test_a_power_cut_of_a_failing_disk_takes_nothing_below_the_directory(
    outbox: OutboxDirectory, disk: FailingDisk
) -> None:
    """A run's copied files lie there, in a directory of their own: they are made on the machine's disk."""
    writer = make_journal(outbox, disk)
    assert writer.append(metric(0))
    writer.sync()
    assert writer.append(metric(1))
    copy = outbox.run(RUN) / "files" / "copy"
    copy.parent.mkdir(mode=0o700, exist_ok=True)
    copy.write_bytes(b"content")
    disk.cut_power(outbox.run(RUN))
    assert [0] == read(outbox).steps
    assert b"content" == copy.read_bytes()


def test_a_call_tries_the_disk_again_by_itself(
    outbox: OutboxDirectory, disk: FailingDisk, later: Callable[[float], None]
) -> None:
    """Without any background thread the events get out, at most every 50 ms."""
    writer = make_journal(outbox, disk)
    writer.append(metric(0))
    disk.fail("write", error=errno.ENOSPC)
    writer.append(metric(1))
    writer.append(metric(2))
    assert 2 == writer.in_memory
    later(0.06)
    writer.append(metric(3))
    assert (0, [0, 1, 2, 3]) == (writer.in_memory, read(outbox).steps)


@pytest.mark.parametrize("size", [0, 1, 9, 20, 35])
def test_a_short_write_leaves_no_torn_frame(outbox: OutboxDirectory, disk: FailingDisk, size: int) -> None:
    """F19: the file is cut back to the frame before, and the event waits."""
    writer = make_journal(outbox, disk)
    writer.append(metric(0))
    disk.fail("write", short=size)
    assert writer.append(metric(1))
    assert 1 == writer.in_memory
    writer.sync()
    writer.append(metric(2))
    writer.close()
    found = read(outbox)
    assert ([0, 1, 2], [], 0) == (found.steps, found.broken, found.missing)


def test_a_short_write_that_cannot_be_cut_back_costs_no_event(outbox: OutboxDirectory, disk: FailingDisk) -> None:
    """The torn bytes stay and are reported; the segment is left."""
    counters = Counters()
    writer = make_journal(outbox, disk, counters=counters)
    writer.append(metric(0))
    disk.fail("write", short=12)
    disk.fail("truncate", error=errno.EIO)
    writer.append(metric(1))
    writer.sync()
    writer.append(metric(2))
    writer.close()
    found = read(outbox)
    assert ([0, 1, 2], 0, 1) == (found.steps, found.missing, counters["torn_frames_left"])
    assert [("torn", 12)] == [(broken.kind, broken.end - broken.start) for broken in found.broken]


@pytest.mark.parametrize("at", range(1, 12))
@pytest.mark.parametrize("operation", ["write", "create", "datasync", "truncate", "close", "sync_directory"])
@pytest.mark.parametrize("sync", ["interval", "always"])
def test_any_call_may_fail_once_and_no_event_is_lost(
    outbox: OutboxDirectory, disk: FailingDisk, operation: str, at: int, sync: str
) -> None:
    """F21: the N-th call of each kind fails, for all N of a workload with rotation."""
    writer = make_journal(outbox, disk, sync=sync, segment_bytes=1024)
    disk.fail(operation, at=at)  # type: ignore[arg-type]  # one of its operations
    for number in range(60):
        assert writer.append(metric(number))
        if number % 20 == 0:
            writer.sync()
    writer.sync()
    writer.close()
    writer.sync()
    found = read(outbox)
    assert (list(range(60)), 0, []) == (found.steps, found.missing, found.broken)
    assert writer.is_idle


def test_a_full_memory_refuses_the_newest_and_counts_them(outbox: OutboxDirectory, disk: FailingDisk) -> None:
    """The bound holds, the old are kept, and what is refused is told to the caller."""
    counters = Counters()
    size = len(encode(metric(1000)))
    writer = make_journal(outbox, disk, memory_bytes=10 * size, counters=counters)
    disk.fail("create", error=errno.ENOSPC, times=None)
    kept = [writer.append(metric(number)) for number in range(1000, 1030)]
    assert [True] * 10 + [False] * 20 == kept
    assert 20 == counters["refused_disk"]
    disk.clear()
    writer.sync()
    assert list(range(1000, 1010)) == read(outbox).steps


def test_a_full_disk_is_not_filled_with_headers(
    outbox: OutboxDirectory, disk: FailingDisk, later: Callable[[float], None]
) -> None:
    """Tries at a full disk make no new segments."""
    writer = make_journal(outbox, disk)
    writer.append(metric(0))
    for error in (errno.ENOSPC, errno.EDQUOT):
        disk.fail("write", error=error, times=None)
        for number in range(20):
            writer.append(metric(number))
            later(0.1)
            writer.sync()
        disk.clear()
    assert 1 == len(list(outbox.run(RUN).iterdir()))


def test_what_the_disk_never_took_is_counted_at_the_end(outbox: OutboxDirectory, disk: FailingDisk) -> None:
    """I7: nothing vanishes without a word."""
    counters = Counters()
    writer = make_journal(outbox, disk, counters=counters)
    disk.fail("create", times=None)
    for number in range(5):
        writer.append(metric(number))
    writer.close()
    writer.release()
    assert 5 == counters["lost_in_memory"]


def test_a_segment_that_waits_for_the_disk_at_close_is_closed_later(outbox: OutboxDirectory, disk: FailingDisk) -> None:
    """A run that ended while the disk was full is complete as soon as there is room."""
    writer = make_journal(outbox, disk)
    writer.append(metric(0))
    disk.fail("write", error=errno.ENOSPC, times=None)
    writer.append(metric(1))
    writer.close()
    assert not writer.is_idle
    disk.clear()
    writer.sync()
    assert writer.is_idle
    found = read(outbox)
    assert ([0, 1], False) == (found.steps, found.live)


@pytest.mark.parametrize("what", ["segment", "run", "outbox"])
def test_a_removed_file_or_directory_does_not_stop_logging(
    outbox: OutboxDirectory, later: Callable[[float], None], what: str
) -> None:
    """F22: a new segment is begun, with what was not yet synced; without an outbox events wait in memory."""
    counters = Counters()
    writer = make_journal(outbox, counters=counters)
    for number in range(5):
        writer.append(metric(number))
    if what == "segment":
        next(outbox.run(RUN).glob("*.log")).unlink()
    else:
        shutil.rmtree(outbox.run(RUN) if what == "run" else outbox.path)
    writer.sync()
    writer.append(metric(5))
    if what == "outbox":
        assert 6 == writer.in_memory
        later(1)
        assert writer.append(metric(6))
        return
    assert 1 == counters["segments_removed"]
    assert list(range(6)) == read(outbox).steps


@pytest.mark.parametrize(("sync", "gone"), [("interval", 0), ("always", 5)])
def test_a_segment_that_was_removed_and_then_filled_up_loses_only_what_was_durable_before(
    outbox: OutboxDirectory, sync: str, gone: int
) -> None:
    """F22: it is left before the next one begins, whether the background has looked after it by then or not."""
    counters = Counters()
    writer = make_journal(outbox, sync=sync, segment_bytes=1024, counters=counters)
    for number in range(5):
        writer.append(metric(number))
    shutil.rmtree(outbox.run(RUN))
    for number in range(5, 60):
        writer.append(metric(number))
    assert 1 == counters["segments_removed"]
    assert len(list(outbox.run(RUN).glob("*.log"))) > 1
    writer.sync()
    writer.append(metric(60))
    writer.close()
    assert list(range(gone, 61)) == read(outbox).steps


def test_a_segment_that_was_removed_before_the_end_is_written_again(outbox: OutboxDirectory) -> None:
    """F22: closing is the last look at it."""
    counters = Counters()
    writer = make_journal(outbox, counters=counters)
    for number in range(5):
        writer.append(metric(number))
    shutil.rmtree(outbox.run(RUN))
    writer.close()
    found = read(outbox)
    assert (list(range(5)), False) == (found.steps, found.live)
    assert 1 == counters["segments_removed"]


@pytest.mark.parametrize("end", ["full", "closed"])
def test_a_removed_segment_that_ends_before_it_is_missed_costs_no_event(outbox: OutboxDirectory, end: str) -> None:
    """F22: what went to it and was not yet synced is written again, before what comes next."""
    counters = Counters()
    writer = make_journal(outbox, counters=counters, segment_bytes=1024)
    for number in range(5):
        writer.append(metric(number))
    shutil.rmtree(outbox.run(RUN))
    last = 60 if end == "full" else 6
    for number in range(5, last):
        assert writer.append(metric(number))
    if end == "closed":
        writer.close()
    writer.sync()
    assert 1 == counters["segments_removed"]
    found = read(outbox)
    assert (list(range(last)), 0) == (found.steps, found.missing)


def test_a_replaced_outbox_gets_no_event(outbox: OutboxDirectory, tmp_path: Path) -> None:
    """F22: another directory in the outbox's place is not written to."""
    writer = make_journal(outbox)
    outbox.path.rename(tmp_path / "moved")
    outbox.path.mkdir(mode=0o700)
    assert writer.append(metric(0))
    assert 1 == writer.in_memory
    assert [] == list(outbox.path.iterdir())


def test_a_real_limit_on_file_sizes_costs_no_event(tmp_path: Path) -> None:
    """F19: RLIMIT_FSIZE gives a short write, then EFBIG; the journal goes on in the next segment."""
    code = f"""
import resource, sys
sys.path[:0] = {sys.path!r}
from spools import *
outbox = make_outbox(Path({str(tmp_path / "outbox")!r}))
resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
writer = make_journal(outbox)
for number in range(200):
    assert writer.append(metric(number))
    writer._sequence._try_again = 0.0
writer.sync()
assert writer.in_memory == 0, writer
writer.close()
found = Everything(outbox.run(RUN))
assert list(range(200)) == found.steps, found.steps
assert (0, []) == (found.missing, found.broken)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (0, "") == (done.returncode, done.stderr.replace(_warning(done.stderr), ""))


def _warning(text: str) -> str:
    return text if all(line.startswith("mlflow-outbox: ") for line in text.splitlines()) else ""


def test_a_segment_of_which_no_worker_could_be_told_is_told_once_more(
    outbox: OutboxDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that rests from then on would be found at the next look at all runs."""
    monkeypatch.setattr(notices, "_TELL_AGAIN", 0.0)
    ring, failures = OutboxDirectory.ring, [OSError(errno.ENOSPC, "no room")]

    def fail_once(directory: OutboxDirectory, run_id: str) -> None:
        if failures:
            raise failures.pop()
        ring(directory, run_id)

    monkeypatch.setattr(OutboxDirectory, "ring", fail_once)
    writer = make_journal(outbox)
    assert writer.append(metric(0))
    assert ([], (set(), 0)) == (failures, outbox.rung(0))
    writer.sync()
    rung = outbox.rung(0)
    assert rung is not None
    assert {RUN} == rung[0]
    writer.sync()
    assert rung == outbox.rung(0)
