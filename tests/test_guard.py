"""The disk budget: refusals come in time and go by themselves."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlflow_outbox.counters import Counters
from mlflow_outbox.settings import Settings
from mlflow_outbox.spool import extent, guard, measurement
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox.spool.guard import DiskGuard, used_bytes
from mlflow_outbox.spool.measurement import Measurement
from servers import eventually
from spools import RUN, make_journal, make_outbox, metric, warnings


def test_an_outbox_at_its_cap_refuses_and_takes_again(tmp_path: Path) -> None:
    """The old is never dropped; what delivery frees is used at once."""
    outbox = make_outbox(tmp_path / "outbox")
    guard = DiskGuard(outbox, Settings(outbox_bytes=20_000), Counters())
    writer = make_journal(outbox, refuse=guard.reason)
    assert guard.reason() is None
    filler = outbox.runs / "filler"
    filler.write_bytes(b"x" * 20_000)
    guard.look()
    assert "outbox_bytes" in str(guard.reason())
    for words in ("mlflow-outbox flush", "mlflow-outbox gc --older-than 0"):
        assert words in str(guard.reason()), "what helps"
    assert not writer.append(metric(0))
    filler.unlink()
    guard.look()
    assert guard.reason() is None
    assert writer.append(metric(1))


def test_a_refusal_is_not_believed_when_nobody_has_looked_for_long(tmp_path: Path) -> None:
    """A program that opens an outbox that is full, and begins to log when another one has delivered it long since."""
    outbox, now = make_outbox(tmp_path / "outbox"), [1000.0]
    guard = DiskGuard(outbox, Settings(outbox_bytes=20_000), Counters(), lambda: now[0])
    filler = outbox.runs / "filler"
    filler.write_bytes(b"x" * 20_000)
    guard.begin()
    filler.unlink()
    assert "outbox_bytes" in str(guard.reason())
    now[0] += 10.0
    assert guard.reason() is None


def test_an_outbox_that_is_full_once_more_is_said_once_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In a program that runs for days: the events of the second outage are refused as those of the first."""
    outbox, now = make_outbox(tmp_path / "outbox"), [1000.0]
    counters = Counters(lambda: now[0])
    guard = DiskGuard(outbox, Settings(outbox_bytes=20_000), counters, lambda: now[0])
    writer = make_journal(outbox, refuse=guard.reason, counters=counters)
    filler, said = outbox.runs / "filler", list[int]()
    for number in range(2):
        filler.write_bytes(b"x" * 20_000)
        now[0] += 1_000
        guard.look()
        assert not writer.append(metric(number))
        said.append(sum("new events are refused" in text for text in warnings(caplog)))
        filler.unlink()
        now[0] += 1_000
        guard.look()
        assert writer.append(metric(number))
        writer.close()  # what comes next takes the way that asks whether there is room
    assert [1, 2] == said


def test_a_disk_with_little_room_refuses(tmp_path: Path) -> None:
    """Others need room too."""
    guard = DiskGuard(make_outbox(tmp_path / "outbox"), Settings(free_bytes=10**17), Counters())
    guard.look()
    assert "free_bytes" in str(guard.reason())
    assert "make room" in str(guard.reason()), "what helps"


def test_a_directory_that_is_gone_is_left_to_the_write_to_report(tmp_path: Path) -> None:
    """The guard refuses nothing that it cannot see."""
    import shutil

    outbox = make_outbox(tmp_path / "outbox")
    guard = DiskGuard(outbox, Settings(), Counters())
    shutil.rmtree(outbox.path)
    guard.look()
    assert guard.reason() is None


