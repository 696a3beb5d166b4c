"""One process's end of an outbox, which several trackers may share."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from commands import offline, outbox_of, withhold
from contents import QUICK, numbered, points, the_run
from mlflow_outbox import FlushResult, MLflowTracker, Settings, delivery, stopwatch
from mlflow_outbox.counters import Counters
from mlflow_outbox.outbox import Outbox
from mlflow_outbox.settings import WorkerKind
from mlflow_outbox.spool import disk, journal, reader
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox.testing import FailingDisk
from mlflow_outbox.testing.proxy import FaultProxy
from mlflow_outbox_worker import flush
from mlflow_outbox_worker.delivery import Delivery
from mlflow_outbox_worker.flush import Watch
from mlflow_outbox_worker.lease import Holder
from servers import MlflowServer, eventually


def left(outbox: Outbox) -> FlushResult:
    """Return what an outbox's ledger says, without waking anybody."""
    return Watch(outbox.directory, outbox.settings).measure()[0]


def test_a_look_that_had_to_wait_is_not_followed_by_a_long_pause(
    outbox: OutboxDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only its own work counts: what it waited for a disk, or for the interpreter, is no reason to look later."""
    looks: list[float] = []

    def measure(_watch: Watch, _ends: object = None) -> tuple[FlushResult, None]:
        looks.append(time.monotonic())
        time.sleep(0.25)
        return FlushResult(pending=int(len(looks) < 5)), None

    monkeypatch.setattr(Watch, "measure", measure)
    assert 0 == Watch(outbox, QUICK).until_delivered(60).pending
    pauses = [after - before - 0.25 for before, after in itertools.pairwise(looks[:5])]
    assert sum(pauses) < 4 * 0.25, pauses


@pytest.mark.parametrize(("is_coming", "begins", "pending"), [(True, 20, 0), (False, 20, 1), (True, 1000, 1)])
def test_a_flush_waits_for_a_worker_that_takes_long_to_begin(
    is_coming: bool, begins: int, pending: int, outbox: OutboxDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a slow machine its imports take longer than five seconds, in which nobody holds the outbox; not for ever."""
    seconds = itertools.count()
    looks = itertools.count()

    def measure(_watch: Watch, _ends: object = None) -> tuple[FlushResult, None]:
        return FlushResult(pending=int(next(looks) < begins)), None

    monkeypatch.setattr(Watch, "measure", measure)
    monkeypatch.setattr(stopwatch, "seconds", lambda: next(seconds))
    assert pending == Watch(outbox, QUICK, is_coming=lambda: is_coming).until_delivered(None).pending


def test_closing_one_tracker_leaves_another_of_its_outbox_the_worker(
    sqlite_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one logs while the first is closed: what it goes on to log is delivered, though its segment is open."""
    first, second = (MLflowTracker(name, sqlite_uri, outbox_dir=tmp_path, settings=QUICK) for name in ("a", "b"))
    outbox = second._outbox
    assert outbox is not None
    assert outbox is first._outbox
    first.start_run("a").log_metric("loss", 0.5, step=0)
    run = second.start_run("b")
    flush = delivery.flush

    def meanwhile(of: Outbox, timeout: float | None, *, settled: bool) -> FlushResult:
        run.log_metric("loss", 0.5, step=1)
        return flush(of, timeout, settled=settled)

    monkeypatch.setattr(delivery, "flush", meanwhile)
    assert first.close(120)
    monkeypatch.undo()
    run.log_metric("loss", 0.5, step=2)
    eventually(lambda: left(outbox).pending == 0, 60, "the second tracker's events")
    assert second.close(60)


def test_closing_one_tracker_leaves_the_flush_of_another_somebody_who_delivers(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """The server is away while the first is closed; the flush of the second, in another thread, has time to wait."""
    with FaultProxy(mlflow_server.url) as proxy:
        proxy.down()
        first, second = (
            MLflowTracker(experiment_name, proxy.url, outbox_dir=tmp_path, settings=QUICK) for _ in range(2)
        )
        outbox = first._outbox
        assert outbox is not None
        assert outbox is second._outbox
        with first.start_run("run") as run:
            run.log_metric("loss", 0.0, step=0)
        results: list[FlushResult] = []
        waiting = threading.Thread(target=lambda: results.append(second.flush(120)))
        waiting.start()
        ended = outbox._worker
        eventually(outbox.directory.hurry_asked, 60, "the second tracker's flush is under way")
        assert not first.close(0.1)
        eventually(lambda: outbox._worker is not None and outbox._worker is not ended, 60, "another worker")
        proxy.up()
        waiting.join(180)
        assert [True] == [bool(result) for result in results]
        second.close(60)
    assert numbered(1) == points(mlflow_server.url, the_run(mlflow_server.url, experiment_name).info.run_id, "loss")


def test_closing_one_tracker_leaves_another_of_its_outbox_the_syncing(tmp_path: Path) -> None:
    """What the other one logs afterwards survives a power cut after the interval, though nobody began a segment."""
    first, second = (
        MLflowTracker(name, "http://127.0.0.1:9", outbox_dir=tmp_path, worker="none", settings=QUICK) for name in "ab"
    )
    run = second.start_run("b")
    held: Any = run._journal
    outbox = first._outbox
    assert outbox is not None
    stop = outbox._caretaker.stop

    def meanwhile(**how: bool) -> None:
        run.log_metric("loss", 0.5, step=1)
        stop(**how)

    outbox._caretaker.stop = meanwhile  # type: ignore[method-assign]  # put back below
    first.close(0)
    outbox._caretaker.stop = stop  # type: ignore[method-assign]  # put back below
    run.log_metric("loss", 0.5, step=2)
    live = held._sequence.live
    eventually(lambda: live.offset == live.synced, message="the second tracker's event was synced")
    second.close(0)


def test_a_worker_that_could_not_be_started_is_started_later(
    sqlite_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No thread was left at the first event; the background tries again, though no segment begins."""
    tracker = MLflowTracker("e", sqlite_uri, outbox_dir=tmp_path, settings=QUICK)

    def fails(_: Outbox) -> delivery.Worker:
        msg = "can't start new thread"
        raise RuntimeError(msg)

    monkeypatch.setattr(delivery, "start", fails)
    run = tracker.start_run("r")
    run.log_metric("loss", 0.5, step=0)
    assert 1 <= tracker.counters["worker_not_started"]
    monkeypatch.undo()
    outbox = tracker._outbox
    assert outbox is not None
    eventually(lambda: left(outbox).pending == 0, 60, "the event")
    tracker.close(60)


def test_what_a_signal_handler_logs_while_the_worker_is_started_starts_no_second_one(
    sqlite_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes in the middle of an import, in the same thread, and its run has a segment of its own to tell of."""
    tracker = MLflowTracker("e", sqlite_uri, outbox_dir=tmp_path, settings=QUICK)
    start, started = delivery.start, list[Outbox]()

    def interrupted(outbox: Outbox) -> delivery.Worker:
        started.append(outbox)
        if len(started) == 1:
            tracker.start_run("of the handler").log_metric("loss", 0.5, step=0)
        return start(outbox)

    monkeypatch.setattr(delivery, "start", interrupted)
    tracker.start_run("r").log_metric("loss", 0.5, step=0)
    assert 1 == len(started)
    assert tracker.close(60)


def test_what_a_signal_handler_logs_while_the_loop_is_woken_does_not_wait_for_itself(outbox: OutboxDirectory) -> None:
    """At whichever line of that it comes: its run has a segment of its own to tell of, in the same thread."""
    loop = Delivery(outbox, outbox.destination, QUICK, Counters(), kind="thread")
    lines = list[int]()

    def interrupt(frame: FrameType, _event: str, _argument: object) -> Any:
        lines.append(frame.f_lineno)
        loop.wake()
        return interrupt

    def work() -> None:
        sys.settrace(interrupt)
        loop.wake()
        sys.settrace(None)
        assert len(lines) > 1

    forked(work)


def test_where_no_thread_at_all_could_be_started_a_later_call_starts_the_background_and_the_worker(
    sqlite_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else could: of a segment that is not full for hours nothing would be synced or delivered all that time."""
    tracker = MLflowTracker("e", sqlite_uri, outbox_dir=tmp_path, settings=QUICK)
    outbox = tracker._outbox
    assert outbox is not None

    def fails(_: threading.Thread) -> None:
        msg = "can't start new thread"
        raise RuntimeError(msg)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fails)
        run = tracker.start_run("r")
        for step in range(100):
            assert run.log_metric("loss", step / 2, step=step)
        assert 1 == tracker.counters["worker_not_started"], "not each call tries"
    held: Any = run._journal
    live = held._sequence.live

    def is_looked_after() -> bool:
        run.log_metric("later", 0.5, step=0)
        return bool(left(outbox).delivered and live.synced)

    eventually(is_looked_after, 60, "it is synced and delivered")
    assert held._sequence.live is live
    assert live.limit > live.offset, "a call is fast again"
    tracker.close(60)


def test_a_ledger_directory_that_is_not_safe_costs_no_event_and_raises_nothing(
    sqlite_uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The worker says what is wrong and how to mend it; once it is mended, everything arrives."""
    settings = dataclasses.replace(QUICK, ledger_dir=tmp_path / "ledgers")
    with MLflowTracker("e", sqlite_uri, outbox_dir=tmp_path / "outbox", settings=settings) as tracker:
        assert tracker.outbox_path is not None
        place = tmp_path / "ledgers" / OutboxDirectory.open(tracker.outbox_path).identity.id
        place.mkdir(parents=True)
        place.chmod(0o755)
        with tracker.start_run("r") as run:
            run.log_metric("loss", 0.5, step=0)
        with tracker.start_run(run_id=run.run_id) as again:
            assert again.log_metric("loss", 0.25, step=1)
        assert "r" == tracker.get_all_runs()[0]["run_name"]
        eventually(lambda: "chmod 700" in caplog.text, message="the remedy")
        assert not tracker.flush(0.1)
        place.chmod(0o700)
        assert tracker.flush(60)
    assert 0.25 == the_run(sqlite_uri, "e").data.metrics["loss"]


def test_outboxes_share_a_directory_for_ledgers_and_nothing_else(
    sqlite_uri: str, file_uri: str, tmp_path: Path
) -> None:
    """What is known of one destination says nothing of another."""
    settings = dataclasses.replace(QUICK, ledger_dir=tmp_path / "ledgers")
    trackers = [
        MLflowTracker("e", uri, outbox_dir=tmp_path / "outbox", settings=settings) for uri in (sqlite_uri, file_uri)
    ]
    for tracker in trackers:
        with tracker.start_run("r") as run:
            run.log_metric("loss", 0.5)
        result = tracker.close(60)
        assert (3, 0) == (result.delivered, result.pending)
    ids = [OutboxDirectory.open(tracker.outbox_path).identity.id for tracker in trackers if tracker.outbox_path]
    assert sorted(ids) == sorted(path.name for path in (tmp_path / "ledgers").iterdir())


def test_a_disk_that_does_not_let_journals_be_read_raises_nothing_into_a_program(
    sqlite_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F21: flush and close say that something is left, and count; what a signal handler raises is still raised."""
    tracker = MLflowTracker("unread", sqlite_uri, outbox_dir=tmp_path / "outbox", settings=QUICK)
    with tracker, monkeypatch.context() as patch:
        run = tracker.start_run()
        run.log_metric("loss", 1.0)
        assert tracker.flush(60)

        def fail(*_: object) -> bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        patch.setattr(reader, "number_behind", fail)
        here = __name__.partition(".")[0]
        # As if the disk had answered: what a test raises is else taken for a signal handler's.
        patch.setattr(disk, "_OWN_FRAMES", disk._OWN_FRAMES | {here})
        assert FlushResult(pending=1) == dataclasses.replace(tracker.flush(0.3), delivered=0)
        assert not tracker.close(0.1)
        assert tracker.counters["backlog_unread"] > 1
        patch.setattr(disk, "_OWN_FRAMES", disk._OWN_FRAMES - {here})
        with pytest.raises(OSError, match="Input/output"):
            tracker.flush(1)
        patch.undo()
        assert tracker.flush(60)


def test_a_run_that_the_disk_does_not_give_is_pending_and_holds_up_no_flush(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One without a time returns when nothing else is left; what can be read of the others is counted."""
    withheld, other = offline(tmp_path, runs=2)
    directory, counters = OutboxDirectory.open(outbox_of(tmp_path)), Counters()
    watch = Watch(directory, Settings(), counters)
    monkeypatch.setattr(flush, "_BLIND", 0.1)
    monkeypatch.setattr(flush, "worker_of", lambda _: Holder("host", 1, "thread"))
    monkeypatch.setattr(disk, "_OWN_FRAMES", disk._OWN_FRAMES | {"commands"})  # as if the disk had answered
    with monkeypatch.context() as patch:
        withhold(patch, withheld)
        found, ends = watch.measure()
        assert (14, True) == (found.pending, counters["backlog_unread"] > 0)
        shutil.rmtree(directory.run(other))
        assert FlushResult(pending=1) == watch.until_delivered(None)
    assert 13 == watch.measure(ends)[0].pending, "the disk gives it again"


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> FailingDisk:
    """The disk of all journals that are made from now on."""
    disk = FailingDisk()
    monkeypatch.setattr(journal, "SystemDisk", lambda: disk)
    return disk


def test_what_the_disk_has_not_taken_is_pending(sqlite_uri: str, tmp_path: Path, failing: FailingDisk) -> None:
    """A flush is not true while acknowledged events are in memory only; once the disk is well, they arrive."""
    with MLflowTracker("memory", sqlite_uri, outbox_dir=tmp_path / "outbox", settings=QUICK) as tracker:
        run = tracker.start_run()
        assert tracker.flush(60)
        failing.fail("write", error=errno.ENOSPC, times=None)
        assert all(run.log_metric("loss", step / 2, step=step) for step in range(10))
        result = tracker.flush(0.3)
        assert (False, 10) == (bool(result), result.pending)
        failing.clear()
        assert tracker.flush(60)
    assert numbered(10) == points(sqlite_uri, the_run(sqlite_uri, "memory").info.run_id, "loss")


def test_a_failing_disk_can_be_put_under_a_tracker(sqlite_uri: str, tmp_path: Path) -> None:
    """As a program's own tests have it: what waits is kept, the process that delivers syncs nothing in its place."""
    disk = FailingDisk()
    with MLflowTracker("own test", sqlite_uri, outbox_dir=tmp_path / "outbox", settings=QUICK) as tracker:
        disk.under(tracker)
        run = tracker.start_run()
        run.log_metric("loss", 0.0, step=0)
        assert tracker.flush(60)
        eventually(lambda: disk.count("datasync") > 0)
        disk.fail("write", error=errno.ENOSPC, times=None)
        assert all(run.log_metric("loss", step / 2, step=step) for step in range(1, 10))
        assert 9 == tracker.flush(0.1).pending
        disk.clear()
        assert tracker.flush(60)
    assert numbered(10) == points(sqlite_uri, the_run(sqlite_uri, "own test").info.run_id, "loss")
    off = MLflowTracker("own test", sqlite_uri, settings=Settings(disabled=True))
    with pytest.raises(ValueError, match="the tracker is disabled"):
        disk.under(off)


def test_a_flush_waits_for_a_disk_that_recovers(sqlite_uri: str, tmp_path: Path, failing: FailingDisk) -> None:
    """And then for what came to the disk only now."""
    settings = dataclasses.replace(QUICK, sync_interval=60.0)
    with MLflowTracker("memory", sqlite_uri, outbox_dir=tmp_path / "outbox", settings=settings) as tracker:
        run = tracker.start_run()
        assert tracker.flush(60)
        failing.fail("write", error=errno.ENOSPC, times=4)
        assert run.log_metric("loss", 0.0, step=0)
        assert tracker.flush(60)
        assert failing.count("write") > 4
        assert numbered(1) == points(sqlite_uri, the_run(sqlite_uri, "memory").info.run_id, "loss")


def test_closing_one_tracker_gives_up_its_own_events_in_memory_and_no_others(
    sqlite_uri: str, tmp_path: Path, failing: FailingDisk
) -> None:
    """What is given up is counted, and pending in what close returns; another tracker of the outbox keeps its own."""
    first, second = (MLflowTracker(name, sqlite_uri, outbox_dir=tmp_path, settings=QUICK) for name in ("a", "b"))
    one, other = first.start_run(), second.start_run()
    assert first.flush(60)
    failing.fail("write", error=errno.ENOSPC, times=None)
    for run in (one, other):
        assert all(run.log_metric("loss", step / 2, step=step) for step in range(10))
    result = first.close(0.3)
    assert (False, 20) == (bool(result), result.pending)
    assert 10 == first.counters["lost_in_memory"]
    failing.clear()
    assert second.close(60)
    assert 10 == first.counters["lost_in_memory"]
    assert numbered(10) == points(sqlite_uri, the_run(sqlite_uri, "b").info.run_id, "loss")


def test_what_the_disk_takes_before_the_exit_is_over_is_delivered(
    sqlite_uri: str, tmp_path: Path, failing: FailingDisk
) -> None:
    """Of a tracker that nobody closes: as where a disk was full, and what is delivered at the exit makes room."""
    tracker = MLflowTracker("memory", sqlite_uri, outbox_dir=tmp_path / "outbox", settings=QUICK)
    outbox, run = tracker._outbox, tracker.start_run()
    assert outbox is not None
    assert tracker.flush(60)
    failing.fail("write", error=errno.ENOSPC, times=None)
    assert all(run.log_metric("loss", step / 2, step=step) for step in range(10))
    room = threading.Timer(0.5, failing.clear)
    room.start()
    outbox.at_exit(stopwatch.seconds() + 60)
    room.join()
    assert "lost_in_memory" not in tracker.counters
    assert numbered(10) == points(sqlite_uri, the_run(sqlite_uri, "memory").info.run_id, "loss")


def test_an_exit_waits_no_longer_for_a_disk_than_it_may(tmp_path: Path, failing: FailingDisk) -> None:
    """What it has not taken by then is counted, and said to be lost; after ctrl-C there is no wait at all."""
    tracker = MLflowTracker("memory", "http://127.0.0.1:9", outbox_dir=tmp_path, settings=QUICK)
    outbox, run = tracker._outbox, tracker.start_run()
    assert outbox is not None
    failing.fail("write", error=errno.ENOSPC, times=None)
    assert run.log_metric("loss", 0.5, step=0)
    outbox.at_exit(0.0)
    assert 1 == tracker.counters["lost_in_memory"]


def forked(work: Callable[[], object]) -> None:
    """Do some work in a forked child, which has 30 seconds for it."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:  # noqa: BLE001 - said here, for pytest is the parent's
            traceback.print_exc()
        finally:
            os._exit(code)
    status: list[int] = []

    def ended() -> bool:
        found, code = os.waitpid(pid, os.WNOHANG)
        status.append(code)
        return bool(found)

    try:
        eventually(ended, message="the child ends")
    except AssertionError:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    assert 0 == os.waitstatus_to_exitcode(status[-1])


def test_what_a_child_has_in_memory_of_a_run_of_its_parent_s_is_pending_and_said_to_be_lost(
    tmp_path: Path, failing: FailingDisk
) -> None:
    """A run that was inherited is closed with the child's tracker as one of its own is."""
    tracker = MLflowTracker("e", "http://127.0.0.1:9", outbox_dir=tmp_path, worker="none")
    run = tracker.start_run()

    def work() -> None:
        before = tracker.flush(0).pending
        failing.fail("write", error=errno.ENOSPC, times=None)
        for step in range(10):
            assert run.log_metric("loss", 0.5, step=step)
        assert before + 10 == tracker.flush(0).pending
        tracker.close(0)
        assert 10 == tracker.counters["lost_in_memory"]

    forked(work)
    assert run.log_metric("loss", 0.5, step=0)
    tracker.close(0)


def test_a_fork_while_the_run_of_a_summary_is_started_leaves_the_child_able_to_start_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread is in the middle of it, for longer than a fork waits."""
    tracker = MLflowTracker("e", "http://127.0.0.1:9", outbox_dir=tmp_path, worker="none")
    start, entered, go_on = tracker.start_run, threading.Event(), threading.Event()

    def slow(*arguments: Any, **named: Any) -> Any:
        entered.set()
        go_on.wait(60)
        return start(*arguments, **named)

    monkeypatch.setattr(tracker, "start_run", slow)
    other = threading.Thread(target=tracker.log_visualizations, args=([],))
    other.start()
    assert entered.wait(30)

    def work() -> None:
        monkeypatch.setattr(tracker, "start_run", start)
        tracker.log_visualizations([])

    try:
        forked(work)
    finally:
        go_on.set()
        other.join()


def test_trouble_of_one_outbox_at_the_exit_is_said_and_does_not_touch_the_others(tmp_path: Path) -> None:
    """Whatever it is: the program ends as it would, and the others say what they have to say."""
    program = """
        import sys
        from mlflow_outbox import MLflowTracker, Settings

        for name in ("first", "second"):
            tracker = MLflowTracker(
                "e", "http://127.0.0.1:9", outbox_dir=f"{sys.argv[1]}/{name}", settings=Settings(exit_timeout=0.1)
            )
            tracker.start_run("r").log_metric("loss", 0.5, step=0)
            if name == "first":
                def broken(deadline):
                    raise LookupError("no such thing")
                tracker._outbox.at_exit = broken
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)],
        capture_output=True,
        check=False,
        timeout=250,
        text=True,
    )
    assert 0 == done.returncode
    assert "Traceback" not in done.stderr
    assert "at the exit: LookupError('no such thing')" in done.stderr
    assert "events wait in" in done.stderr


@pytest.mark.parametrize("worker", ["thread", "process"])
def test_a_tracker_that_is_made_after_its_outbox_was_removed_makes_it_anew(
    worker: WorkerKind, sqlite_uri: str, tmp_path: Path
) -> None:
    """As in a notebook in which somebody clears up: what the new tracker logs is kept and delivered, once."""
    first = MLflowTracker("e", sqlite_uri, outbox_dir=tmp_path / "root", worker=worker, settings=QUICK)
    first.start_run("before").log_metric("loss", 0.5, step=0)
    assert first.flush(200)  # where a process delivers, it imports MLflow
    assert first.outbox_path is not None
    first.outbox_path.rename(tmp_path / "removed")
    second = MLflowTracker("e", sqlite_uri, outbox_dir=tmp_path / "root", worker=worker, settings=QUICK)
    run = second.start_run("after")
    assert run.log_metric("loss", 0.5, step=0)
    assert second.close(200)
    assert "disk_errors" not in second.counters
    assert {"before", "after"} == {run["run_name"] for run in second.get_all_runs()}
    first.close(0)
