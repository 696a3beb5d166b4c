"""Calls that follow each other fast let the background have the interpreter when it needs it, and at no other time."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from mlflow_outbox import MLflowTracker, Settings, courtesy
from mlflow_outbox.courtesy import Courtesy
from mlflow_outbox.spool.disk import SystemDisk

MS = 1_000_000


def offered(politeness: Courtesy, begin: int, calls: int, apart: int) -> list[int]:
    """Make calls so many ns apart; return the ms after the first one of those that gave the interpreter away."""
    times = range(begin, begin + calls * apart, apart)
    return [(now - begin) // MS for now in times if now >= politeness.due and politeness.give_way(now)]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> int:
    """Stop the clock at a time, and return it."""
    now = 1_700_000_000_000_000_000
    monkeypatch.setattr(time, "time_ns", lambda: now)
    return now


def test_nothing_is_offered_that_nobody_wants(clock: int) -> None:
    """Before a background was there, and after it has left."""
    politeness = Courtesy()
    assert [] == offered(politeness, clock, 5000, MS)
    politeness.works()
    politeness.leaves()
    assert [] == offered(politeness, clock, 5000, MS)


def test_a_background_that_sleeps_is_offered_it_when_it_wakes_up(clock: int) -> None:
    """Once a millisecond from then on, and after a while more and more rarely, should it not come."""
    politeness = Courtesy()
    politeness.sleeps(0.5)
    times = offered(politeness, clock, 10_000, MS // 5)
    assert [500, 501, 502] == times[:3]
    assert times[:20] == list(range(500, 520))
    assert 1.5 < (times[-1] - times[-2]) / (times[-2] - times[-3]) < 2.5, times


def test_one_that_works_is_offered_it_at_once_and_for_longer(clock: int) -> None:
    """It will want it again each time that it lets go of it; a program's own thread that syncs changes nothing."""
    politeness = Courtesy()
    politeness.works()
    assert list(range(1, 300)) == offered(politeness, clock, 300, MS)
    politeness.waits()
    assert 20 < len(offered(politeness, clock, 300, MS)) < 30
    own = Courtesy()
    own.waits()
    assert [] == offered(own, clock, 300, MS)


def test_calls_that_are_far_apart_offer_nothing(clock: int) -> None:
    """There the thread that waits asks for it, which is faster and costs them nothing."""
    politeness = Courtesy()
    politeness.works()
    assert [] == offered(politeness, clock + 100 * MS, 100, 10 * MS)


def test_the_first_of_several_that_want_it_counts(clock: int) -> None:
    """One that sleeps for long does not keep another one from it."""
    politeness = Courtesy()
    politeness.sleeps(0.1)
    other = threading.Thread(target=politeness.sleeps, args=(5.0,))
    other.start()
    other.join()
    assert 100 == offered(politeness, clock, 1000, MS // 5)[0]
    politeness.leaves()
    politeness.give_way(clock + 100 * MS)
    assert politeness.due >= clock + 5000 * MS


def test_a_forked_child_has_nobody_to_be_courteous_to() -> None:
    """The threads that wanted it are its parent's."""
    courtesy.courtesy.works()
    try:
        pid = os.fork()
        if not pid:
            os._exit(int(courtesy.courtesy.due <= time.time_ns() + 3600 * 10**9))
        assert 0 == os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    finally:
        courtesy.courtesy.leaves()


def kept_waiting_ns() -> int:
    """Return for how long this thread could have gone on and had no processor."""
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1])


def test_a_round_of_syncing_gets_through_in_few_calls_that_leave_no_pause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a program that lets go of the interpreter for its writes alone a round took a hundred of its calls.

    Calls that pass while a busy disk syncs, or while there is no processor for the round, are none that it waits for.
    """
    step, apart, lengths = 0, 200_000, list[int]()
    monkeypatch.setattr(SystemDisk, "datasync", lambda *_: time.sleep(0.0005))  # never longer
    settings = Settings(sync_interval=0.05)
    tracker = MLflowTracker("courtesy", "http://127.0.0.1:9", outbox_dir=tmp_path, worker="none", settings=settings)
    assert tracker._outbox is not None
    caretaker = tracker._outbox._caretaker
    whole = caretaker.round

    def counted() -> None:
        kept = kept_waiting_ns()
        before = step
        whole()
        after = step
        lengths.append(after - before - (kept_waiting_ns() - kept) // apart)

    monkeypatch.setattr(caretaker, "round", counted)
    run = tracker.start_run("fast")
    while len(lengths) < 20 and step < 200_000:
        run.log_metric("loss", 0.5, step=step)
        step += 1
        pause = time.perf_counter_ns() + apart
        while time.perf_counter_ns() < pause:
            pass
    tracker.close(0)
    assert len(lengths) >= 20, step
    assert sorted(lengths)[10] < 60, lengths