def test_the_size_is_not_measured_at_each_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Walking an outbox costs something; free space is asked for every time."""
    calls = []
    monkeypatch.setattr(extent, "sizes", lambda path: iter([calls.append(1) or 0]))
    looker = DiskGuard(make_outbox(tmp_path / "outbox"), Settings(), Counters())
    for _ in range(5):
        looker.look()
    assert 1 == len(calls)


class Disk:
    """A disk and a clock that do what a test says, in place of ``os.statvfs``, ``extent.sizes`` and the clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, seconds: float) -> None:
        self.now, self.free, self.used, self.walks = 1000.0, 10**9, 0, list[float]()
        self._seconds = seconds
        monkeypatch.setattr(extent, "sizes", self._sizes)
        monkeypatch.setattr(extent, "measured_apart", lambda _: None)
        monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=self.free, f_frsize=1, f_blocks=1))

    def _sizes(self, _: Path) -> Iterator[int]:
        self.walks.append(self.now)
        for part in (self.used, 0):
            self.now += self._seconds / 2
            yield part

    def look(self, looker: DiskGuard, *, seconds: float) -> list[float]:
        """Look twice a second for so long; return how long after its begin the outbox was walked."""
        begin, before = self.now, len(self.walks)
        while self.now < begin + seconds:
            looker.look()
            if looker._thread is not None:
                looker._thread.join(60)
            self.now += 0.5
        return [at - begin for at in self.walks[before:]]


def many(disk: Disk, outbox: OutboxDirectory, count: int, **settings: int) -> list[DiskGuard]:
    """Return the guards of as many processes, each of which leaves another time to the one that measures."""
    return [
        DiskGuard(outbox, Settings(**settings), Counters(), lambda: disk.now, lambda: disk.now, lambda n=n: n / count)
        for n in range(count)
    ]


def test_an_outbox_that_takes_long_to_measure_is_measured_rarely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundredth of the time goes there; every ten seconds where that is less."""
    for seconds, expected in ((0.0, [0, 10, 20]), (0.125, [0, 12.625, 25.25]), (0.5, [0])):
        disk = Disk(monkeypatch, seconds=seconds)
        (looker,) = many(disk, make_outbox(tmp_path / str(seconds)), 1)
        assert expected == disk.look(looker, seconds=29)


def test_a_small_outbox_is_measured_before_the_first_event(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There it waits for nobody, and the first events need not pass a cap that is reached; a large one is not."""
    disk = Disk(monkeypatch, seconds=0.0)
    outbox = make_outbox(tmp_path)
    looker, other = many(disk, outbox, 2, outbox_bytes=10_000)
    disk.used = 10_000
    looker.begin()
    assert "outbox_bytes" in str(looker.reason())
    monkeypatch.setattr(extent, "_MANY", 0)
    other.begin()
    assert (1, None) == (len(disk.walks), other.reason())


