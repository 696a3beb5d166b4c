"""What the worker notes in the ledger about itself, so that ``status`` and ``flush`` need not watch it to tell.

How the destination stands is noted when it changes, or the reason does, and again with the first attempt that begins
after somebody asked to hurry: whoever asked learns that the attempt was made. One that was under way then says what was
so before, so the time of an attempt is that of its beginning. Since when it stands so is taken over from the note of
the worker before: a server is not away for a shorter time because somebody flushed. How fast events arrive is noted
every few seconds while they do, and while none do, that something is being sent: a large file takes minutes.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

import msgspec

from mlflow_outbox.errors import LedgerUnavailable

if TYPE_CHECKING:
    from mlflow_outbox_worker.ledger import Ledger
    from mlflow_outbox_worker.records import RunRecord

#: Seconds between two notes of the pace.
_PACE_EVERY: Final = 3.0
#: Milliseconds after which the pace says nothing about the present any more.
_PACE_HOLDS: Final = 15_000

_DESTINATION: Final = "destination"
_PACE: Final = "pace"
_SENDING: Final = "sending"


class DestinationNote(msgspec.Struct):
    """How the destination stands: "ok", "away" (tried again and again) or "parked" (a person is needed).

    Attributes:
        reason: the error that showed it.
        since_ms: wall-clock time at which it began to stand so.
        tried_ms: wall-clock time at which the last attempt that was noted began.
    """

    state: str
    reason: str = ""
    since_ms: int = 0
    tried_ms: int = 0


class Pace(msgspec.Struct):
    """Events that arrived in a stretch of time, and when that ended (wall-clock ms)."""

    events: int
    seconds: float
    at_ms: int

    def rate(self, now_ms: int) -> float:
        """Return events in a second; 0 when that was too long ago to tell of the present."""
        return self.events / self.seconds if self.seconds > 0 and 0 <= now_ms - self.at_ms <= _PACE_HOLDS else 0.0


class Notes:
    """Writes the notes of one worker.

    Args:
        now: seconds of a clock that never goes back.
    """

    def __init__(self, now: float) -> None:
        self._noted = DestinationNote("")
        self._is_stored = False
        self._hurried_ms: int | None = None
        self._delivered = 0
        self._paced = now

    @property
    def state(self) -> str:
        """How the destination stood last; "" before the first attempt."""
        return self._noted.state

    @property
    def reason(self) -> str:
        """The error that showed it; "" when there was none."""
        return self._noted.reason

    def begin(self) -> None:
        """Have the next attempt noted: another worker has noted others since, or the ledger is a new one."""
        self._is_stored = False

    def hurried(self, now_ms: int) -> None:
        """Note the next attempt that begins even if nothing has changed: somebody waits for it."""
        self._hurried_ms = now_ms

    def destination(self, ledger: Ledger, state: str, reason: str, now_ms: int, began_ms: int) -> None:
        """Note how an attempt found the destination, when that is news.

        Args:
            ledger: where to.
            state: "ok", "away" or "parked".
            reason: the error that showed it; "" when there was none.
            now_ms: wall-clock milliseconds since the epoch.
            began_ms: the same when the attempt began.
        """
        awaited = self._hurried_ms is not None and began_ms >= self._hurried_ms
        before = self._noted
        is_other = reason != before.reason and self._hurried_ms is None
        if state == before.state and not is_other and not awaited and self._is_stored:
            return
        with contextlib.suppress(LedgerUnavailable):  # a note is not worth a failure
            before = before if self._is_stored else destination_note(ledger)
        since_ms = before.since_ms if state == before.state else 0
        self._noted = DestinationNote(state, reason, since_ms or now_ms, began_ms)
        self._hurried_ms = None if awaited else self._hurried_ms
        self._is_stored = False
        with contextlib.suppress(LedgerUnavailable):  # as above; the next attempt does it
            ledger.set_meta(_DESTINATION, msgspec.msgpack.encode(self._noted))
            self._is_stored = True

    def pace(self, ledger: Ledger, delivered: int, now: float, now_ms: int, *, sending: bool = False) -> None:
        """Note the pace, when it is time to and something has arrived; or that something is being sent.

        Args:
            ledger: where to.
            delivered: events delivered so far.
            now: seconds of a clock that never goes back.
            now_ms: wall-clock milliseconds since the epoch.
            sending: a request is under way that may well succeed.
        """
        if now - self._paced < _PACE_EVERY:
            return
        events, seconds = delivered - self._delivered, now - self._paced
        self._delivered, self._paced = delivered, now
        if events > 0:
            with contextlib.suppress(LedgerUnavailable):  # as above
                ledger.set_meta(_PACE, msgspec.msgpack.encode(Pace(events, seconds, now_ms)))
        elif sending:
            with contextlib.suppress(LedgerUnavailable):  # as above
                ledger.set_meta(_SENDING, str(now_ms).encode())


def last_tried_ms(note: DestinationNote, record: RunRecord | None) -> int:
    """Return when what of a run waits for a person was last tried, as far as was noted.

    Args:
        note: how the destination stands.
        record: what the ledger holds of the run.

    Returns:
        wall-clock time in ms; 0 when it has not been tried, or does not wait for a person.
    """
    if note.state == "parked":
        return note.tried_ms
    return record.failed_at_ms if record is not None and record.state == "parked" else 0


def destination_note(ledger: Ledger) -> DestinationNote:
    """Return how the destination stood when a worker last noted it.

    Raises:
        LedgerUnavailable: the ledger cannot be read now.
    """
    data = ledger.meta(_DESTINATION)
    with contextlib.suppress(ValueError, RecursionError):
        if data is not None:
            return msgspec.msgpack.decode(data, type=DestinationNote)
    return DestinationNote("ok")


def sending_note(ledger: Ledger) -> bytes:
    """Return what changes every few seconds while a worker sends something that takes long.

    Raises:
        LedgerUnavailable: the ledger cannot be read now.
    """
    return ledger.meta(_SENDING) or b""


def noted_pace(ledger: Ledger) -> Pace | None:
    """Return the pace that a worker last noted, or None.

    Raises:
        LedgerUnavailable: the ledger cannot be read now.
    """
    data = ledger.meta(_PACE)
    with contextlib.suppress(ValueError, RecursionError):
        if data is not None:
            return msgspec.msgpack.decode(data, type=Pace)
    return None
