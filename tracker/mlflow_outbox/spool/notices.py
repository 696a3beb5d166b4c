"""Notices: what a journal tells others of itself.

Three have to know: the registry, which looks after the journal in the background, the outbox's directory, in which a
worker of any process finds runs with something new, and this process's own worker. None of them may cost an event: what
goes wrong here is counted, and told again with a later event, or found by the worker's next full look.

The journal is an argument of each call and not kept: a cycle of references would keep a journal, and its descriptor,
that nobody uses any more until the collector comes by.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from mlflow_outbox import stopwatch
from mlflow_outbox.counters import Counters
from mlflow_outbox.interrupts import forward
from mlflow_outbox.spool.directory import OutboxDirectory

if TYPE_CHECKING:
    from mlflow_outbox.spool.journal import Journal
    from mlflow_outbox.spool.registry import Registry
    from mlflow_outbox.spool.sequence import EventSequence

#: Seconds after which a logging call tells once more of a segment of which it could not tell all, or of no room.
_TELL_AGAIN: Final = 0.5
#: What it is remembered under that new events were said to be refused; who finds room again forgets it (``guard``).
FULL: Final = "full"


class Notices:
    """Tells the background and the worker about one journal.

    Args:
        directory: its outbox.
        counters: where workers that do not start, and refused events, are counted.
        registry: what looks after the journal in the background; None leaves that to the caller.
        wake: called to let the worker know; None where there is none.
    """

    def __init__(
        self,
        directory: OutboxDirectory,
        counters: Counters,
        registry: Registry | None,
        wake: Callable[[], None] | None,
    ) -> None:
        self._directory = directory
        self._counters = counters
        self._registry = registry
        self._wake = wake
        self._begun_again = self._full_again = 0.0

    @property
    def is_unattended(self) -> bool:
        """Whether nothing looks after the journal in the background."""
        return self._registry is None

    def watch(self, journal: Journal) -> bool:
        """Have the journal looked after; return whether it is, which it is not while no thread can be started."""
        return self._registry is None or self._registry.watch(journal)

    def hurry(self) -> None:
        """Have the background look at the journal soon."""
        if self._registry is not None:
            self._registry.hurry()

    def begun(self, journal: Journal, sequence: EventSequence) -> None:
        """Tell of a segment that was begun, if that is still to be told; what failed is told again, after a while."""
        if not sequence.unannounced or stopwatch.seconds() < self._begun_again:
            return
        is_told = self.watch(journal)
        try:
            self._directory.ring(journal.run.run_id)
        except OSError as error:  # a worker that is never told finds the segment at its next full look
            forward(error)
            is_told = False
        self._rouse()
        sequence.unannounced = not is_told
        self._begun_again = 0.0 if is_told else stopwatch.seconds() + _TELL_AGAIN
        sequence.refresh_limit()

    def full(self, journal: Journal, reason: str) -> None:
        """Count an event that is refused for want of room, and see to it that somebody looks for room, and makes some.

        Args:
            journal: whose event it is.
            reason: what there is no room for.
        """
        self._counters.add("refused_full")
        self._counters.warn_once(FULL, f"mlflow-outbox: new events are refused: {reason}")
        self.watch(journal)
        now = stopwatch.seconds()
        if now >= self._full_again:
            self._full_again = now + _TELL_AGAIN
            self._rouse()  # who begins with an outbox that is full begins no segment, with which it would be told

    def _rouse(self) -> None:
        """See to it that somebody delivers."""
        if self._wake is None:
            return
        try:
            self._wake()
        except Exception as error:  # noqa: BLE001 - whatever keeps a worker from starting must not cost an event
            forward(error)
            self._counters.add("worker_not_started")
            self._counters.warn_once(
                "worker", f"mlflow-outbox: no worker could be started ({error!r}); events stay on disk"
            )
