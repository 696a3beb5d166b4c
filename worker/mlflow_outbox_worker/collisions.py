"""Requests that a database refuses for a row that is there: two that met at it, or one that never fits.

Who meets another request at a row finds it the next time, and all is well. The same is answered to what can never be
carried out, a dataset with two tags of one name for instance. Only time tells one from the other: what is refused so
``TRIES`` times in a row, over ``SECONDS``, is refused for good, since all that follows in its run would wait for it
without end. No outage comes into it: the destination answers each time. Nothing is remembered beyond the process.

Of a batch each point, param and tag is judged alone, by its name: to many databases (MySQL, SQL Server) ``c`` is ``C``,
and a run that has one of them never gets the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Final

from mlflow_outbox import stopwatch
from mlflow_outbox.spool.events import Request
from mlflow_outbox_worker.outcome import Outcome, met_a_row
from mlflow_outbox_worker.planner import Batch
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
        #: By run, kind and name, until what has that name is taken; batches of one run may go side by side.
        self._names: dict[tuple[str, str, str], _Met] = {}

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

    def judged_batch(self, run_id: str, batch: Batch, error: SinkError, outcome: Outcome) -> Outcome:
        """Return what is to be done about a batch that failed: of several things each is sent alone.

        Args:
            run_id: the run that it is of.
            batch: of the run.
            error: how it failed.
            outcome: what that means by itself.
        """
        if outcome.kind != "retry" or not met_a_row(error):
            return outcome
        if len(batch) > 1:
            return Outcome("split", outcome.reason)
        for kind, name in _names(batch):
            met = self._names.setdefault((run_id, kind, name), _Met((kind, 0, 0), self._clock()))
            met.tries += 1
            if met.tries >= TRIES and self._clock() - met.since >= SECONDS:
                return Outcome("dead_letter", outcome.reason)
        return outcome

    def passed_batch(self, run_id: str, batch: Batch) -> None:
        """Take note that a batch was taken."""
        if self._names:  # as good as never
            for kind, name in _names(batch):
                self._names.pop((run_id, kind, name), None)

    def passed(self, run_id: str) -> None:
        """Take note that a request of a run went well."""
        self._met.pop(run_id, None)


def _names(batch: Batch) -> Iterator[tuple[str, str]]:
    yield from {("metric", point.key) for point in batch.points}
    yield from (("param", key) for key in batch.params)
    yield from (("tag", key) for key in batch.tags)
