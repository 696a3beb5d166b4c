"""The background that looks after open journals: one thread, in each process, while there is something to do."""

from __future__ import annotations

import errno
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlflow_outbox.counters import Counters
from mlflow_outbox.spool.alarm import Alarm
from mlflow_outbox.spool.caretaker import Caretaker, Pace
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox.spool.journal import Journal
from mlflow_outbox.testing import FailingDisk
from servers import eventually
from spools import FORKS, Kit, make_journal, metric


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
    before = set(sync_threads())  # of other tests of this process, which may end meanwhile
    writers = [make_journal(outbox, disk, run=letter * 32, registry=caretaker) for letter in "bcd"]
    assert set() == set(sync_threads()) - before
    for round_ in range(2):
        for writer in writers:
            writer.append(metric(round_))
        assert 1 == len(set(sync_threads()) - before)
        eventually(lambda: all(not writer._sequence.live.unsynced for writer in writers), message="all synced")
        for writer in writers:
            writer.close()
        eventually(lambda: not set(sync_threads()) - before, message="the thread ends")
    assert all(writer.is_idle for writer in writers)
    assert disk.count("create") == disk.count("close")


def test_rounds_come_as_often_as_asked_for_whatever_they_take() -> None:
    """What a power cut may take is the interval, not the interval and a round; a slow disk still gets a pause."""
    pace, begins, now = Pace(0.5, 100.0), [], 100.0
    for seconds in (0.0, 0.2, 0.1, 3.0, 0.0, 0.0):
        now += pace.pause(now)
        begins.append(round(now - 100, 3))
        now += seconds
    assert [0.5, 1.0, 1.5, 2.0, 5.25, 5.75] == begins


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


class Shut(logging.Handler):
    """A program's handler whose log server is away."""

    def emit(self, record: logging.LogRecord) -> None:
        """Raise, as handlers that overrule ``handleError`` do."""
        raise ConnectionError


@pytest.fixture
def shut() -> Iterator[None]:
    """Have every message of this library go to such a handler."""
    handler = Shut()
    logging.getLogger("mlflow_outbox").addHandler(handler)
    yield
    logging.getLogger("mlflow_outbox").removeHandler(handler)


@pytest.mark.usefixtures("shut")
def test_a_handler_of_the_program_that_raises_ends_neither_a_call_nor_the_background(kit: Kit) -> None:
    """What could not be said is counted; what the disk did not take waits in memory as it should."""

    def trouble() -> None:
        raise LookupError

    caretaker = Caretaker(0.002, kit.counters, each_round=trouble)
    writer = make_journal(kit.outbox, kit.disk, run="b" * 32, counters=kit.counters, registry=caretaker)
    assert not kit.run.log_metric("not/../allowed\0", 1.0)
    assert 1 == kit.counters["warnings_not_written"]
    kit.disk.fail("write", error=errno.ENOSPC, times=None)
    assert writer.append(metric(0))
    assert 1 == writer.in_memory
    eventually(lambda: kit.counters["caretaker_errors"] > 3)
    kit.disk.clear()
    eventually(lambda: not writer.in_memory and not writer._sequence.live.unsynced)
    caretaker.stop()


