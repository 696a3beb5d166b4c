"""What runs in the child: the delivery loop, and the reports of what it counts and logs."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from mlflow_outbox import stopwatch
from mlflow_outbox.counters import Counters, logger, printable
from mlflow_outbox.errors import OutboxUnusable
from mlflow_outbox_worker.child.process import READY
from mlflow_outbox_worker.process import noted, started

#: Seconds for a request that is under way when the program is gone.
_FAREWELL: Final = 1.0
#: Seconds from the first count after a while to the message with it, and between two such messages: each takes the
#: program's interpreter away from somebody's logging call.
_SOON: Final = 0.05
_PACE: Final = 0.5


class Reporter(logging.Handler):
    """Tells the program what is counted and logged here."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__()
        self.counters = Counted()
        self._connection = connection
        self._sending = threading.Lock()
        self._told: dict[str, int] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Pass on what was logged."""
        self.tell({"log": [record.levelno, record.getMessage()]})

    def tell(self, message: dict[str, Any]) -> None:
        """Send a message; whoever is gone hears nothing."""
        with self._sending, contextlib.suppress(OSError):
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def tell_counts(self) -> None:
        """Send what was counted since the last time."""
        now = self.counters.snapshot()
        more = {reason: number - self._told.get(reason, 0) for reason, number in now.items()}
        self._told = now
        if any(more.values()):
            self.tell({"counts": {reason: number for reason, number in more.items() if number}})

    def go_on(
        self, clock: Callable[[], float] = stopwatch.seconds, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        """Send counts as they come, until the process ends.

        Args:
            clock: seconds of a clock that never goes back.
            sleep: waits for so many seconds.
        """
        told_at = clock() - _PACE
        while True:
            self.counters.news.wait()
            sleep(max(_SOON, told_at + _PACE - clock()))
            self.counters.news.clear()
            self.tell_counts()
            told_at = clock()


class Counted(Counters):
    """Counters that say when there is something new."""

    def __init__(self) -> None:
        super().__init__()
        self.news = threading.Event()

    def add(self, reason: str, number: int = 1) -> None:
        """Count, and say so."""
        super().add(reason, number)
        self.news.set()


def serve(path: Path, lock: int, connection: socket.socket) -> None:
    """Be the child: deliver until the program is gone or says so.

    Args:
        path: the outbox.
        lock: the descriptor of the outbox's locked lock file.
        connection: the way to the program.
    """
    os.set_inheritable(lock, False)  # noqa: FBT003 - its only argument
    reporter = Reporter(connection)
    reporter.tell(READY)
    lines = connection.makefile("rb")
    try:
        modules, note = lines.readline(), lines.readline()
    except OSError:  # the program was gone before it said more
        return
    if not note:
        return
    sys.path[:] = json.loads(modules)
    logger.addHandler(reporter)
    logger.propagate = False
    # Here and not above: they are found on the program's path, like mlflow, and the program needs none of them.
    from mlflow_outbox_worker.delivery import Delivery
    from mlflow_outbox_worker.sources import OutboxSource
    from mlflow_outbox_worker.surroundings import open_sink

    try:
        found = noted(path, note)
    except OutboxUnusable as error:
        reporter.counters.add("worker_errors")
        reporter.tell_counts()
        logger.warning("mlflow-outbox: delivery: %s", printable(str(error), 300))
        return
    directory, destination, settings, _ = found
    source = OutboxSource(directory, lock=lock)
    delivery = Delivery(source, destination, settings, reporter.counters, kind="thread", open_sink=open_sink)
    worker = threading.Thread(target=delivery.run, name="mlflow-outbox-worker", daemon=True)
    if not started(worker, reporter.counters):
        return
    with contextlib.suppress(RuntimeError):  # no thread left: what is counted is told at the end
        threading.Thread(target=reporter.go_on, name="mlflow-outbox-counts", daemon=True).start()
    found.substitute_for_the_program(reporter.counters)
    with contextlib.suppress(OSError, ValueError):  # the program was killed
        for line in lines:
            _take_over(json.loads(line)["environment"])
    delivery.stop()
    worker.join(_FAREWELL)
    reporter.tell_counts()


def _take_over(environment: dict[str, str | None]) -> None:
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
