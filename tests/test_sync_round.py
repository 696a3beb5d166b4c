"""The background's quiet rounds: they sync without the lock of logging calls, and promise no less than whole ones."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlflow_outbox.counters import Counters
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox.spool.events import Artifact
from mlflow_outbox.spool.journal import Journal
from mlflow_outbox.spool.snapshot import SnapshotStore
from mlflow_outbox.testing import FailingDisk
from spools import RUN, make_journal, make_outbox, metric, read


def begun(outbox: OutboxDirectory, disk: FailingDisk, **options: Any) -> Journal:
    """A journal with one event whose segment was announced and synced, so that quiet rounds can follow."""
    writer = make_journal(outbox, disk, **options)
    writer.append(metric(0))
    writer.sync()
    return writer


def append(writer: Journal, first: int, end: int) -> None:
    """Append numbered events."""
    for number in range(first, end):
        assert writer.append(metric(number))


def test_a_quiet_round_waits_for_no_logging_call(outbox: OutboxDirectory, disk: FailingDisk) -> None:
    """Nor the call for it: one hangs in its write, and what was written before is synced meanwhile."""
    writer = begun(outbox, disk)
    append(writer, 1, 5)
    before = disk.count("datasync")
    with disk.held("write") as entered:
        call = threading.Thread(target=writer.append, args=(metric(5),))
        call.start()
        assert entered.wait(10)
        background = threading.Thread(target=writer.sync_quietly, daemon=True)
        background.start()
        background.join(10)
        assert not background.is_alive()
        assert before + 1 == disk.count("datasync")
    call.join(10)
    assert list(range(6)) == read(outbox).steps


def test_a_quiet_round_has_nothing_to_do_when_nothing_was_added(outbox: OutboxDirectory, disk: FailingDisk) -> None:
    """One fdatasync for what was added; then the books are brought up to date, and the disk is left alone."""
    writer = begun(outbox, disk)
    append(writer, 1, 50)
    before = disk.count("datasync")
    writer.sync_quietly()
    assert before + 1 == disk.count("datasync")
    assert 49 == len(writer._sequence.live.unsynced)
    for _ in range(5):
        writer.sync_quietly()
    assert before + 2 == disk.count("datasync")
    assert [] == writer._sequence.live.unsynced


def test_what_is_held_for_a_sync_that_fails_is_let_go_of_now_and_then(
    outbox: OutboxDirectory, disk: FailingDisk
) -> None:
    """After ten rounds whatever comes, and at once when it is much."""
    writer = begun(outbox, disk)
    held = []
    for number in range(1, 31):
        append(writer, number, number + 1)
        writer.sync_quietly()
        held.append(len(writer._sequence.live.unsynced))
    assert [*range(1, 10), 0] * 3 == held
    small = begun(outbox, disk, run="b" * 32, memory_bytes=4 * 1024)
    append(small, 1, 40)
    small.sync_quietly()
    assert [] == small._sequence.live.unsynced


def test_a_quiet_round_that_fails_has_all_written_again_that_is_not_in_the_books(
    outbox: OutboxDirectory, disk: FailingDisk
) -> None:
    """More than the failed sync may have taken; on no account less, and once for the reader."""
    counters = Counters()
    writer = begun(outbox, disk, counters=counters)
    failed = next(outbox.run(RUN).glob("*-000000.log"))
    durable = failed.stat().st_size
    for number in range(1, 5):
        append(writer, number, number + 1)
        writer.sync_quietly()
    append(writer, 5, 10)
    disk.fail("datasync")
    writer.sync_quietly()
    assert 9 == counters["rewritten_after_sync_error"]
    append(writer, 10, 12)
    assert (list(range(12)), 0) == (read(outbox).steps, read(outbox).missing)
    os.truncate(failed, durable)
    assert (list(range(12)), 0) == (read(outbox).steps, read(outbox).missing)
    first, *_ = [call.fd for call in disk.calls if call.operation == "datasync"]
    writer.sync_quietly()
    closed = [at for at, call in enumerate(disk.calls) if call.operation == "close" and call.fd == first]
    assert 1 == len(closed), "the descriptor that could not be synced is gone"


def test_a_segment_that_is_removed_is_noticed_by_a_quiet_round(outbox: OutboxDirectory, disk: FailingDisk) -> None:
    """What was not in the books comes again, the rest goes on in a new segment."""
    counters = Counters()
    writer = begun(outbox, disk, counters=counters)
    append(writer, 1, 5)
    writer.sync_quietly()
    append(writer, 5, 8)
    shutil.rmtree(outbox.run(RUN))
    writer.sync_quietly()
    append(writer, 8, 10)
    assert 1 == counters["segments_removed"]
    assert list(range(1, 10)) == read(outbox).steps


def test_a_copied_file_is_durable_before_a_quiet_round_syncs_its_event(
    outbox: OutboxDirectory, disk: FailingDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a round is a whole one."""
    writer = begun(outbox, disk)
    store, order = SnapshotStore(outbox.run(RUN)), []
    monkeypatch.setattr(SnapshotStore, "sync", lambda _, sha256: order.append(sha256))
    kept = store.add_bytes(b"early", limit=100)
    writer.sync_later(store, kept.sha256)
    assert writer.append(Artifact("early.txt", kept.sha256, kept.size, 1))
    disk.fail("datasync", times=None, when=lambda _: bool(order.append("event")))
    writer.sync_quietly()
    assert [kept.sha256, "event"] == order


