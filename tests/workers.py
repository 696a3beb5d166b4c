"""Workers in the test's own process, so that a test can shrink their pauses and be their disk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from mlflow_outbox.counters import Counters
from mlflow_outbox.destination import resolve
from mlflow_outbox.settings import Settings
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox_worker.delivery import Delivery
from mlflow_outbox_worker.thread import ThreadWorker


@contextlib.contextmanager
def delivering(directory: OutboxDirectory, uri: str, settings: Settings) -> Iterator[Counters]:
    """Deliver an outbox in a thread of this process; yield what is counted."""
    counters = Counters()
    worker = ThreadWorker(lambda: Delivery(directory, resolve(uri), settings, counters, kind="thread"), counters)
    worker.start()
    try:
        yield counters
    finally:
        worker.stop(60)
