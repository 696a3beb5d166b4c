"""What runs in the child: the delivery loop, and the reports of what it counts and logs."""

from __future__ import annotations

import collections
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
from mlflow_outbox_worker.process import deliver_or_end, noted, started, take_over

#: Seconds for a request that is under way when the program is gone.
_FAREWELL: Final = 1.0
#: Seconds from the first count after a while to the message with it, and between two such messages: each takes the
#: program's interpreter away from somebody's logging call.
_SOON: Final = 0.05
_PACE: Final = 0.5
#: Messages that are kept for a program that does not listen.
_KEPT: Final = 100


class Reporter(logging.Handler):
    """Tells the program what is counted and logged here, and waits for it in nothing.

    A program that was stopped, by ctrl-Z or in a debugger, listens to nobody. After some minutes of counts the socket
    is full; if what delivers waited then to say something, nothing of other programs with this outbox would arrive.
    """

    def __init__(self, connection: socket.socket) -> None:
        super().__init__()
        self.counters = Counted()
        self._connection = connection
        self._sending = threading.Lock()
        self._told: dict[str, int] = {}
        self._unsent = b""  # the rest of what is on its way
        self._kept: collections.deque[bytes] = collections.deque(maxlen=_KEPT)

    def emit(self, record: logging.LogRecord) -> None:
        """Pass on what was logged."""
        self.tell({"log": [record.levelno, record.getMessage()]})

    def tell(self, message: dict[str, Any], *, keep: bool = True) -> bool:
        """Send a message; whoever is gone hears nothing.

        Args:
            message: what to say.
            keep: send it later if the program does not listen now, unless there is too much of that.

        Returns:
            Whether it was sent, or is kept.
        """
        line = json.dumps(message).encode() + b"\n"
        with self._sending:
            if self._has_sent_all():
                self._unsent = line
                self._has_sent_all()
                return True
            if keep:
                self._kept.append(line)
            return keep

    def _has_sent_all(self) -> bool:
        """Send what is left, as far as nobody has to be waited for; return whether that was all."""
        try:
            while self._unsent or self._kept:
                self._unsent = self._unsent or self._kept.popleft()
                self._unsent = self._unsent[self._connection.send(self._unsent, socket.MSG_DONTWAIT) :]
        except BlockingIOError:
            return False
        except OSError:  # whoever is gone
            self._unsent = b""
            self._kept.clear()
        return True

    def tell_counts(self) -> None:
        """Send what was counted since the last time."""
        now = self.counters.snapshot()
        more = {reason: number - self._told.get(reason, 0) for reason, number in now.items()}
        some = {reason: number for reason, number in more.items() if number}
        if not some:
            self.is_heard()
        elif self.tell({"counts": some}, keep=False):  # else they are part of what is told next
            self._told = now

    def is_heard(self) -> bool:
        """Send what waits for a program that did not listen; return whether nothing does any more."""
        with self._sending:
            return self._has_sent_all()

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
            self.counters.news.wait(None if self.is_heard() else _PACE)
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
    worker = threading.Thread(target=deliver_or_end, args=(delivery,), name="mlflow-outbox-worker", daemon=True)
    if not started(worker, reporter.counters):
        return
    with contextlib.suppress(RuntimeError):  # no thread left: what is counted is told at the end
        threading.Thread(target=reporter.go_on, name="mlflow-outbox-counts", daemon=True).start()
    found.substitute_for_the_program(reporter.counters)
    with contextlib.suppress(OSError, ValueError):  # the program was killed
        for line in lines:
            take_over(line)
    delivery.stop()
    worker.join(_FAREWELL)
    reporter.tell_counts()
