"""Requests that a database refuses for a row that is there: two that met at it, or one that never fits.

Who meets another request at a row finds it the next time, and all is well. The same is answered to what can never be
carried out, a dataset with two tags of one name for instance. Only time tells one from the other: what is refused so
``TRIES`` times in a row, over ``SECONDS``, is refused for good, since all that follows in its run would wait for it
without end. No outage comes into it: the destination answers each time. Nothing is remembered beyond the process.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Final

from mlflow_outbox import stopwatch
from mlflow_outbox.spool.events import Request
from mlflow_outbox_worker.outcome import Outcome, met_a_row
from mlflow_outbox_worker.sink import SinkError

#: Attempts in a row at one request before it is judged.
TRIES: Final = 5
#: Seconds, at least, from the first of them to the last.
SECONDS: Final = 30.0


@dataclasses.dataclass
class _Met:
    request: tuple[str, int, int]
    since: float
    tries: int = 0


class Collisions:
    """The requests at which runs stand; used by several threads for different runs.

    Args:
        clock: seconds of a clock that never goes back.
    """

    def __init__(self, clock: Callable[[], float] = stopwatch.seconds) -> None:
        self._clock = clock
        self._met: dict[str, _Met] = {}

    def judged(self, run_id: str, request: Request, error: SinkError, outcome: Outcome) -> Outcome:
        """Return what is to be done about a request that failed.

        Args:
            run_id: the run whose event it is.
            request: the event.
            error: how it failed.
            outcome: what that means by itself.
        """
        if outcome.kind != "retry" or not met_a_row(error):
            return outcome
        about = (request.operation, request.time_ms, hash(request.arguments))
        met = self._met.get(run_id)
        if met is None or met.request != about:
            met = self._met[run_id] = _Met(about, self._clock())
        met.tries += 1
        if met.tries < TRIES or self._clock() - met.since < SECONDS:
            return outcome
        del self._met[run_id]
        return Outcome("dead_letter", outcome.reason)

    def passed(self, run_id: str) -> None:
        """Take note that a request of a run went well."""
        self._met.pop(run_id, None)
