"""The journal: what an append costs, and what it survives (F01, F04 to F06, F19 to F24)."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mlflow_outbox.counters import Counters
from mlflow_outbox.spool import frame
from mlflow_outbox.spool.caretaker import Caretaker
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox.spool.events import Artifact, Metric, Metrics, RunStarted, Tags, encode
from mlflow_outbox.spool.snapshot import SnapshotStore
from mlflow_outbox.testing import FailingDisk
from servers import eventually
from spools import FORKS, RUN, Everything, make_journal, make_outbox, metric

#: How often a test of signals or threads logs; enough to hit every place between two calls many times.
STORM = 3000


@pytest.fixture
def outbox(tmp_path: Path) -> OutboxDirectory:
    """An outbox of its own."""
    return make_outbox(tmp_path / "outbox")


@pytest.fixture
def disk() -> FailingDisk:
    """A disk that counts, and fails when told."""
    return FailingDisk()


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let time pass for journals: ``later(seconds)``."""
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def pass_(seconds: float) -> None:
        clock[0] += seconds

    return pass_


def read(outbox: OutboxDirectory, run: str = RUN) -> Everything:
    """Everything in a run."""
    return Everything(outbox.run(run))


# -- what an append costs


@pytest.mark.parametrize("sync", ["os", "interval"])
def test_an_append_is_one_write_and_no_sync(outbox: OutboxDirectory, disk: FailingDisk, sync: str) -> None:
    """Whatever happens in the background, the call makes one system call."""
    writer = make_journal(outbox, disk, sync=sync)
    assert writer.append(metric(0))
    before = len(disk.calls)
    for number in range(1, 101):
        assert writer.append(metric(number))
    assert ["write"] * 100 == [call.operation for call in disk.calls[before:]]
    assert list(range(101)) == read(outbox).steps


def test_at_always_each_append_is_synced_before_it_returns(outbox: OutboxDirectory, disk: FailingDisk) -> None:
    """The level's meaning, and its price."""
    writer = make_journal(outbox, disk, sync="always")
    writer.append(metric(0))
    before = len(disk.calls)
    writer.append(metric(1))
    assert ["write", "datasync"] == [call.operation for call in disk.calls[before:]]


def test_names_are_durable_before_the_first_event_at_always(outbox: OutboxDirectory, disk: FailingDisk) -> None:
    """A file whose name a power cut takes has lost its events too."""
    make_journal(outbox, disk, sync="always").append(metric(0))
    operations = [call.operation for call in disk.calls]
    assert operations.index("sync_directory") < operations.index("datasync")


def test_at_os_nothing_is_ever_synced(outbox: OutboxDirectory, disk: FailingDisk) -> None:
    """Neither by rotation nor by the background nor by close."""
    writer = make_journal(outbox, disk, sync="os", segment_bytes=1024)
    for number in range(200):
        writer.append(metric(number))
    writer.sync()
    writer.close()
    assert 0 == disk.count("datasync")
    assert disk.count("create") == disk.count("close")


def test_the_background_syncs_once_for_many_events(outbox: OutboxDirectory, disk: FailingDisk) -> None:
    """One fdatasync per round, none when nothing was added."""
    writer = make_journal(outbox, disk)
    for number in range(50):
        writer.append(metric(number))
    writer.sync()
    writer.sync()
    assert 1 == disk.count("datasync")


def test_an_append_does_not_wait_for_a_sync_that_hangs(outbox: OutboxDirectory, disk: FailingDisk) -> None:
    """F23: a disk that takes seconds to sync costs the experiment nothing."""
    writer = make_journal(outbox, disk)
    writer.append(metric(0))
    with disk.held("datasync") as entered:
        background = threading.Thread(target=writer.sync)
        background.start()
        assert entered.wait(10)
        assert all(writer.append(metric(number)) for number in range(1, 500))
        assert background.is_alive()
    background.join(10)
    assert list(range(500)) == read(outbox).steps