def test_an_event_whose_copy_came_too_late_for_a_quiet_round_is_not_made_durable_by_it(
    outbox: OutboxDirectory, disk: FailingDisk
) -> None:
    """F16: it goes to another segment than the one that is being synced."""
    writer = begun(outbox, disk)
    store = SnapshotStore(outbox.run(RUN))
    append(writer, 1, 2)
    with disk.held("datasync") as entered:
        background = threading.Thread(target=writer.sync_quietly)
        background.start()
        assert entered.wait(10)
        kept = store.add_bytes(b"late", limit=100)
        writer.sync_later(store, kept.sha256)
        assert writer.append(Artifact("late.txt", kept.sha256, kept.size, 1))
    background.join(10)
    _, unsynced = sorted(outbox.run(RUN).glob("*.log"))
    unsynced.unlink()
    assert [metric(0), metric(1)] == read(outbox).events


def test_a_disk_that_is_full_or_refused_has_no_quiet_rounds(outbox: OutboxDirectory, disk: FailingDisk) -> None:
    """What waits in memory is written by the round, and a refusal takes effect with it."""
    reason: list[str | None] = [None]
    writer = begun(outbox, disk, refuse=lambda: reason[0])
    disk.fail("write", error=errno.ENOSPC)
    append(writer, 1, 2)
    assert 1 == writer.in_memory
    writer.sync_quietly()
    assert 0 == writer.in_memory
    append(writer, 2, 3)
    writer.sync_quietly()
    append(writer, 3, 4)
    reason[0] = "no room"
    writer.sync_quietly()
    assert not writer.append(metric(4))
    reason[0] = None
    writer.sync_quietly()
    append(writer, 4, 5)
    assert list(range(5)) == read(outbox).steps


STEP = st.sampled_from(["append", "append", "quiet", "quiet", "whole", "sync fails", "write fails", "close", "cut"])


@given(st.lists(STEP, max_size=60))
def test_no_order_of_rounds_failures_and_power_cuts_takes_what_was_synced(steps: list[str]) -> None:
    """After a round that succeeded, a power cut takes nothing that was appended before it.

    Unless the disk had failed to sync the same events twice, which is counted.
    """
    with tempfile.TemporaryDirectory() as folder:
        outbox, disk, counters = make_outbox(Path(folder) / "outbox"), FailingDisk(), Counters()
        writer = make_journal(outbox, disk, segment_bytes=1024, counters=counters)
        number, promised = 0, 0
        for step in steps:
            if step == "append":
                append(writer, number, number + 3)
                number += 3
            elif step in ("quiet", "whole"):
                before = counters.snapshot()
                writer.sync_quietly() if step == "quiet" else writer.sync()
                left_alone = writer._sequence.live.tainted  # a disk that failed twice, for a while
                held_up = writer.in_memory or left_alone or counters["unsynced_not_rewritten"]
                if before == counters.snapshot() and not held_up:
                    promised = number
            elif step == "close":
                writer.close()
            elif step == "cut":
                break
            else:
                disk.fail("datasync" if step == "sync fails" else "write")
        if outbox.run(RUN).exists():
            disk.cut_power(outbox.run(RUN))
        found = read(outbox)
        assert list(range(promised)) == found.steps[:promised]
        assert len(found.steps) == len(set(found.steps))
