"""Whose turn it is: runs that wait for another one."""

from __future__ import annotations

from mlflow_outbox import Settings
from mlflow_outbox_worker.schedule import Schedule
from spools import RUN

OTHER = "b" * 32


class Clock:
    """Seconds, of which a test says how many there are."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """Return them."""
        return self.now


def test_a_run_that_waits_for_what_nobody_knows_is_tried_ever_more_rarely() -> None:
    """All that its turn asks the server before it comes to that would be asked five times a second for ten minutes."""
    clock, turns = Clock(), list[float]()
    schedule = Schedule(Settings(), clock)
    schedule.mark(RUN)
    while clock.now < 600:
        for run_id in schedule.take(1):
            turns.append(clock.now)
            schedule.waits(run_id, after="")
            schedule.release(run_id)
        clock.now += 0.05
    assert 4 <= sum(begun < 3 for begun in turns), "what it waits for is there in a moment, as a rule"
    assert len(turns) <= 130


def test_a_run_that_waits_for_another_has_its_turn_when_that_had_a_good_one() -> None:
    """However long it has waited; and when it had one itself it begins to wait anew."""
    clock = Clock()
    schedule = Schedule(Settings(), clock)
    for run_id in (RUN, OTHER):
        schedule.mark(run_id)
    assert [RUN, OTHER] == schedule.take(2)
    for _ in range(20):
        schedule.waits(RUN, after=OTHER)
    schedule.release(RUN)
    assert [] == schedule.take(2)
    schedule.turned(OTHER, {}, live=False, more=False)
    schedule.release(OTHER)
    assert [RUN] == schedule.take(2)
    schedule.turned(RUN, {}, live=False, more=False)
    schedule.waits(RUN, after=OTHER)
    schedule.release(RUN)
    clock.now += 2 * Settings().poll_interval
    assert [RUN] == schedule.take(2)


def test_a_run_that_was_sent_before_the_turn_was_over_for_which_it_had_waited_stays_so() -> None:
    """The other one was there from the first of its requests on. A replay waits for ever for a run that is not sent."""
    clock = Clock()
    schedule = Schedule(Settings(), clock)
    for run_id in (RUN, OTHER):
        schedule.mark(run_id)
    assert [RUN, OTHER] == schedule.take(2)
    schedule.waits(RUN, after=OTHER)
    schedule.release(RUN)
    clock.now += 1
    assert [RUN] == schedule.take(2), "while the other one goes on with its turn"
    schedule.turned(RUN, {}, live=False, more=False)
    schedule.sent(RUN, ())
    schedule.release(RUN)
    schedule.turned(OTHER, {}, live=False, more=False)
    schedule.sent(OTHER, ())
    schedule.release(OTHER)
    assert ["sent", "sent"] == [schedule.standing(run_id).state for run_id in (RUN, OTHER)]