def test_an_event_whose_copied_file_came_too_late_for_a_sync_is_not_made_durable_by_it(
    outbox: OutboxDirectory, disk: FailingDisk
) -> None:
    """F16: a power cut before the next round takes both, or the event would name a file that is not there."""
    writer = make_journal(outbox, disk)
    store = SnapshotStore(outbox.run(RUN))
    writer.append(metric(0))
    with disk.held("datasync") as entered:
        background = threading.Thread(target=writer.sync)
        background.start()
        assert entered.wait(10)
        kept = store.add_bytes(b"late", limit=100)
        writer.sync_later(store, kept.sha256)
        assert writer.append(Artifact("late.txt", kept.sha256, kept.size, 1))
        assert writer.append(metric(2))
    background.join(10)
    assert 3 == len(read(outbox).events)
    _, unsynced = sorted(outbox.run(RUN).glob("*.log"))
    unsynced.unlink()
    assert [metric(0)] == read(outbox).events


# -- segments


def test_segments_rotate_and_keep_the_numbers(outbox: OutboxDirectory) -> None:
    """Every segment is closed, holds no more than its size and one frame, and continues the numbers."""
    writer = make_journal(outbox, segment_bytes=1024)
    for number in range(300):
        writer.append(metric(number))
    writer.close()
    files = sorted(outbox.run(RUN).glob("*.log"))
    assert len(files) > 10
    assert all(path.stat().st_size < 1024 + 100 for path in files)
    found = read(outbox)
    assert (list(range(300)), 0, [], False) == (found.steps, found.missing, found.broken, found.live)
    assert {writer.writer: 300} == found.numbers


def test_a_run_may_go_on_after_close(outbox: OutboxDirectory) -> None:
    """A later append begins a new segment under the next number."""
    writer = make_journal(outbox)
    for number in range(10):
        writer.append(metric(number))
        writer.close()
        writer.close()
    writer.sync()
    assert list(range(10)) == read(outbox).steps
    assert writer.is_idle


@pytest.mark.parametrize("size", [1, 65_534, 65_535, 65_536, frame.MAX_PAYLOAD])
def test_an_event_of_any_allowed_size_is_kept(outbox: OutboxDirectory, size: int) -> None:
    """The largest payload, and those where the frame changes its form."""
    event = Tags({"k": ""}, 1)
    event = Tags({"k": "x" * (size - len(encode(event)))}, 1)
    event = Tags({"k": "x" * (size - (len(encode(event)) - len(event.values["k"])))}, 1)
    writer = make_journal(outbox)
    assert writer.append(event)
    assert writer.append(metric(1))
    assert [event, metric(1)] == Everything(outbox.run(RUN), size=10**9).events


def test_an_event_beyond_the_largest_is_refused_and_counted(outbox: OutboxDirectory) -> None:
    """It is never written, and the next one is."""
    counters = Counters()
    writer = make_journal(outbox, counters=counters)
    assert not writer.append(Tags({"k": "x" * frame.MAX_PAYLOAD}, 1))
    assert writer.append(metric(0))
    assert 1 == counters["refused_too_large"]
    assert [0] == read(outbox).steps


def test_two_writers_of_one_run_do_not_meet(outbox: OutboxDirectory) -> None:
    """Ranks, a resumed job: each writes its own segments and has its own numbers."""
    first, second = make_journal(outbox), make_journal(outbox)
    for number in range(20):
        (first if number % 2 else second).append(metric(number))
    found = read(outbox)
    assert sorted(found.steps) == list(range(20))
    assert {first.writer: 10, second.writer: 10} == found.numbers


def test_numbers_wrap_at_two_to_the_thirty_second(outbox: OutboxDirectory) -> None:
    """Four billion events are not the end."""
    writer = make_journal(outbox)
    writer._sequence.live.seq = 2**32 - 3
    for number in range(6):
        assert writer.append(metric(number))
    writer.close()
    from mlflow_outbox.spool.window import Cursor

    found = Everything(outbox.run(RUN), {writer.writer: Cursor(0, 0, 2**32 - 3)})
    assert (list(range(6)), 0) == (found.steps, found.missing)
    assert {writer.writer: 3} == found.numbers


# -- a disk that fails


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
    disk.fail(operation, at=at)  # type: ignore[arg-type]
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
    import shutil

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


# -- a sync that fails


