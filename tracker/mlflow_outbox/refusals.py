"""What becomes of a logging call that cannot be kept: it is counted, and said once per kind and key, or raised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from mlflow_outbox.counters import Counters, shown
from mlflow_outbox.errors import EventRefused, OutboxFull
from mlflow_outbox.interrupts import forward
from mlflow_outbox.spool.events import MAX_KEY_CHARS

#: Reasons that are trouble with the disk or the outbox, whatever was to be kept: said once.
_OF_THE_DISK: Final = frozenset({"full", "no_room_for_file"})


class Refusals:
    """The one place at which an error of a logging call ends.

    Args:
        counters: where refusals are counted and said.
        strict: raise them into the experiment.
    """

    def __init__(self, counters: Counters, *, strict: bool) -> None:
        self.strict: Final = strict
        self._counters = counters

    def attempt(self, log: Callable[[], bool], about: object = "") -> bool:
        """Run one logging call and return what it returns, or False when it fails.

        Args:
            log: the call.
            about: the key, or path, that a refusal is about.

        Raises:
            EventRefused: only when strict; as any other error then. What a signal handler raised is raised always.
        """
        try:
            return bool(log())
        except EventRefused as refused:
            return self.refuse(refused, about)
        except Exception as error:  # noqa: BLE001 - a logging call never raises into the experiment; counted and said
            return self.failed(error)

    def failed(self, error: Exception, about: object = "") -> bool:
        """Return False for a logging call that ended with an error, after it was counted and said.

        Args:
            error: what it raised.
            about: the key, or path, that it was about.

        Raises:
            EventRefused: only when strict; as any other error then.
        """
        if isinstance(error, EventRefused):
            return self.refuse(error, about)
        forward(error)
        if self.strict:
            raise error
        self._counters.add("internal_errors")
        self._counters.warn_once(
            ("internal", type(error), _remembered(about)),
            f"mlflow-outbox: a logging call failed: {shown(error, 300)}",
        )
        return False

    def refuse(self, refused: EventRefused, about: object) -> bool:
        """Return False for what is refused, after it was counted and said.

        Args:
            refused: why.
            about: the key, or path, that it is about.

        Raises:
            EventRefused: only when strict.
        """
        forward(refused)
        if not isinstance(refused, OutboxFull):  # the journal has counted that
            self._counters.add(f"refused_{refused.reason}")
        if self.strict:
            raise refused
        what = "" if refused.reason in _OF_THE_DISK else _remembered(about)
        self._counters.warn_once((refused.reason, what), f"mlflow-outbox: not logged: {refused}")
        return False

    def pass_over(self, refused: EventRefused, about: object) -> bool:
        """Do as ``refuse`` with a part of a call that goes on without it; when strict, the call ends and is refused."""
        forward(refused)
        if self.strict:
            raise refused
        return self.refuse(refused, about)


def _remembered(about: object) -> str:
    """Return what a warning is remembered under; of what is no string, which may have no text, its type."""
    if type(about) is tuple:
        return " ".join(map(_remembered, about))
    return about[:MAX_KEY_CHARS] if type(about) is str else type(about).__name__
