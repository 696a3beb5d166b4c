"""How fast events arrive, noted in the ledger by the worker, so that ``status`` can tell without watching for a while."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

import msgspec

from mlflow_outbox.errors import LedgerUnavailable

if TYPE_CHECKING:
    from mlflow_outbox_worker.ledger import Ledger

#: Seconds between two notes.
_EVERY: Final = 3.0
#: Milliseconds after which a note says nothing about the present any more.
_STALE: Final = 15_000


class Pace(msgspec.Struct):
    """Events that arrived in a stretch of time, and when that ended (wall-clock ms)."""

    events: int
    seconds: float
    at_ms: int

    def rate(self, now_ms: int) -> float:
        """Return events in a second; 0 when that was too long ago to tell of the present."""
        return self.events / self.seconds if self.seconds > 0 and 0 <= now_ms - self.at_ms <= _STALE else 0.0


class Pacer:
    """Takes the worker's pace.

    Args:
        delivered: events delivered so far.
        now: seconds of a clock that never goes back.
    """

    def __init__(self, delivered: int, now: float) -> None:
        self._delivered = delivered
        self._since = now

    def take(self, ledger: Ledger, delivered: int, now: float, now_ms: int) -> None:
        """Note the pace, if something has been delivered and it is time to.

        Args:
            ledger: where it is noted.
            delivered: events delivered so far.
            now: seconds of a clock that never goes back.
            now_ms: wall-clock milliseconds since the epoch.
        """
        if now - self._since < _EVERY:
            return
        events, seconds = delivered - self._delivered, now - self._since
        self._delivered, self._since = delivered, now
        if events > 0:
            with contextlib.suppress(LedgerUnavailable):  # nobody waits for it
                ledger.set_meta("pace", msgspec.msgpack.encode(Pace(events, seconds, now_ms)))


def noted_pace(ledger: Ledger) -> Pace | None:
    """Return the pace that a worker last noted, or None."""
    data = ledger.meta("pace")
    try:
        return msgspec.msgpack.decode(data, type=Pace) if data is not None else None
    except msgspec.DecodeError:
        return None
