"""The journal: what an append costs, how segments follow each other, and what runs out."""

from __future__ import annotations

import os
import resource
import threading

import pytest

from mlflow_outbox.counters import Counters
from mlflow_outbox.spool import frame
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox.spool.events import Artifact, Metrics, RunStarted, Tags, encode
from mlflow_outbox.spool.snapshot import Hold, SnapshotStore
from mlflow_outbox.testing import FailingDisk
from spools import RUN, Everything, make_journal, metric, read

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
        assert entered.wait(60)
        assert all(writer.append(metric(number)) for number in range(1, 500))
        assert background.is_alive()
    background.join(60)
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
        assert entered.wait(60)
        kept = store.add_bytes(b"late", limit=100)
        writer.sync_later(store, kept.sha256)
        assert writer.append(Artifact("late.txt", kept.sha256, kept.size, 1))
        assert writer.append(metric(2))
    background.join(60)
    assert 3 == len(read(outbox).events)
    _, unsynced = sorted(outbox.run(RUN).glob("*.log"))
    unsynced.unlink()
    assert [metric(0)] == read(outbox).events


class _Taken(list[Hold]):
    """Holds of which another thread takes the last one right after somebody has looked whether there is one."""

    def __bool__(self) -> bool:
        found = len(self) > 0
        self.clear()
        return found


def test_a_hold_that_another_thread_lets_go_of_meanwhile_ends_no_call(outbox: OutboxDirectory) -> None:
    """The background's round does it too, as soon as the disk has taken what waited in memory."""
    writer = make_journal(outbox)
    writer.append(metric(0))
    writer._holds = _Taken([Hold(outbox.run(RUN) / "files", -1)])
    writer.close()
    assert [0] == read(outbox).steps


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


# -- what runs out


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
