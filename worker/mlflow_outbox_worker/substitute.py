"""Syncs the live segments of the program that this process delivers for, where that asks for it (``spool.deputy``).

A thread of its own, so that neither a request that hangs nor a long backlog puts a sync off. It has read no segment
and knows nothing of what is in one: it opens what it is told to, beneath the outbox's runs and never through a link,
syncs what has grown, and says so. A segment that could not be synced is never said to be, since the kernel reports an
error to a descriptor once and a second try on it would succeed: the program finds the same error by its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from mlflow_outbox import stopwatch
from mlflow_outbox.counters import Counters
from mlflow_outbox.spool.disk import SystemDisk
from mlflow_outbox_worker.deputy import Page

_DATAGRAM: Final = 65536


class Substitute:
    """The other end of a ``Deputy``.

    Args:
        connection: what the program asks over.
        page: where it is answered.
        runs: the directory of the outbox's runs.
        interval: seconds between two rounds.
        counters: where a sync that failed is counted, as ``syncs_for_the_program_failed``.
        datasync: makes a descriptor's data durable.
        clock: seconds of the clock that the program has as well.
    """

    def __init__(
        self,
        connection: socket.socket,
        page: Page,
        runs: Path,
        interval: float,
        counters: Counters,
        datasync: Callable[[int], None] = SystemDisk.datasync,
        clock: Callable[[], float] = stopwatch.seconds,
    ) -> None:
        self._connection = connection
        self._page = page
        self._runs = runs
        self._interval = interval
        self._counters = counters
        self._datasync = datasync
        self._clock = clock
        self._number = 0
        #: By segment: its descriptor, and its size when it was synced last.
        self._open: dict[str, tuple[int, int]] = {}
        #: Segments of which nothing can be said any more: a sync of them failed, or they have lost their names.
        self._given_up: set[str] = set()
        self._wanted: list[str] = []

    def __repr__(self) -> str:
        return f"<Substitute for {len(self._wanted)} segments of {str(self._runs)!r}>"

    def start(self) -> None:
        """Begin, in a thread that ends with the process."""
        threading.Thread(target=self._go_on, name="mlflow-outbox-substitute", daemon=True).start()

    def _go_on(self) -> None:
        while True:
            if not self._wanted:
                self._hear(None)
            begun = self._clock()
            self.round()
            self._hear(0.0)
            time.sleep(max(self._interval / 4, begun + self._interval - self._clock()))

    def round(self) -> None:
        """Sync what has grown, and say that it was done if all was."""
        begun = self._clock()
        synced = [self._is_synced(name) for name in self._wanted]  # each of them, whatever became of another
        if self._given_up.issuperset(self._wanted):
            self._wanted = []  # until the program wants something else
        elif all(synced):
            self._page.write(self._number, begun)

    def _is_synced(self, name: str) -> bool:
        if name in self._given_up:
            return False
        try:
            fd, before = self._open.get(name) or (self._opened(name), -1)
            found = os.fstat(fd)
            if found.st_nlink and found.st_size != before:
                self._datasync(fd)
                self._open[name] = (fd, found.st_size)
        except FileNotFoundError:
            return self._give_up(name)  # it was delivered, and the program has left it
        except OSError:
            self._counters.add("syncs_for_the_program_failed")
            return self._give_up(name)
        return found.st_nlink > 0 or self._give_up(name)

    def _give_up(self, name: str) -> bool:
        """Let go of a segment: what has lost its name takes room on the disk for as long as it is open."""
        self._given_up.add(name)
        self._close(name)
        return False

    def _close(self, name: str) -> None:
        held = self._open.pop(name, None)
        if held is not None:
            os.close(held[0])

    def _opened(self, name: str) -> int:
        run, _, file = name.partition("/")
        if not file or "/" in file or ".." in {run, file}:
            msg = f"{name!r} is no segment of a run"
            raise OSError(msg)
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(self._runs / run / file, flags)
        self._open[name] = (fd, -1)
        return fd

    def _hear(self, timeout: float | None) -> None:
        """Take note of what the program wants.

        Args:
            timeout: seconds to wait for it; None waits until it wants something.
        """
        self._connection.settimeout(timeout)
        with contextlib.suppress(OSError):
            while True:
                said = json.loads(self._connection.recv(_DATAGRAM))
                self._number, self._wanted = said["number"], said["segments"]
                self._given_up.intersection_update(self._wanted)
                self._connection.settimeout(0.0)
        for name in self._open.keys() - set(self._wanted):
            self._close(name)