def test_what_takes_long_to_measure_is_left_to_the_first_look_in_the_background(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run with many files whoever makes a tracker would wait for each, and would have started a thread."""
    outbox, asked, now = make_outbox(tmp_path), list[Any](), [1000.0]
    folder = outbox.make_run(RUN)
    for number in range(100):
        (folder / str(number)).write_bytes(b"x")
    stat = os.stat

    def slow(path: Any, **named: Any) -> os.stat_result:
        asked.append(path)
        now[0] += 0.01
        return stat(path, **named)

    looker = DiskGuard(outbox, Settings(outbox_bytes=100), Counters(), lambda: now[0])
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", slow)
        looker.begin()
    assert (None, None) == (looker.reason(), looker._thread)
    assert len(asked) < 15
    looker.look()
    assert "outbox_bytes" in str(looker.reason())


def test_an_outbox_that_may_be_near_its_cap_is_measured_more_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When half of what it may still take is gone from the disk; and while it refuses, so that it soon takes again."""
    disk = Disk(monkeypatch, seconds=2.0)
    (looker,) = many(disk, make_outbox(tmp_path), 1, outbox_bytes=10_000)
    assert [0] == disk.look(looker, seconds=100)
    disk.free -= 4_999
    assert [] == disk.look(looker, seconds=50)
    disk.free, disk.used = disk.free - 1, 10_000
    assert 0 == disk.look(looker, seconds=3)[0]
    assert "outbox_bytes" in str(looker.reason())
    assert 1 == len(disk.look(looker, seconds=22)), "refusing, and looked at again after twenty seconds"
    disk.used = 0
    disk.look(looker, seconds=22)
    assert looker.reason() is None


def test_a_small_outbox_that_fills_within_seconds_does_not_pass_its_cap_by_far(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is measured at once need not wait for ten seconds when the cap may be near."""
    disk = Disk(monkeypatch, seconds=0.0)
    (looker,) = many(disk, make_outbox(tmp_path), 1, outbox_bytes=10_000)
    disk.look(looker, seconds=0.5)
    for used in (3_000, 6_000, 9_000, 12_000):
        assert looker.reason() is None
        disk.free, disk.used = disk.free - 3_000, used
        disk.look(looker, seconds=0.5)
    assert "outbox_bytes" in str(looker.reason())


def test_of_many_processes_one_measures_a_large_outbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When it ends another does; and all refuse and take again by what it has found."""
    disk = Disk(monkeypatch, seconds=2.0)
    guards = many(disk, make_outbox(tmp_path), 20, outbox_bytes=10_000)

    def go_on(seconds: float) -> list[float]:
        return [walk for _ in range(int(seconds / 10)) for one in guards for walk in disk.look(one, seconds=0.5)]

    begun = disk.now
    go_on(4_000)
    assert (disk.now - begun) / 200 - 2 <= len(disk.walks) <= (disk.now - begun) / 200 + 1, "as if there was only one"
    del guards[0]
    before = len(disk.walks)
    go_on(1_000)
    assert 2 <= len(disk.walks) - before <= 6
    disk.free, disk.used = disk.free - 5_000, 10_000
    go_on(100)
    assert [True] * 19 == ["the setting outbox_bytes allows" in str(one.reason()) for one in guards]
    disk.used = 0
    before = len(disk.walks)
    go_on(100)
    assert [None] * 19 == [one.reason() for one in guards]
    assert len(disk.walks) - before < 12


def test_a_measurement_of_another_time_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be of before a reboot, or of a clock that was set."""
    for age, walks in ((-1.0, 1), (0.0, 0), (199.0, 0), (200.0, 1)):
        disk = Disk(monkeypatch, seconds=2.0)
        outbox = make_outbox(tmp_path / str(age))
        measurement.write(outbox.path, Measurement(10_000, 10**9, 2.0, disk.now - age))
        (one,) = many(disk, outbox, 1, outbox_bytes=10_000)
        assert walks == len(disk.look(one, seconds=0.5))
        assert (walks == 0) == ("outbox_bytes" in str(one.reason()))


def test_what_was_copied_before_another_s_measurement_counts_until_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have been copied behind the walk; twice counted is refused a while too early, never too late."""
    disk = Disk(monkeypatch, seconds=2.0)
    outbox = make_outbox(tmp_path)
    (one,) = many(disk, outbox, 1, outbox_bytes=10_000)
    disk.look(one, seconds=0.5)
    assert one.reason(9_999) is None
    for used, refused in ((1, True), (1, False)):
        disk.now += 400
        measurement.write(outbox.path, Measurement(used, 10**9, 2.0, disk.now))
        assert [] == disk.look(one, seconds=0.5)
        assert refused == (one.reason(1) is not None)


def test_a_size_that_cannot_be_told_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process measures for itself then."""
    disk = Disk(monkeypatch, seconds=2.0)
    outbox = make_outbox(tmp_path)
    (outbox.path / "size").mkdir()
    for one in many(disk, outbox, 2):
        assert 1 == len(disk.look(one, seconds=0.5))
        assert 1 == one._counters["size_not_told"]


def test_a_look_does_not_wait_for_a_measurement_that_takes_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The round of syncing that it belongs to would wait as well; the verdict comes when it is there."""
    go_on = threading.Event()
    monkeypatch.setattr(extent, "measured_apart", lambda _: 10_000 if go_on.wait(60) else 0)
    monkeypatch.setattr(guard, "_QUICK", 0.0)
    looker = DiskGuard(make_outbox(tmp_path), Settings(outbox_bytes=10_000), Counters())
    measuring = set()
    for _ in range(3):
        looker.look()
        assert looker.reason() is None
        measuring.add(looker._thread)
    assert 1 == len(measuring)
    go_on.set()

    def refuses() -> bool:
        looker.look()
        return "outbox_bytes" in str(looker.reason())

    eventually(refuses)


def test_a_large_outbox_is_measured_by_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts what this one would, and where none can be started this one does."""
    outbox = make_outbox(tmp_path / "outbox")
    make_journal(outbox).append(metric(0))
    (outbox.path / "ledger").mkdir(exist_ok=True)
    (outbox.path / "ledger" / "reserve").write_bytes(b"x" * 1000)
    expected = used_bytes(outbox)
    assert 0 < expected < 1000
    assert expected == extent.measured_apart(outbox.path)
    monkeypatch.setattr(guard, "_QUICK", 0.0)
    for interpreter, here in ((sys.executable, 0), ("/nowhere/python", 1), ("", 1)):
        monkeypatch.setattr(sys, "executable", interpreter)
        counters = Counters()
        looker = DiskGuard(outbox, Settings(outbox_bytes=expected), counters)
        looker.look()
        assert looker._thread is not None
        looker._thread.join(120)
        assert here == counters["size_measured_here"]
        (outbox.path / "size").unlink()
        looker.look()
        assert "outbox_bytes" in str(looker.reason())


def test_a_measurement_does_not_wait_for_a_child_that_is_forked_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F05: the child has a copy of all descriptors, and may live for days."""
    monkeypatch.setattr(extent, "_LONGEST", 200.0)
    (tmp_path / "file").write_bytes(b"x" * 100)
    forking = tmp_path / "forking"
    forking.write_text(f"""#!{sys.executable}
import os, sys
child = os.fork()
if child == 0:
    os.execvp("sleep", ["sleep", "200"])
open({str(tmp_path / "child")!r}, "w").write(f"{{child:10}}")
os.execv({sys.executable!r}, [{sys.executable!r}, *sys.argv[1:]])
""")
    forking.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(forking))
    begin = time.monotonic()
    size = extent.measured_apart(tmp_path)
    spent = time.monotonic() - begin
    os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)
    assert 110 + forking.stat().st_size == size
    assert spent < 120