@pytest.mark.parametrize("sync", ["interval", "always"])
def test_a_failed_sync_is_never_repeated_on_its_descriptor(
    outbox: OutboxDirectory, disk: FailingDisk, sync: str
) -> None:
    """The segment is left, and its events are written again under their old numbers, to be delivered once."""
    counters = Counters()
    writer = make_journal(outbox, disk, sync=sync, counters=counters)
    disk.fail("datasync")
    for number in range(10):
        writer.append(metric(number))
    writer.sync()
    writer.append(metric(10))
    writer.sync()
    first, *others = [call.fd for call in disk.calls if call.operation == "datasync"]
    created = [call.operation for call in disk.calls].count("create")
    assert others
    assert 2 == created
    closes = [at for at, call in enumerate(disk.calls) if call.operation == "close" and call.fd == first]
    syncs = [at for at, call in enumerate(disk.calls) if call.operation == "datasync" and call.fd == first]
    assert all(syncs[0] < closes[0] < later_sync for later_sync in syncs[1:])
    writer.close()
    assert (list(range(11)), 0, []) == (read(outbox).steps, read(outbox).missing, read(outbox).broken)
    assert counters["rewritten_after_sync_error"] > 0


def test_rewritten_events_replace_those_that_a_power_cut_took(outbox: OutboxDirectory, disk: FailingDisk) -> None:
    """What the failed segment holds may be gone; the new one has all of it."""
    writer = make_journal(outbox, disk)
    for number in range(5):
        writer.append(metric(number))
    writer.sync()
    failed = next(outbox.run(RUN).glob("*-000000.log"))
    durable = failed.stat().st_size
    for number in range(5, 20):
        writer.append(metric(number))
    disk.fail("datasync")
    writer.sync()
    writer.append(metric(20))
    os.truncate(failed, durable)
    assert (list(range(21)), 0) == (read(outbox).steps, read(outbox).missing)


@pytest.mark.parametrize("rotations", [1, 3])
def test_a_sync_that_fails_after_rotation_loses_nothing_to_a_power_cut(
    outbox: OutboxDirectory, disk: FailingDisk, rotations: int
) -> None:
    """The segment was completed while its sync was under way; its events get a segment of their own."""
    writer = make_journal(outbox, disk, segment_bytes=2048)
    for number in range(10):
        writer.append(metric(number))
    failed = next(outbox.run(RUN).glob("*-000000.log"))
    header = frame.unpack_header(failed.read_bytes())[1]
    with disk.held("datasync", error=errno.EIO) as entered:
        background = threading.Thread(target=writer.sync)
        background.start()
        assert entered.wait(10)
        number = 10
        while writer._sequence.ordinal <= rotations:
            writer.append(metric(number))
            number += 1
    background.join(10)
    writer.close()
    writer.sync()
    os.truncate(failed, header)
    found = read(outbox)
    assert (list(range(number)), 0) == (found.steps, found.missing)


def test_a_disk_that_never_syncs_is_not_filled_with_copies(
    outbox: OutboxDirectory, disk: FailingDisk, later: Callable[[float], None]
) -> None:
    """Tries get rarer, up to one a minute; every event is there once for the reader."""
    counters = Counters()
    writer = make_journal(outbox, disk, counters=counters)
    disk.fail("datasync", times=None)
    for number in range(600):
        writer.append(metric(number))
        later(0.5)
        writer.sync()
    assert disk.count("datasync") < 20
    assert len(list(outbox.run(RUN).iterdir())) < 20
    disk.clear()
    later(61)
    writer.sync()
    writer.sync()
    assert [] == writer._sequence.live.unsynced
    assert list(range(600)) == read(outbox).steps


def test_at_always_a_disk_that_never_syncs_neither_hangs_nor_recurses(
    outbox: OutboxDirectory, disk: FailingDisk
) -> None:
    """Each call returns after at most two tries; what it could not promise is counted."""
    counters = Counters()
    writer = make_journal(outbox, disk, sync="always", segment_bytes=1024, counters=counters)
    disk.fail("datasync", times=None)
    for number in range(100):
        before = disk.count("datasync")
        assert writer.append(metric(number))
        assert disk.count("datasync") - before <= 4
    assert counters["acknowledged_unsynced"] >= 90
    assert list(range(100)) == read(outbox).steps


