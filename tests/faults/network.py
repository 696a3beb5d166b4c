"""A tracker whose server is reached through faults, judged by that server's own database; and who connected to what."""

from __future__ import annotations

import dataclasses
import socket
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from faults import workload
from faults.oracle import Held, at_rest, held, held_of
from faults.table import Row
from faults.test_space import check_manners
from mlflow_outbox import MLflowTracker, Settings
from mlflow_outbox.testing.wire import Request
from servers import MlflowServer, eventually

#: For what hangs or drips: an attempt ends after a second.
HURRIED = workload.settings(request_timeout=1.0, retry_max=0.1, parked_retry=0.1)
#: Where no slow answer is injected, one of a busy machine's shall not be another fault.
PATIENT = dataclasses.replace(HURRIED, request_timeout=30.0)
#: I6: seconds beyond the longest pause in which a fresh event is at the server after the fault has ended.
LIVENESS = 5.0


class Session:
    """One tracker that logs numbered events and is judged by the server's own database.

    Args:
        server: what is behind the faults.
        uri: where it is reached.
        experiment: its name.
        outbox: the directory.
        given: the options.
        asked: returns what has reached the proxy so far, for who wonders what took so long.
    """

    def __init__(
        self,
        server: MlflowServer,
        uri: str,
        experiment: str,
        outbox: Path,
        given: Settings = PATIENT,
        asked: Callable[[], Iterable[Request]] = tuple,
    ) -> None:
        self.server, self.experiment, self.settings = server, experiment, given
        self.tracker = MLflowTracker(experiment, uri, outbox_dir=outbox, settings=given)
        self._asked = asked
        self.took: list[float] = []
        self.acked: set[int] = set()
        self.issued: set[int] = set()
        self._arrived: set[int] = set()
        self._names: set[str] = set()  # of runs of which something may not have arrived
        self._ended: set[str] = set()

    def _next(self) -> int:
        return max(self.issued, default=-1) + 1

    def start(self) -> Any:
        """Start a run, named after the number of its first event."""
        name = f"run {self._next()}"
        self._names.add(name)
        return workload.timed(self.took, lambda: self.tracker.start_run(name))

    def log_to(self, run: Any, numbers: list[int]) -> None:
        """Log events by their numbers."""
        self.issued.update(numbers)
        for number in numbers:
            if workload.timed(self.took, lambda number=number: workload.log_event(run, number)):
                self.acked.add(number)

    def log(self, count: int) -> None:
        """Log a run of some events and end it."""
        first = self._next()
        run = self.start()
        self.log_to(run, list(range(first, first + count)))
        workload.timed(self.took, run.end)
        self._ended.add(f"run {first}")

    def held(self) -> Held:
        """Return what the server's database holds."""
        return held(self.server.database_uri, self.experiment)

    def arrives(self, row: Row, numbers: set[int] | None = None, *, later: float = 0.0) -> None:
        """Check that events arrive in time after the end of a fault, by themselves: a flush would hurry (I6).

        Args:
            row: gets the longest time that it took.
            numbers: the events; None means all so far.
            later: seconds that the fault itself may still take.
        """
        began = time.monotonic()
        took = self._seconds_until_there(self.acked if numbers is None else numbers)
        row.measure(arrives_s=max(took, float(row.measured.get("arrives_s", 0))))
        bound = self.settings.retry_max + LIVENESS + later
        if took >= bound:  # a busy machine: what does the same take where there is no fault?
            before = set(self.issued)
            self.log(10)
            bound += self._seconds_until_there(self.issued - before)
        assert took < bound, f"I6: {took:.1f} s, where {bound:.1f} are allowed; meanwhile\n{self._asked_since(began)}"

    def _asked_since(self, began: float) -> str:
        """Return a line for each request of which something happened since a time of the monotonic clock."""
        return "\n".join(
            f"{asked.arrived - began:7.2f} s, for {(asked.ended or time.monotonic()) - asked.arrived:.2f} s: "
            f"{asked.method} {asked.path[:90]} {asked.action} {asked.backend_status} {asked.status}"
            for asked in self._asked()
            if asked.ended is None or asked.ended >= began
        )

    def _seconds_until_there(self, numbers: set[int]) -> float:
        """Wait for events; those that have been there are looked at again by ``judge``, with all others."""
        missing = numbers - self._arrived

        def there() -> set[int]:
            return set(held_of(self.server.database_uri, self.experiment, self._names).events)

        took = workload.seconds_until(lambda: missing <= there(), 120)
        self._arrived |= numbers
        if self.issued <= self._arrived:
            self._names -= self._ended
        return took

    def settle(self, row: Row, *, dead: int = 0, timeout: float = 30.0) -> None:
        """Check liveness with a fresh run, conservation, integrity, and how long logging took."""
        before = set(self.issued)
        self.log(10)
        self.arrives(row, self.issued - before)
        eventually(lambda: self.tracker.flush(5), timeout + 10, "everything is delivered")
        left = self.tracker.flush(timeout)
        assert (0, 0, dead) == (left.pending, left.parked, left.dead), (left, self.tracker.counters)
        self.judge(row)

    def judge(self, row: Row) -> None:
        """Check what the server's database holds, and how long logging took."""
        report = {
            "raised": [],
            "p999_ms": workload.quantile(self.took, 0.999),
            "max_ms": workload.quantile(self.took, 1),
        }
        check_manners(row, report)
        assert self.acked == self.issued, "a server's trouble is no reason to refuse an event"
        at_rest(self.server.database_uri, self.experiment, within=10.0).check(self.acked)


class Connect(NamedTuple):
    """One attempt to connect: to which port, and when it began and ended, by the monotonic clock."""

    port: int
    began: float
    ended: float


class Connects:
    """Counts the attempts of this process to connect: one that is refused is seen by nobody else.

    Args:
        patch: undoes it.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._all: list[Connect] = []
        whole = socket.socket.connect

        def connect(sock: socket.socket, address: Any) -> None:
            began = time.monotonic()
            try:
                whole(sock, address)
            finally:
                if isinstance(address, tuple):
                    self._all.append(Connect(address[1], began, time.monotonic()))

        patch.setattr(socket.socket, "connect", connect)

    def to(self, uri: str) -> list[Connect]:
        """Return the attempts at the port of an address so far."""
        port = int(uri.rstrip("/").rpartition(":")[2])
        return [each for each in self._all if each.port == port]
