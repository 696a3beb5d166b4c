"""Being the worker oneself, for as long as a command runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow_outbox.settings import Settings
    from mlflow_outbox.spool.directory import OutboxDirectory
    from mlflow_outbox_worker.delivery import Delivery
    from mlflow_outbox_worker.metrics import Meter


#: What this process has delivered from.
_started: list[Path] = []


class CommandWorker:
    """Delivers an outbox in a thread of this command; stands by while another worker holds the lease.

    Args:
        directory: the outbox.
        settings: the options.
        meter: measures the requests; None measures nothing.
    """

    def __init__(self, directory: OutboxDirectory, settings: Settings, meter: Meter | None = None) -> None:
        from mlflow_outbox.counters import Counters
        from mlflow_outbox_worker.cli.outboxes import destination_of
        from mlflow_outbox_worker.delivery import Delivery
        from mlflow_outbox_worker.thread import ThreadWorker

        self.directory = directory
        self.counters = Counters()
        self.delivery: Delivery = Delivery(
            directory,
            destination_of(directory),
            settings,
            self.counters,
            kind="command",
            open_sink=meter.open_sink if meter is not None else None,
        )
        self._worker = ThreadWorker(lambda: self.delivery, self.counters)

    def __repr__(self) -> str:
        return f"<CommandWorker {self.delivery!r}>"

    def start(self) -> None:
        """Begin."""
        note_use(self.directory.path)
        self._worker.start()

    def ask_to_stop(self) -> None:
        """Let it end after the requests under way, without waiting."""
        self.delivery.stop()

    def stop(self, timeout: float) -> None:
        """End it; a request that hangs is left to itself.

        Args:
            timeout: seconds to wait for the requests under way.
        """
        self._worker.stop(timeout)


def note_use(path: Path) -> None:
    """Note that this process delivers.

    Args:
        path: from where.
    """
    _started.append(path)


def was_used() -> bool:
    """Return whether this process has been a worker."""
    return bool(_started)