def test_a_failed_sync_on_a_full_disk_keeps_the_events_in_memory(outbox: OutboxDirectory, disk: FailingDisk) -> None:
    """Compound fault: what cannot be written again now waits, under its old numbers."""
    writer = make_journal(outbox, disk)
    for number in range(10):
        writer.append(metric(number))
    failed = next(outbox.run(RUN).glob("*.log"))
    disk.fail("datasync")
    disk.fail("create", error=errno.ENOSPC, times=3)
    writer.sync()
    assert 10 == writer.in_memory
    writer.append(metric(10))
    for _ in range(3):
        writer.sync()
    os.truncate(failed, frame.unpack_header(failed.read_bytes())[1])
    assert (list(range(11)), 0) == (read(outbox).steps, read(outbox).missing)


def test_the_live_segment_is_always_the_last_in_reading_order(outbox: OutboxDirectory, disk: FailingDisk) -> None:
    """After a segment that got only a header, and a rewrite of older events, the reader must not go past it."""
    writer = make_journal(outbox, disk, segment_bytes=1024)
    number = 0
    while writer._sequence.ordinal < 2:
        writer.append(metric(number))
        number += 1
    # The new segment has one event; the next is begun, and left with nothing in it.
    writer.close()
    disk.fail("write", at=2)
    writer.append(metric(number))
    disk.fail("datasync", times=3)
    writer.sync()
    reader = Everything(outbox.run(RUN))
    for more in range(number + 1, number + 40):
        writer.append(metric(more))
    later_part = Everything(outbox.run(RUN), reader.cursors)
    assert list(range(number + 40)) == reader.steps + later_part.steps
    assert 0 == later_part.missing


# -- threads, forks, signals


