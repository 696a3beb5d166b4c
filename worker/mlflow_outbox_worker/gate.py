"""The way to the destination: open, away (tried again by a back-off), or parked for a person.

A failure that says something about the destination closes the gate for all runs; one beside which something else was
seen to be taken opens it. While it is not known to be open again, one run at a time may try.

A 403 may be either. MLflow's own authentication gives it for the one experiment to which a user has no right, an object
store for the one bucket; a gateway, or a token that has expired, for everything. So may an answer that is not MLflow's:
a firewall sends a page of its own for a text that it dislikes, an older server does not know an address, and a login
page comes for everything. The answer does not tell one from the other; a second question does, which asks for nothing
in particular (``Sink.admits``). If that is answered, the run alone waits for a person. After a 401 nothing more is
asked: who tries a wrong password too often is locked out.
"""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from typing import Final

from mlflow_outbox.counters import Counters, printable
from mlflow_outbox.settings import Settings
from mlflow_outbox_worker.ledger import Ledger
from mlflow_outbox_worker.notes import Notes
from mlflow_outbox_worker.outcome import Outcome
from mlflow_outbox_worker.retry import Backoff
from mlflow_outbox_worker.sink import Sink, SinkError

#: Answers about whoever asks, not about what was asked for.
_LOGIN: Final = frozenset({401, 407})
#: Seconds of a pause that is called none.
_SOON: Final = 0.05


class Gate:
    """Decides whether the destination may be tried now; used by the loop and by its lanes.

    Args:
        uri: the destination without credentials, for messages.
        settings: the pauses.
        counters: where warnings go.
        clock: seconds of a clock that never goes back.
        now_ms: wall-clock milliseconds since the epoch.
    """

    def __init__(
        self,
        uri: str,
        settings: Settings,
        counters: Counters,
        *,
        clock: Callable[[], float],
        now_ms: Callable[[], int],
    ) -> None:
        self._uri = uri
        self._parked_retry = settings.parked_retry
        self._counters = counters
        self._clock = clock
        self._now_ms = now_ms
        self._away = Backoff(settings.retry_initial, settings.retry_max, clock=clock)
        self._parked_until = 0.0
        self.notes = Notes(clock())

    def is_open(self) -> bool:
        """Return whether the destination may be tried now."""
        return self._clock() >= self._parked_until and self._away.ready()

    def is_proven(self) -> bool:
        """Return whether the last attempt went well, so that several runs may be sent at once."""
        return not self._away.attempts

    def hurry(self) -> None:
        """Let the next attempt be made now."""
        self._away.hurry()
        self._parked_until = 0.0
        self.notes.hurried(self._now_ms())

    def succeeded(self, ledger: Ledger | None) -> None:
        """Note an attempt that went well."""
        self._away.succeeded()
        self._parked_until = 0.0
        if self.notes.state not in {"", "ok"}:
            self._counters.forget(("away", self._uri))
            self._counters.forget(("parked", self._uri))
        self._note(ledger, "ok", "", self._now_ms())

    def failed(self, ledger: Ledger | None, error: SinkError, outcome: Outcome, began_ms: int) -> None:
        """Note an attempt that began at this wall-clock time and failed, as a rule by the destination."""
        if outcome.alone:
            self.succeeded(ledger)
            return
        if outcome.kind == "parked":
            self.park(ledger, outcome.reason, began_ms, error.login)
            return
        pause = self._away.failed(error)
        self._note(ledger, "away", outcome.reason, began_ms)
        self._counters.warn_once(
            ("away", self._uri),
            f"mlflow-outbox: {self._uri} does not take events now ({printable(outcome.reason, 200)}); "
            f"they stay on disk and are sent when it does. Next try {f'in {pause:.1f} s' if pause >= _SOON else 'now'}",
        )

    def park(self, ledger: Ledger | None, reason: str, began_ms: int, login: str = "") -> None:
        """Wait for a person, trying again slowly.

        Args:
            ledger: where it is noted.
            reason: the error that showed it.
            began_ms: when the attempt began that did, in wall-clock milliseconds since the epoch.
            login: what the destination was told of who asks; "" where that is not the matter.
        """
        reason = printable(reason, 300).rstrip(".") + (f"; {login}" if login else "")
        self._parked_until = self._clock() + self._parked_retry
        self._note(ledger, "parked", reason, began_ms)
        self._counters.warn_once(
            ("parked", self._uri),
            f"mlflow-outbox: {self._uri} waits for a person: {reason}. Events stay on disk",
        )

    def _note(self, ledger: Ledger | None, state: str, reason: str, began_ms: int) -> None:
        if ledger is not None:
            self.notes.destination(ledger, state, reason, self._now_ms(), began_ms)


def concerns_destination(error: SinkError, sink: Sink) -> bool:
    """Return whether a parking answer is about the destination or the login, not about one run.

    Args:
        error: the answer.
        sink: who gave it, to be asked again.
    """
    if error.status in _LOGIN or error.code == "TLS":
        return True
    return (error.kind == "not_mlflow" or error.status == HTTPStatus.FORBIDDEN) and not is_admitted(sink)


def is_admitted(sink: Sink) -> bool:
    """Return whether a store that refused something takes other requests."""
    try:
        return sink.admits()
    except SinkError:
        return False
