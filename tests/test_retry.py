"""When the next attempt is due."""

from __future__ import annotations

import random
import threading
import time
from email.utils import formatdate
from types import SimpleNamespace
from typing import Any

import pytest
import tenacity
from hypothesis import given
from hypothesis import strategies as st

from mlflow_outbox.counters import Counters
from mlflow_outbox.settings import Settings
from mlflow_outbox_worker.gate import Gate
from mlflow_outbox_worker.outcome import classify
from mlflow_outbox_worker.retry import Backoff, is_retryable, parse_retry_after, policy
from mlflow_outbox_worker.sink import SinkError

NOW = 1_700_000_000.0


def widest(low: float, high: float) -> float:
    """Draw the largest number, as a source of chance that is none."""
    return high


def refused(retry_after: float | None = None) -> SinkError:
    """What the sink raises for a busy server."""
    return SinkError("busy", kind="answer", status=503, retry_after=retry_after)


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        """Return the seconds that the test set."""
        return self.now


def test_pauses_double_up_to_the_largest() -> None:
    """The window of the jitter grows from the initial pause to the maximum and stays there."""
    backoff = Backoff(0.5, 6.0, uniform=widest)
    assert [0.5, 1.0, 2.0, 4.0, 6.0, 6.0] == [backoff.failed(refused()) for _ in range(6)]
    assert 6 == backoff.attempts


def test_jitter_is_full() -> None:
    """Every pause is drawn from nothing to the whole window, so that many workers spread out."""
    windows: list[tuple[float, float]] = []

    def draw(low: float, high: float) -> float:
        windows.append((low, high))
        return (low + high) / 2

    backoff = Backoff(1.0, 60.0, uniform=draw)
    assert [0.5, 1.0] == [backoff.failed(refused()), backoff.failed(refused())]
    assert [(0.0, 1.0), (0.0, 2.0)] == windows


def test_pauses_take_nothing_from_the_program_s_random_numbers() -> None:
    """What a seeded program draws does not depend on whether its server answers."""
    random.seed(1)
    before = random.getstate()
    backoff = Backoff(1.0, 60.0)
    pauses = {backoff.failed(SinkError("away", kind="connection", sent=False)) for _ in range(5)}
    assert before == random.getstate()
    random.seed(1)
    assert pauses.isdisjoint({backoff.failed(SinkError("away", kind="connection", sent=False)) for _ in range(5)})


def test_attempts_have_no_limit() -> None:
    """After ten thousand failures there is still a next attempt, in bounded time."""
    backoff = Backoff(0.5, 60.0)
    assert all(0 <= backoff.failed(refused()) <= 60.0 for _ in range(10_000))
    assert 10_000 == backoff.attempts


@pytest.mark.parametrize(("asked", "pause"), [(7.0, 7.0), (0.0, 0.5), (None, 0.5), (1e9, 60.0), (float("inf"), 60.0)])
def test_the_server_is_given_the_time_it_asks_for(asked: float | None, pause: float) -> None:
    """At least Retry-After, at least the back-off, at most the maximum."""
    assert pause == Backoff(0.5, 60.0, uniform=widest).failed(refused(asked))


def test_success_starts_over() -> None:
    """The failures before a success do not lengthen the pauses after it."""
    backoff = Backoff(0.5, 60.0, uniform=widest)
    backoff.failed(refused())
    backoff.failed(refused())
    backoff.succeeded()
    assert (0, 0.0, True) == (backoff.attempts, backoff.due, backoff.ready())
    assert 0.5 == backoff.failed(refused())


def test_the_next_attempt_is_due_when_the_pause_is_over() -> None:
    """Nobody sleeps: the caller asks whether it is time."""
    clock = Clock()
    backoff = Backoff(4.0, 60.0, uniform=widest, clock=clock)
    assert backoff.ready()
    backoff.failed(refused())
    assert (104.0, False) == (backoff.due, backoff.ready())
    clock.now = 104.0
    assert backoff.ready()


def test_a_flush_does_not_wait_for_a_pause() -> None:
    """Hurrying makes the attempt due at once and forgets nothing."""
    backoff = Backoff(4.0, 60.0, uniform=widest, clock=Clock())
    backoff.failed(refused())
    backoff.hurry()
    assert (True, 1) == (backoff.ready(), backoff.attempts)
    assert 8.0 == backoff.failed(refused())


