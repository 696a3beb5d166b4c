"""Opens the sink when there is something to deliver and not before: this is where mlflow is imported.

An import that fails may have met another thread's import of MLflow, which a later one does not; so a person is asked
for only when it goes on failing. A module that is not there will not be there then either. A library that does not fit
the others raises anything as it is imported: protobuf a TypeError, NumPy a ValueError or an AttributeError.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from mlflow_outbox.counters import Counters, printable
from mlflow_outbox.destination import Destination
from mlflow_outbox.errors import DestinationError
from mlflow_outbox.settings import Settings
from mlflow_outbox_worker.asked import AskedSink
from mlflow_outbox_worker.gate import Gate
from mlflow_outbox_worker.ledger import Ledger
from mlflow_outbox_worker.outcome import classify
from mlflow_outbox_worker.sink import Sink, SinkError

OpenSink = Callable[..., Sink]

#: Imports that are tried again, and the seconds between them.
_IMPORTS: Final = 3
_SOON: Final = 1.0


class Opener:
    """Opens the sink of one destination.

    Args:
        destination: where to, with credentials if there are any.
        settings: how long a request may take.
        gate: told when it cannot be opened.
        counters: what happened, by reason.
        open_sink: makes the sink; None for MLflow's.
        now_ms: wall-clock milliseconds since the epoch.
        clock: seconds of a clock that never goes back.
    """

    def __init__(
        self,
        destination: Destination,
        settings: Settings,
        gate: Gate,
        counters: Counters,
        *,
        open_sink: OpenSink | None,
        now_ms: Callable[[], int],
        clock: Callable[[], float],
    ) -> None:
        self._destination = destination
        self._settings = settings
        self._gate = gate
        self._counters = counters
        self._open_sink = open_sink
        self._now_ms = now_ms
        self._clock = clock
        self._failed = 0
        self._due = 0.0

    def open(self, ledger: Ledger) -> AskedSink | None:
        """Return the sink, or None when it cannot be opened now."""
        if self._clock() < self._due:
            return None
        began_ms = self._now_ms()
        try:
            sink = self._opened()
        except SinkError as error:
            self._gate.failed(ledger, error, classify(error, "open"), began_ms)
            return None
        except (OSError, MemoryError):  # of this moment, as far as anybody can tell; the loop tries again
            raise
        except Exception as error:  # noqa: BLE001 - see above; a person is told
            reason = f"{type(error).__name__}: {error}"
            if not isinstance(error, (DestinationError, ModuleNotFoundError)):
                self._failed += 1
                if self._failed <= _IMPORTS:
                    self._due = self._clock() + _SOON
                    self._counters.add("imports_failed")
                    self._counters.warn_once(("import", reason), f"mlflow-outbox: delivery: {printable(reason, 300)}")
                    return None
            self._gate.park(ledger, reason, began_ms)
            return None
        self._failed = 0
        return AskedSink(sink)

    def _opened(self) -> Sink:
        if self._open_sink is None:
            from mlflow_outbox_worker.mlflow_sink import open_sink  # imports nothing of mlflow yet

            self._open_sink = open_sink
        return self._open_sink(
            self._destination.secret_uri or self._destination.uri,
            artifact_root=self._destination.artifact_root or None,
            timeout=self._settings.request_timeout,
        )