def test_eight_threads_share_one_sequence(outbox: OutboxDirectory) -> None:
    """F83: contiguous numbers, and each thread's events in its order."""
    writer = make_journal(outbox, segment_bytes=4096)
    start = threading.Barrier(8)

    def log(thread: int) -> None:
        start.wait()
        for number in range(500):
            assert writer.append(metric(number, f"t{thread}"))

    threads = [threading.Thread(target=log, args=(thread,)) for thread in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.close()
    found = read(outbox)
    assert (0, [], {writer.writer: 4000}) == (found.missing, found.broken, found.numbers)
    for thread in range(8):
        mine = [event.step for event in found.events if isinstance(event, Metric) and event.key == f"t{thread}"]
        assert list(range(500)) == mine


FORK = """
import os, sys, threading
sys.path[:0] = {path!r}
from spools import *
outbox = make_outbox(Path({outbox!r}))
writer = make_journal(outbox{options})
stop = threading.Event()
def log():
    number = 0
    while not stop.is_set() or number < 300:
        assert writer.append(metric(number, "thread"))
        number += 1
thread = threading.Thread(target=log)
thread.start()
for number in range(50):
    writer.append(metric(number, "before"))
children = []
for child in range(6):
    writer.append(metric(child, "fork"))
    pid = os.fork()
    if pid == 0:
        for number in range(100):
            assert writer.append(metric(number, f"child{{child}}"))
        if child % 2:
            writer.sync(); writer.close()
        if child % 3 == 0:
            os.read(gate, 1)
        os._exit(0)
    children.append(pid)
stop.set(); thread.join()
for number in range(50):
    writer.append(metric(number, "after"))
writer.close()
"""


@pytest.mark.parametrize("sync", ["interval", "always"])
@pytest.mark.parametrize("first", ["parent", "child"])
def test_a_fork_while_others_log_costs_no_event_of_either(tmp_path: Path, sync: str, first: str) -> None:
    """F05: children log on, whoever exits first; every writer's numbers are its own."""
    code = FORK.format(path=sys.path, outbox=str(tmp_path / "outbox"), options=f", sync={sync!r}, segment_bytes=2048")
    if first == "parent":
        code = "import os\ngate, end = os.pipe()\n" + code + "os._exit(0)\n"
        code = code.replace("os.read(gate, 1)", "os.close(end); os.read(gate, 1)")
    else:
        code = "import os\ngate = os.open('/dev/null', os.O_RDONLY)\n" + code
        code += "assert all(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0 for pid in children)\n"
    command = [sys.executable, *FORKS, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (0, "") == (done.returncode, done.stderr), done.stderr[-3000:]
    folder = make_outbox(tmp_path / "outbox").run(RUN)

    def complete() -> bool:
        found = Everything(folder)
        steps: dict[str, list[int]] = {}
        for event in found.events:
            assert isinstance(event, Metric)
            steps.setdefault(event.key, []).append(event.step)
        assert (0, []) == (found.missing, found.broken)
        assert list(range(50)) == steps["before"] == steps["after"]
        assert list(range(6)) == steps["fork"]
        assert list(range(len(steps["thread"]))) == steps["thread"]
        return all(list(range(100)) == steps.get(f"child{child}") for child in range(6)) and not found.live

    eventually(complete)


SIGNALS = """
import random, signal, sys
sys.path[:0] = {path!r}
from spools import *
from mlflow_outbox.counters import Counters
outbox = make_outbox(Path({outbox!r}))
writer = make_journal(outbox, segment_bytes=2048{options})
chance = random.Random({seed})
{setup}
stopped = []
def arm():
    if not stopped: signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.00002, 0.0003))
writer.append(metric(0, "begin"))
signal.signal(signal.SIGALRM, handler)
{loop}
stopped.append(True)
signal.setitimer(signal.ITIMER_REAL, 0)
writer.append(metric(0, "end"))
writer.sync()
writer.close()
found = Everything(outbox.run(RUN))
steps = {{}}
for event in found.events:
    steps.setdefault(event.key, []).append(event.step)
assert (0, []) == (found.missing, found.broken), (found.missing, found.broken)
assert [0] == steps.pop("begin") == steps.pop("end")
{check}
"""


@pytest.mark.parametrize("sync", ["os", "interval", "always"])
def test_a_signal_handler_may_log_in_the_middle_of_an_append(tmp_path: Path, sync: str) -> None:
    """A storm of signals, each of which logs: no deadlock, nothing lost, nothing twice."""
    code = SIGNALS.format(
        path=sys.path,
        outbox=str(tmp_path / "outbox"),
        options=f", sync={sync!r}",
        seed=1,
        setup="""
logged = [0]
def handler(*_):
    assert writer.append(metric(logged[0], "handler"))
    logged[0] += 1
    arm()
""",
        loop=f"""
arm()
for number in range({STORM}):
    assert writer.append(metric(number))
    if number % 100 == 0:
        writer.sync()
""",
        check=f"""
assert list(range({STORM})) == steps["loss"]
assert sorted(range(logged[0])) == sorted(steps["handler"])
assert logged[0] > 20
""",
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (0, "") == (done.returncode, done.stderr), done.stderr[-3000:]


@pytest.mark.parametrize("error", ["KeyboardInterrupt()", "TimeoutError()", "BrokenPipeError(32, 'pipe')"])
@pytest.mark.parametrize(("sync", "full"), [("os", False), ("interval", False), ("interval", True), ("always", False)])
def test_an_exception_in_the_middle_of_an_append_neither_doubles_nor_loses_an_event(
    tmp_path: Path, error: str, sync: str, full: bool
) -> None:
    """A storm of signals that raise: what was acknowledged is there once, what was not at most once, in order."""
    code = SIGNALS.format(
        path=sys.path,
        outbox=str(tmp_path / "outbox"),
        options=f", sync={sync!r}"
        + ", disk=disk" * full,  # the real disk where it need not fail: fewer places to interrupt
        seed=2,
        setup=f"""
error = {error}
def handler(*_):
    signal.setitimer(signal.ITIMER_REAL, 0)
    raise error
""",
        loop=f"""
import errno
acknowledged = []
interrupted = 0
numbers = iter(range({STORM}))
def storm():  # a function, for Python 3.13.0 takes the jump at the end of a loop out of the "try" around it
    for number in numbers:
        if {full} and number % 50 == 0:
            disk.fail("write", error=errno.ENOSPC, times=3)
            disk.fail("write", short=7, at=3)
            writer._sequence._try_again = 0.0
        if number % 3 == 0:
            arm()
        if writer.append(metric(number)):
            acknowledged.append(number)
        if number % 100 == 0:
            writer.sync()
    signal.setitimer(signal.ITIMER_REAL, 0)  # here, where what it raises is still caught
while True:
    try:
        storm()
        break
    except type(error):
        interrupted += 1
disk.clear()
""",
        check=f"""
found = steps["loss"]
assert sorted(set(found)) == found, "doubled, or out of order"
assert set(acknowledged) <= set(found), sorted(set(acknowledged) - set(found))
assert interrupted > 5 and len(acknowledged) > 1000, (interrupted, len(acknowledged))
import threading
other = threading.Thread(target=lambda: writer.append(metric(1)))
other.start(); other.join(10)
assert not other.is_alive(), "the lock was left held"
import os
left = [os.readlink(f"/proc/self/fd/{{fd}}") for fd in range(3, 2000) if os.path.exists(f"/proc/self/fd/{{fd}}")]
written = [path for path in left if path.endswith(".log") and os.path.getsize(path)]
assert {full} or len(written) <= 2 + interrupted // 20, "descriptors of segments leak"  # those that no name had yet
""",
    ).replace(
        "writer = make_journal",
        "from mlflow_outbox.testing import FailingDisk\ndisk = FailingDisk()\nwriter = make_journal",
        1,
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert 0 == done.returncode, done.stderr[-2000:]


def test_an_object_may_log_when_it_is_collected_in_the_middle_of_an_append(outbox: OutboxDirectory) -> None:
    """F06: a ``__del__`` runs wherever memory is allocated."""
    writer = make_journal(outbox)
    collected = []

    class Noisy:
        def __init__(self, number: int) -> None:
            self.number = number
            self.me = self

        def __del__(self) -> None:
            assert writer.append(metric(self.number, "del"))
            collected.append(self.number)

    import gc

    threshold = gc.get_threshold()
    gc.set_threshold(5, 2, 2)
    try:
        for number in range(500):
            Noisy(number)
            assert writer.append(metric(number))
    finally:
        gc.set_threshold(*threshold)
    gc.collect()
    writer.close()
    found = read(outbox)
    by_key = {key: [e.step for e in found.events if isinstance(e, Metric) and e.key == key] for key in ("loss", "del")}
    assert list(range(500)) == by_key["loss"]
    assert sorted(collected) == sorted(by_key["del"]) == list(range(500))
    assert 0 == found.missing


def test_logging_at_the_exit_of_the_interpreter_is_kept(tmp_path: Path) -> None:
    """F06: from atexit, from a module's ``__del__``, when no thread can be started any more."""
    code = f"""
import atexit, sys
sys.path[:0] = {sys.path!r}
from spools import *
from mlflow_outbox.spool.caretaker import Caretaker
from mlflow_outbox.counters import Counters
outbox = make_outbox(Path({str(tmp_path / "outbox")!r}))
elsewhere = {{}}  # a function of this module would keep all of it alive until after its own end
exec("def wake(): raise ImportError('sys.meta_path is None, Python is likely shutting down')", elsewhere)
writer = make_journal(outbox, registry=Caretaker(0.01, Counters()), wake=elsewhere.pop("wake"))
class Last:
    def __del__(self, writer=writer, event=metric(2)):
        writer.append(event)
last = Last()
atexit.register(lambda: writer.append(metric(1)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert 0 == done.returncode, done.stderr
    assert {1, 2} == set(Everything(make_outbox(tmp_path / "outbox").run(RUN)).steps)


# -- the refusal of a full outbox, and the background


def test_a_full_outbox_refuses_until_there_is_room(outbox: OutboxDirectory) -> None:
    """Refusals are counted and told to the caller; logging goes on by itself."""
    reason: list[str | None] = [None]
    counters = Counters()
    writer = make_journal(outbox, counters=counters, refuse=lambda: reason[0])
    assert writer.append(metric(0))
    reason[0] = "full"
    writer.sync()
    assert not writer.append(metric(1))
    reason[0] = None
    assert writer.append(metric(2))
    assert (1, [0, 2]) == (counters["refused_full"], read(outbox).steps)


@pytest.fixture
def caretaker() -> Iterator[Caretaker]:
    """A caretaker with very short rounds."""
    caretaker = Caretaker(0.002, Counters())
    yield caretaker
    caretaker.stop()


def sync_threads() -> list[threading.Thread]:
    """The caretakers' threads of this process."""
    return [thread for thread in threading.enumerate() if thread.name == "mlflow-outbox-sync"]


def test_the_background_starts_with_the_first_event_and_ends_when_idle(
    outbox: OutboxDirectory, caretaker: Caretaker, disk: FailingDisk
) -> None:
    """One thread however many journals; none when all are closed and clean; a new one afterwards."""
    before = set(sync_threads())
    writers = [make_journal(outbox, disk, run=letter * 32, registry=caretaker) for letter in "bcd"]
    assert before == set(sync_threads())
    for round_ in range(2):
        for writer in writers:
            writer.append(metric(round_))
        assert 1 == len(set(sync_threads()) - before)
        eventually(lambda: all(not writer._sequence.live.unsynced for writer in writers), message="all synced")
        for writer in writers:
            writer.close()
        eventually(lambda: before == set(sync_threads()), message="the thread ends")
    assert all(writer.is_idle for writer in writers)
    assert disk.count("create") == disk.count("close")


def test_the_background_works_in_a_forked_child(tmp_path: Path) -> None:
    """F05: the thread stays in the parent; the child starts its own."""
    code = f"""
import os, sys, threading
sys.path[:0] = {sys.path!r}
from servers import eventually
from spools import *
from mlflow_outbox.spool.caretaker import Caretaker
from mlflow_outbox.counters import Counters
from mlflow_outbox.testing import FailingDisk
outbox = make_outbox(Path({str(tmp_path / "outbox")!r}))
disk = FailingDisk()
writer = make_journal(outbox, disk, registry=Caretaker(0.005, Counters()))
writer.append(metric(0))
pid = os.fork()
if pid == 0:
    disk.calls.clear()
    writer.append(metric(1))
    eventually(lambda: disk.count("datasync"))
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
writer.append(metric(2))
eventually(lambda: not writer._sequence.live.unsynced)
"""
    done = subprocess.run([sys.executable, *FORKS, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (0, "") == (done.returncode, done.stderr), done.stderr[-3000:]


def test_the_background_goes_on_when_one_journal_makes_trouble(
    outbox: OutboxDirectory, caretaker: Caretaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F08: an unexpected error of one is counted, and the others are synced."""
    bad, good = make_journal(outbox, run="b" * 32, registry=caretaker), make_journal(outbox, registry=caretaker)
    monkeypatch.setattr(bad, "sync", lambda: 1 / 0)
    bad.append(metric(0))
    good.append(metric(0))
    eventually(lambda: not good._sequence.live.unsynced and caretaker._counters["caretaker_errors"])


def test_a_journal_leaks_no_descriptor(outbox: OutboxDirectory) -> None:
    """F24: many runs, opened and closed."""
    before = len(os.listdir("/proc/self/fd"))
    for number in range(50):
        writer = make_journal(outbox, run=f"{number:032d}", segment_bytes=1024)
        for step in range(50):
            writer.append(metric(step))
        writer.close()
    assert before == len(os.listdir("/proc/self/fd"))


def test_running_out_of_descriptors_costs_no_event(outbox: OutboxDirectory) -> None:
    """F24: EMFILE is a disk error like any other."""
    writer = make_journal(outbox)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        kept = writer.append(metric(0))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    writer.sync()
    assert (True, [0]) == (kept, read(outbox).steps)


def test_a_repr_tells_the_state(outbox: OutboxDirectory) -> None:
    """For people who print a journal."""
    writer = make_journal(outbox)
    assert "closed" in repr(writer)
    writer.append(RunStarted(1))
    writer.append(Metrics({"a": 1.0}, 1, 1))
    assert "2 events" in repr(writer)