@pytest.mark.parametrize("script", ["exit 1", "echo 1; exit 1", "echo text", "exec sleep 600"])
def test_a_process_that_does_not_measure_is_passed(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What calls itself Python may be something else."""
    monkeypatch.setattr(extent, "_LONGEST", 0.5)
    other = tmp_path / "python"
    other.write_text(f"#!/bin/sh\n{script}\n")
    other.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(other))
    assert extent.measured_apart(tmp_path) is None


def test_a_size_that_no_thread_can_measure_is_counted_and_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is refused for a size that is not known."""

    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(guard, "_QUICK", 0.0)
    counters = Counters()
    looker = DiskGuard(make_outbox(tmp_path), Settings(outbox_bytes=10), counters)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        looker.look()
        looker.look()
    assert 2 == counters["size_not_measured"]
    assert looker.reason() is None
    looker.look()
    assert looker._thread is not None
    looker._thread.join(120)
    looker.look()
    assert "outbox_bytes" in str(looker.reason())


def test_an_outbox_with_many_runs_is_not_listed_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Listing them alone would hold up the round of syncing."""
    outbox = make_outbox(tmp_path / "outbox")
    assert not extent.is_large(outbox.runs)
    assert not extent.is_large(tmp_path / "nowhere")
    for number in range(1000):
        (outbox.runs / f"{number:032x}").mkdir()
    assert extent.is_large(outbox.runs)
    expected = sum(extent.sizes(outbox.path))
    monkeypatch.setattr(extent, "sizes", lambda _: pytest.fail("listed here"))
    assert expected == used_bytes(outbox)


def test_the_used_bytes_are_those_of_all_files(tmp_path: Path) -> None:
    """Segments, copies and the rest."""
    outbox = make_outbox(tmp_path / "outbox")
    before = used_bytes(outbox)
    folder = outbox.make_run(RUN)
    (folder / "a.log").write_bytes(b"x" * 100)
    (folder / "files").mkdir()
    (folder / "files" / "b").write_bytes(b"x" * 50)
    (folder / "link").symlink_to("/nowhere")
    assert 150 <= used_bytes(outbox) - before < 200
