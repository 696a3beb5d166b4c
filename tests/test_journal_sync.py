"""The journal on a disk that cannot sync: what may be lost is written again, once, and the disk is not filled (F21)."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import shutil
import threading
import types
from collections.abc import Callable

import pytest

from mlflow_outbox.counters import Counters
from mlflow_outbox.spool import frame, snapshot
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox.spool.events import encode
from mlflow_outbox.spool.journal import Journal
from mlflow_outbox.spool.ring import MemoryRing
from mlflow_outbox.spool.snapshot import SnapshotStore
from mlflow_outbox.testing import FailingDisk
from spools import RUN, Everything, Kit, make_journal, metric, open_files, read


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
        assert entered.wait(60)
        number = 10
        while writer._sequence.ordinal <= rotations:
            writer.append(metric(number))
            number += 1
    background.join(60)
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


def test_a_call_that_is_broken_off_while_a_sync_fails_gives_no_number_twice(
    outbox: OutboxDirectory, disk: FailingDisk
) -> None:
    """Its event is in the file and not counted yet when the file is left."""

    class Over(Exception):
        """The program's time is over."""

    writer = make_journal(outbox, disk)
    writer.append(metric(0))
    with disk.held("datasync", error=errno.EIO) as entered:
        background = threading.Thread(target=writer.sync)
        background.start()
        assert entered.wait(60)
        live = writer._sequence.live
        os.write(live.fd, frame.pack(encode(metric(1)), 1, live.seed))
        writer._sequence.suspect = True  # as an exception leaves it that comes right behind the write
    background.join(60)
    assert writer.append(metric(2))
    writer.close()
    found = read(outbox)
    assert ([0, 1, 2], 0) == (found.steps, found.missing)


def test_no_call_waits_for_the_sync_of_what_is_written_again(outbox: OutboxDirectory, disk: FailingDisk) -> None:
    """A segment that was complete could not be synced; the one that takes its place is slow, in the same round."""
    writer = make_journal(outbox, disk, segment_bytes=1024)
    number = 0
    while not writer._sequence.retired:
        writer.append(metric(number))
        number += 1
    disk.fail("datasync")
    with disk.held("datasync") as entered:
        background = threading.Thread(target=writer.sync)
        background.start()
        assert entered.wait(60)
        for more in range(number, number + 100):
            assert writer.append(metric(more))
    background.join(60)
    assert 0 not in [segment.first_seq for segment in writer._sequence.retired]
    writer.close()
    assert list(range(number + 100)) == read(outbox).steps


def test_a_sync_that_takes_long_costs_a_bounded_number_of_descriptors(
    outbox: OutboxDirectory, disk: FailingDisk
) -> None:
    """Beyond that complete segments are closed, and what a power cut may take of them is counted."""
    counters = Counters()
    writer = make_journal(outbox, disk, segment_bytes=1024, counters=counters)
    writer.append(metric(0))
    with disk.held("datasync") as entered:
        background = threading.Thread(target=writer.sync)
        background.start()
        assert entered.wait(60)
        for number in range(1, 3000):
            assert writer.append(metric(number))
        assert writer._sequence.ordinal > 60
        assert len(open_files(outbox.path)) < 20
        assert counters["unprotected_by_sync"] > 1000
    background.join(60)
    writer.close()
    assert list(range(3000)) == read(outbox).steps


def ended(outbox: OutboxDirectory, disk: FailingDisk, counters: Counters, number: int) -> list[Journal]:
    """End as many runs, with an event each, of which none is synced; return their journals."""
    background = types.SimpleNamespace(watch=lambda _: None, hurry=lambda: None)  # which does not come to it
    journals = [
        make_journal(outbox, disk, run=f"{n:032x}", counters=counters, registry=background) for n in range(number)
    ]
    for journal in journals:
        assert journal.append(metric(0))
        journal.close()
    return journals


def test_many_runs_that_end_faster_than_they_are_synced_leave_the_program_its_descriptors(
    outbox: OutboxDirectory, disk: FailingDisk
) -> None:
    """A complete segment gives its own back, and is opened again to be synced; in all an eighth may be open."""
    counters = Counters()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for allowed, most in ((hard, 130), (400, 51)):
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        try:
            journals = ended(outbox, disk, counters, 300)
            assert len(open_files(outbox.path)) <= most
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        synced = disk.count("datasync")
        for journal in journals:
            assert not journal.is_idle
            journal.sync()
            assert journal.is_idle
        assert 300 == disk.count("datasync") - synced
        assert [] == open_files(outbox.path)
        shutil.rmtree(outbox.runs)
        outbox.runs.mkdir(mode=0o700)
    assert {} == counters.snapshot()