def test_a_handler_of_the_program_that_ends_it_does_not_end_the_background_alone(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one does that takes no warning: raised in a thread, its SystemExit would mean that thread, without a word."""
    rounds: list[int] = []

    def leave(_: logging.LogRecord) -> bool:
        raise SystemExit(1)

    def trouble() -> None:
        rounds.append(1)
        kit.counters.warn_once(len(rounds), "a warning of the background")

    logger = logging.getLogger("mlflow_outbox")
    monkeypatch.setattr(logger, "filters", [leave])
    caretaker = Caretaker(0.002, kit.counters, each_round=trouble)
    writer = make_journal(kit.outbox, kit.disk, run="b" * 32, counters=kit.counters, registry=caretaker)
    assert writer.append(metric(0))
    eventually(lambda: len(rounds) > 3)
    assert kit.counters["caretaker_errors"]
    monkeypatch.undo()
    eventually(lambda: not writer._sequence.live.unsynced, message="it is synced after all")
    caretaker.stop()


def test_a_background_that_had_no_memory_left_begins_anew_with_a_later_segment(
    kit: Kit, caretaker: Caretaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing would be synced any more for as long as the program runs, nor its room on the disk be looked at."""

    def fail(*_: object) -> bool:
        raise MemoryError

    writer = make_journal(kit.outbox, kit.disk, run="b" * 32, registry=caretaker)
    with monkeypatch.context() as patch:
        patch.setattr(threading, "excepthook", lambda _: None)
        patch.setattr(Alarm, "sleep", fail)
        assert writer.append(metric(0))
        began = caretaker._thread
        assert began is not None
        eventually(lambda: not began.is_alive())
    writer.close()

    def is_synced() -> bool:
        assert writer.append(metric(1))
        return bool(writer._sequence.live.synced)

    eventually(is_synced)


class Asked:
    """What a caretaker asked to have synced."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, ...]] = []

    def is_relieved(self, segments: tuple[str, ...]) -> bool:
        """Believe whoever it is."""
        self.asked.append(segments)
        return True


@pytest.fixture
def relieved(monkeypatch: pytest.MonkeyPatch, kit: Kit) -> Iterator[tuple[Caretaker, Asked]]:
    """A caretaker whose rounds come once an hour while it is relieved."""
    monkeypatch.setattr("mlflow_outbox.spool.caretaker.SHORTEST", 0.0)
    monkeypatch.setattr("mlflow_outbox.spool.caretaker.RELIEVED", 3600 * 50)
    rounds = Asked()
    caretaker = Caretaker(0.02, kit.counters, is_relieved=rounds.is_relieved)
    yield caretaker, rounds
    caretaker.stop()


def resting(caretaker: Caretaker, rounds: Asked) -> None:
    """Wait until the next round is an hour away."""

    def is_resting() -> bool:
        segments = [journal.steady_segment for journal in list(caretaker._watched.values())]
        return caretaker._rests and all(segments) and rounds.asked[-1:] == [tuple(segments)]

    eventually(is_resting)


def test_what_another_process_cannot_do_brings_the_next_round_at_once(
    kit: Kit, relieved: tuple[Caretaker, Asked]
) -> None:
    """A new segment, its name, a rotation, a disk that fails, the end of a run: each is seen to as if by itself."""
    caretaker, rounds = relieved

    def journal(letter: str) -> Journal:
        return make_journal(kit.outbox, kit.disk, run=letter * 32, registry=caretaker, segment_bytes=4096)

    first, second = journal("b"), journal("c")
    first.append(metric(0))
    resting(caretaker, rounds)
    assert first.append(metric(1)), "what goes on is left to the other process"
    assert (caretaker._rests, 1) == (True, len(first._sequence.live.unsynced))
    second.append(metric(0))
    resting(caretaker, rounds)
    assert ([], []) == (first._sequence.live.unsynced, second._sequence.live.unsynced)
    assert 2 == len(rounds.asked[-1])
    segment = first._sequence.ordinal
    while first._sequence.ordinal == segment:
        first.append(metric(2))
    eventually(lambda: not first._sequence.retired and not first._sequence.unsynced_names)
    resting(caretaker, rounds)
    kit.disk.fail("write", error=errno.ENOSPC, times=1)
    first.append(metric(3))
    eventually(lambda: not first.in_memory, message="what waited in memory is written")
    resting(caretaker, rounds)
    first.close()
    eventually(lambda: first.is_idle)
    resting(caretaker, rounds)
    second.leave()
    eventually(lambda: second.is_idle)


def test_much_that_is_not_synced_brings_the_next_round_at_once(kit: Kit, relieved: tuple[Caretaker, Asked]) -> None:
    """What is kept in memory for a sync that fails stays within its bound."""
    caretaker, rounds = relieved
    writer = make_journal(kit.outbox, kit.disk, registry=caretaker, memory_bytes=40_000)
    writer.append(metric(0))
    resting(caretaker, rounds)
    written = writer._sequence.live.offset
    while caretaker._rests:
        assert writer.append(metric(1))
    assert 10_000 <= writer._sequence.live.offset - written <= 20_000
    eventually(lambda: not writer._sequence.live.unsynced)


def test_a_disk_that_fails_is_not_left_to_another_process(kit: Kit, relieved: tuple[Caretaker, Asked]) -> None:
    """The program's own descriptor tells, and its own rounds go on until the events are in another segment."""
    caretaker, rounds = relieved
    writer = make_journal(kit.outbox, kit.disk, counters=kit.counters, registry=caretaker)
    writer.append(metric(0))
    resting(caretaker, rounds)
    bad = writer._sequence.live
    kit.disk.fail("datasync", error=errno.EIO, times=1)
    writer.append(metric(1))
    caretaker.hurry()
    resting(caretaker, rounds)
    assert bad is not writer._sequence.live
    assert (1, 1, []) == (
        kit.counters["sync_errors"], kit.counters["rewritten_after_sync_error"], writer._sequence.live.unsynced
    )  # fmt: skip


@pytest.mark.parametrize("sync", ["os", "always"])
def test_only_what_is_synced_in_the_background_is_left_to_another_process(
    sync: str, kit: Kit, relieved: tuple[Caretaker, Asked]
) -> None:
    """Nothing is to be synced there, or it was at the call."""
    caretaker, rounds = relieved
    writer = make_journal(kit.outbox, kit.disk, registry=caretaker, sync=sync)
    done = threading.Event()
    caretaker._each_round = done.set
    for number in range(3):
        done.clear()
        writer.append(metric(number))
        assert done.wait(60)
    assert [] == rounds.asked


def test_where_nobody_else_syncs_a_copied_file_begins_no_segment(kit: Kit) -> None:
    """Offline, an outbox would hold a segment for each file that is logged now and then."""
    caretaker = Caretaker(0.5, kit.counters)
    caretaker._watched[0] = kit.journal
    for number in range(3):
        assert kit.run.log_text("content", f"{number}.txt")
        kit.journal.sync()
        assert 1 == caretaker._intervals()
    assert 1 == kit.journal._sequence.ordinal


@pytest.mark.parametrize("interval", [0.09, 1.1])
def test_rounds_that_are_short_or_long_are_not_left_to_another_process(interval: float, kit: Kit) -> None:
    """There it is not worth it, or a worker that died would be noticed late."""
    asked = Asked()
    caretaker = Caretaker(interval, kit.counters, is_relieved=asked.is_relieved)
    writer = make_journal(kit.outbox, kit.disk, registry=caretaker)
    writer.append(metric(0))
    caretaker.round()
    assert (1, []) == (caretaker._intervals(), asked.asked)
    caretaker.stop()


def test_a_round_that_is_hurried_comes_an_interval_later_at_most() -> None:
    """As it would have without another process; one that is due sooner stays where it was."""
    pace = Pace(0.5, 100.0)
    assert 2.0 == pace.pause(100.0, 4)
    assert 0.5 == pace.hurry(100.3)
    assert 0.25 == pace.hurry(100.55)
    assert 0.5 == pace.pause(100.8)
