"""When to try again: the tenacity policies of delivery.

Delivery looks after many runs with few threads, so nothing here sleeps. ``Backoff`` drives a ``tenacity.Retrying``
by hand, the way tenacity's asynchronous variants do: each failure is handed in as an outcome, the policy answers
with a pause, and the caller decides what to do until then. A flush or a shutdown therefore never waits for a pause
to end.

The policy: pauses double from ``retry_initial``, with full jitter, and end at ``retry_max``; a Retry-After of the
server is waited for, but never longer than ``retry_max``; the number of attempts has no limit.
"""

from __future__ import annotations

import email.utils
import random
import re
import threading
from collections.abc import Callable
from datetime import timezone
from typing import Final, NoReturn

import tenacity
from tenacity.wait import wait_base, wait_exponential, wait_random_exponential

from mlflow_outbox import stopwatch
from mlflow_outbox_worker.outcome import classify
from mlflow_outbox_worker.sink import SinkError

#: Draws pauses. A program that seeds Python's own generator gets the same numbers from it whether its server answers or
#: not; and a hundred programs that seed it alike do not all come back at the same moment.
_uniform: Final[Callable[[float, float], float]] = random.SystemRandom().uniform
_SECONDS = re.compile(r"\d+(\.\d+)?")


def parse_retry_after(value: str | None, now: float) -> float | None:
    """Return the seconds that a Retry-After header asks to wait; None when it is absent or not readable.

    Args:
        value: the header: seconds, or an HTTP date.
        now: seconds since the epoch, by the clock that wrote the date; a date before it gives 0.
    """
    if value is None:
        return None
    value = value.strip()
    if _SECONDS.fullmatch(value):
        return float(value)
    try:
        date = email.utils.parsedate_to_datetime(value)
        if date.tzinfo is None:
            date = date.replace(tzinfo=timezone.utc)
        return max(0.0, date.timestamp() - now)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


def is_retryable(error: BaseException) -> bool:
    """Return whether the same request may succeed later without anybody's help."""
    return isinstance(error, SinkError) and classify(error).kind == "retry"


class wait_full_jitter(wait_random_exponential):  # noqa: N801 - named like tenacity's strategies
    """tenacity's random exponential wait with a random source of one's own.

    Args:
        initial: seconds of the widest first wait; doubled for each further attempt.
        maximum: seconds that no wait exceeds.
        uniform: draws a number between its two arguments.
    """

    def __init__(self, initial: float, maximum: float, uniform: Callable[[float, float], float]) -> None:
        super().__init__(multiplier=initial, max=maximum)
        self._uniform = uniform

    def __call__(self, retry_state: tenacity.RetryCallState) -> float:
        """Return the seconds to wait after the failed attempt."""
        return self._uniform(0.0, wait_exponential.__call__(self, retry_state))


class wait_retry_after(wait_base):  # noqa: N801 - named like tenacity's strategies
    """Wait as another strategy says, at least as long as the server asked, at most ``maximum`` seconds."""

    def __init__(self, otherwise: wait_base, maximum: float) -> None:
        self._otherwise = otherwise
        self._maximum = maximum

    def __call__(self, retry_state: tenacity.RetryCallState) -> float:
        """Return the seconds to wait after the failed attempt."""
        error = retry_state.outcome.exception() if retry_state.outcome is not None else None
        asked = error.retry_after if isinstance(error, SinkError) else None
        return min(max(self._otherwise(retry_state), asked or 0.0), self._maximum)


def policy(initial: float, maximum: float, uniform: Callable[[float, float], float] = _uniform) -> tenacity.Retrying:
    """Return the policy of delivery as tenacity knows it; it must be driven by hand, it refuses to sleep.

    Args:
        initial: seconds of the widest first wait.
        maximum: seconds that no wait exceeds, whatever the server asks for.
        uniform: draws a number between its two arguments.
    """
    return tenacity.Retrying(
        wait=wait_retry_after(wait_full_jitter(initial, maximum, uniform), maximum),
        stop=tenacity.stop_never,
        retry=tenacity.retry_if_exception(is_retryable),
        sleep=_refuse_to_sleep,
        reraise=True,
    )


class Backoff:
    """The pauses between attempts at one thing, for instance one run or one destination.

    Args:
        initial: seconds of the widest first pause, ``Settings.retry_initial``.
        maximum: seconds that no pause exceeds, ``Settings.retry_max``.
        uniform: draws a number between its two arguments.
        clock: seconds of a clock that never goes back.

    Attributes:
        due: when the next attempt is due, in seconds of ``clock``; 0 when nothing has failed since the last success.
    """

    def __init__(
        self,
        initial: float,
        maximum: float,
        *,
        uniform: Callable[[float, float], float] = _uniform,
        clock: Callable[[], float] = stopwatch.seconds,
    ) -> None:
        self._retrying = policy(initial, maximum, uniform)
        self._clock = clock
        self._changing = threading.Lock()
        self._state = tenacity.RetryCallState(self._retrying, fn=None, args=(), kwargs={})
        self.due = 0.0

    @property
    def attempts(self) -> int:
        """How many attempts in a row have failed."""
        return self._state.attempt_number - 1

    def failed(self, error: SinkError) -> float:
        """Take a failed attempt into account and return the seconds to wait before the next one.

        Raises:
            SinkError: the error itself, when no later attempt can succeed without help; nothing has changed then.
        """
        with self._changing:  # several lanes learn at the same moment that a server is gone
            # Statistics are kept per thread, and the next failure may be reported by another one than the last.
            self._retrying.begin()
            self._state.set_exception((type(error), error, error.__traceback__))
            try:
                # tenacity answers with DoSleep, a float: the attempts are without limit, so there is always a next one.
                pause = float(self._retrying.iter(self._state))  # type: ignore[arg-type]  # see above
            except SinkError:
                self._state.outcome = None
                raise
            self._state.prepare_for_next_attempt()
            self.due = self._clock() + pause
            return pause

    def succeeded(self) -> None:
        """Forget the failures: the next pause is a first one again."""
        with self._changing:
            self._state = tenacity.RetryCallState(self._retrying, fn=None, args=(), kwargs={})
            self.due = 0.0

    def hurry(self) -> None:
        """Make the next attempt due now, without forgetting how many have failed; for flush and for a person's wish."""
        self.due = 0.0

    def ready(self) -> bool:
        """Return whether the next attempt is due."""
        return self._clock() >= self.due


def _refuse_to_sleep(seconds: float) -> NoReturn:
    msg = f"a delivery thread must not sleep for {seconds} s; use Backoff"
    raise RuntimeError(msg)