@pytest.mark.parametrize(
    ("error", "rewritten", "idle"), [(errno.EMFILE, 0, False), (errno.EIO, 1, False), (errno.ENOENT, 0, True)]
)
def test_a_segment_that_cannot_be_opened_again_is_synced_later_or_written_again(
    error: int, rewritten: int, outbox: OutboxDirectory, disk: FailingDisk, idle: bool
) -> None:
    """Without a descriptor it is tried again, a disk that fails gets a copy, and a delivered one is done with."""
    counters = Counters()
    *journals, last = ended(outbox, disk, counters, 140)
    disk.fail("reopen", error=error)
    last.sync()
    assert rewritten == counters["rewritten_after_sync_error"]
    assert idle == last.is_idle
    for journal in (*journals, last):
        journal.sync()
    assert last.is_idle
    assert [0] == read(outbox, last.run.run_id).steps


def test_a_copied_file_that_no_descriptor_was_left_for_is_synced_later(kit: Kit) -> None:
    """It is opened to be synced; what the program has open is synced all the same."""
    assert kit.run.log_text("content", "a.txt")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        kit.journal.sync()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [] == kit.journal._sequence.live.unsynced
    assert (False, 2) == (kit.journal._round.is_clean, kit.counters["sync_errors"]), "the copy's, and the names'"
    kit.journal.sync()
    assert (True, 2) == (kit.journal._round.is_clean, kit.counters["sync_errors"])


def test_a_time_limit_that_ends_while_a_copied_file_is_synced_reaches_the_program(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the next round syncs the file."""
    asked: list[str] = []

    def sync(_: SnapshotStore, sha256: str) -> None:
        asked.append(sha256)
        if len(asked) == 1:
            raise TimeoutError

    monkeypatch.setattr(SnapshotStore, "sync_content", sync)
    assert kit.run.log_text("content", "a.txt")
    with pytest.raises(TimeoutError):
        kit.journal.sync()
    kit.journal.sync()
    assert ([asked[0]] * 2, 0) == (asked, kit.counters["sync_errors"])


def test_the_names_of_copied_files_are_synced_once_however_many_there_are(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flush waits for the round that does it, and so does the sync of all other events."""
    synced: list[str] = []
    for number in range(20):
        assert kit.run.log_text(str(number), f"{number}.txt")
    monkeypatch.setattr(SnapshotStore, "sync_content", lambda _, sha256: synced.append(sha256))
    monkeypatch.setattr(snapshot, "sync_directory", lambda path: synced.append(path.name))
    kit.journal.sync()
    files = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(20)]
    assert [*files, "files", RUN] == synced
    assert kit.journal._round.is_clean


def test_names_that_no_descriptor_was_left_for_are_synced_later(outbox: OutboxDirectory, disk: FailingDisk) -> None:
    """A directory is opened to be synced; a segment needs none for that."""
    writer = make_journal(outbox, disk)
    writer.append(metric(0))
    disk.fail("sync_directory", error=errno.EMFILE)
    writer.sync()
    before = disk.count("sync_directory")
    writer.sync()
    after = disk.count("sync_directory")
    writer.sync()
    assert (2, 0) == (after - before, disk.count("sync_directory") - after)


def test_nothing_is_synced_at_the_level_that_leaves_it_to_the_system(
    outbox: OutboxDirectory, disk: FailingDisk
) -> None:
    """No directory either."""
    writer = make_journal(outbox, disk, sync="os", segment_bytes=1024)
    for number in range(100):
        writer.append(metric(number))
    writer.sync()
    writer.close()
    assert (0, 0) == (disk.count("datasync"), disk.count("sync_directory"))


def test_memory_that_waits_for_the_disk_is_all_there_again_after_a_call_that_was_broken_off() -> None:
    """An event that was on its way to the file, and arrived, is not counted any more."""
    ring = MemoryRing(100, [b"x" * 60, b"y" * 30])
    assert not ring.add(b"z" * 30)
    ring.send(7)
    ring.settle(8)
    assert ring.add(b"z" * 60)
    assert 2 == len(ring)
