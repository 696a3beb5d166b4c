"""The worker as a thread of the experiment: a daemon, so that it can never keep a program from ending.

The thread reads, plans and records; MLflow itself lives in a child process (``sink_process``), unless the experiment
has imported it.
"""

from __future__ import annotations

# Imported here, where the worker starts, because it cannot be imported for the first time while the interpreter
# exits: a script that logs and ends at once would otherwise lose its flush to "can't register atexit after shutdown"
# somewhere inside of mlflow.
import concurrent.futures.thread  # noqa: F401 - see above
import threading
from typing import TYPE_CHECKING

from mlflow_outbox_worker.delivery import Delivery
from mlflow_outbox_worker.sink_process import SinkProcesses

if TYPE_CHECKING:
    from mlflow_outbox.outbox import Outbox


class ThreadWorker:
    """A delivery loop in a daemon thread.

    Args:
        delivery: the loop.
    """

    def __init__(self, delivery: Delivery) -> None:
        self.delivery = delivery
        self._thread = threading.Thread(target=delivery.run, name="mlflow-outbox-worker", daemon=True)

    def __repr__(self) -> str:
        return f"<ThreadWorker {self.delivery!r}>"

    def start(self) -> None:
        """Start the thread.

        Raises:
            RuntimeError: no thread can be started any more.
        """
        self._thread.start()

    def is_alive(self) -> bool:
        """Return whether the loop runs."""
        return self._thread.is_alive()

    def wake(self) -> None:
        """Let the loop look at the doorbell."""
        self.delivery.wake()

    def stop(self, timeout: float) -> None:
        """End the loop, waiting at most timeout seconds; a request that hangs is left to itself."""
        self.delivery.stop()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout)


def start(outbox: Outbox) -> ThreadWorker:
    """Start delivering an outbox in a thread.

    Raises:
        RuntimeError: no thread can be started any more.
    """
    delivery = Delivery(
        outbox.directory,
        outbox.destination,
        outbox.settings,
        outbox.counters,
        kind="thread",
        open_sink=SinkProcesses(outbox.counters),
    )
    worker = ThreadWorker(delivery)
    worker.start()
    return worker