def test_an_error_that_no_retry_helps_is_handed_back() -> None:
    """The policy refuses to wait for a person, and can be used again afterwards."""
    backoff = Backoff(0.5, 60.0, uniform=widest)
    wrong = SinkError("wrong password", kind="answer", status=401)
    with pytest.raises(SinkError) as caught:
        backoff.failed(wrong)
    assert wrong is caught.value
    assert 0 == backoff.attempts
    assert 0.5 == backoff.failed(refused())


def test_failures_may_be_reported_by_different_threads() -> None:
    """A run is delivered by whichever thread is free."""
    backoff = Backoff(0.5, 60.0, uniform=widest)
    pauses: list[float] = []
    for _ in range(3):
        thread = threading.Thread(target=lambda: pauses.append(backoff.failed(refused())))
        thread.start()
        thread.join()
    assert [0.5, 1.0, 2.0] == pauses


def test_failures_that_are_reported_at_the_same_moment_are_two() -> None:
    """Several runs are sent side by side: when the server goes, each of them fails."""
    entered, go_on = threading.Event(), threading.Event()

    def uniform(_low: float, high: float) -> float:
        entered.set()
        assert go_on.wait(30)
        return high

    backoff = Backoff(1.0, 60.0, uniform=uniform)
    pauses: list[float] = []
    threads = [
        threading.Thread(target=lambda: pauses.append(backoff.failed(SinkError("away", kind="connection", sent=False))))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
        assert entered.wait(30)
    threads[1].join(0.2)  # as long as it takes one that does not wait for the other
    assert [] == pauses
    go_on.set()
    for thread in threads:
        thread.join(30)
    assert ([1.0, 2.0], 2) == (sorted(pauses), backoff.attempts)


def test_the_policy_never_sleeps() -> None:
    """Used as tenacity is used elsewhere, it fails loudly instead of blocking a delivery thread."""

    def request() -> None:
        raise refused()

    with pytest.raises(RuntimeError, match="must not sleep"):
        policy(0.5, 60.0)(request)


def test_only_errors_of_the_sink_are_retryable() -> None:
    """A mistake in the program is not waited out."""
    assert is_retryable(refused())
    assert not is_retryable(ValueError("a mistake"))
    assert not is_retryable(tenacity.TryAgain())


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("7", 7.0),
        (" 0 ", 0.0),
        ("1.5", 1.5),
        ("1000000000", 1e9),
        (formatdate(NOW + 30, usegmt=True), 30.0),
        (formatdate(NOW - 30, usegmt=True), 0.0),
        ("-5", None),
        ("", None),
        ("soon", None),
        ("nan", None),
        ("Wed, 99 Foo 2024 25:61:61 GMT", None),
        ("9" * 5000, float("inf")),
    ],
)
def test_retry_after_is_read_as_seconds_or_as_a_date(header: str | None, seconds: float | None) -> None:
    """Garbage asks for nothing, the past asks for no wait."""
    assert seconds == parse_retry_after(header, NOW)


@given(st.text())
def test_no_header_breaks_the_parser(header: str) -> None:
    """Whatever a server sends, the answer is a pause or nothing."""
    seconds = parse_retry_after(header, NOW)
    assert seconds is None or seconds >= 0


def test_a_pause_too_short_to_tell_is_told_as_none(caplog: pytest.LogCaptureFixture) -> None:
    """No "next try in 0.0 s"."""
    settings = Settings(retry_initial=0.01, retry_max=0.02)
    gate = Gate("http://127.0.0.1:9", settings, Counters(), clock=time.monotonic, now_ms=lambda: 0)
    error = refused()
    gate.failed(None, error, classify(error), 0)
    assert caplog.messages[-1].endswith("Next try now")


def test_a_server_that_fails_now_and_then_does_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """It is said once in ten minutes; an outage that goes on is said then, one after a while at its beginning."""
    clock, error = Clock(), refused()
    gate = Gate("http://127.0.0.1:9", Settings(), Counters(clock), clock=clock, now_ms=lambda: 0)
    ledger: Any = SimpleNamespace(meta=lambda _: None, set_meta=lambda *_: None)
    for _ in range(3600):
        gate.failed(ledger, error, classify(error), 0)
        clock.now += 0.5
        gate.succeeded(ledger)
        clock.now += 0.5
    assert 6 == len(caplog.messages)
    caplog.clear()
    gate.failed(ledger, error, classify(error), 0)
    gate.succeeded(ledger)
    for _ in range(120):
        gate.failed(ledger, error, classify(error), 0)
        clock.now += 60
    assert 2 == len(caplog.messages), "one that begins within ten minutes of the last word is not kept back for good"
    gate.succeeded(ledger)
    gate.failed(ledger, error, classify(error), 0)
    assert 3 == len(caplog.messages)
