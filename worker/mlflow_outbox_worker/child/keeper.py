"""The thread's loop: holds the outbox's lock until a child has it, and begins again when the child is gone."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol

from mlflow_outbox.counters import printable, say
from mlflow_outbox.courtesy import courtesy
from mlflow_outbox.restarts import Restarts
from mlflow_outbox.spool.private import make_all_private
from mlflow_outbox_worker import interpreter
from mlflow_outbox_worker.child.process import Child, NoChild
from mlflow_outbox_worker.deputy import Deputy, passed_on
from mlflow_outbox_worker.host_lease import described, worker_of
from mlflow_outbox_worker.lease import Lease
from mlflow_outbox_worker.process import note_of

if TYPE_CHECKING:
    from mlflow_outbox.outbox import Outbox

#: Seconds between two tries of a standing-by thread for the lock.
_STAND_BY: Final = 1.0


class Loop(Protocol):
    """What a worker thread runs: ``Delivery``, or ``ChildDelivery`` in its place."""

    def run(self) -> None:
        """Deliver until stopped."""
        ...

    def wake(self) -> None:
        """Look for something new now."""
        ...

    def syncs(self, segments: tuple[str, ...]) -> bool:
        """Return whether another process syncs these segments for this one; have it do so from now on."""
        ...

    def stop(self) -> None:
        """Leave ``run`` soon; called from another thread."""
        ...


class ChildDelivery:
    """Has an outbox delivered by child processes, one at a time.

    Args:
        outbox: what to deliver.
        otherwise: makes what delivers in this process, if no child can be started.
        program: what to start; a parameter for tests.
    """

    def __init__(self, outbox: Outbox, otherwise: Callable[[], Loop], program: list[str] | None = None) -> None:
        self._outbox = outbox
        self._counters = outbox.counters
        self._otherwise = otherwise
        self._program = program or interpreter.command("mlflow_outbox_worker.child")
        self._lease = Lease(outbox.directory.lock, "thread")
        self._stopped = threading.Event()
        self._changing = threading.Lock()
        self._connection: socket.socket | None = None
        self._here: Loop | None = None
        self._deputy: Deputy | None = None
        self._first: tuple[Child, Deputy | None] | None = None
        self._started = 0
        self._restarts = Restarts(outbox.directory.path, outbox.counters)

    def __repr__(self) -> str:
        return f"<ChildDelivery of {str(self._outbox.directory.path)!r}, {self._started} children so far>"

    def wake(self) -> None:
        """Do nothing: the child hears the doorbell by itself."""
        if self._here is not None:
            self._here.wake()

    def syncs(self, segments: tuple[str, ...]) -> bool:
        """Return whether the child syncs these segments; have it do so from now on."""
        deputy = self._deputy
        return deputy is not None and deputy.syncs(segments)

    def stop(self) -> None:
        """Let the child end after the request under way."""
        with self._changing:
            self._stopped.set()
            if self._connection is not None:
                with contextlib.suppress(OSError):
                    self._connection.shutdown(socket.SHUT_WR)
            if self._here is not None:
                self._here.stop()

    def begin(self) -> None:
        """Start the first child in the calling thread, if nobody else delivers.

        The thread would do it in ten steps, each of which a call of the program's waits for; here it is one call, the
        one that starts the thread too. Where it cannot be done the thread tries again, and says why.
        """
        if self._outbox.directory.network:  # where to look who delivers takes as long as the network does
            return
        with contextlib.suppress(OSError, NoChild):
            try:
                if self._lease.acquire():
                    self._first = self._new_child()
            finally:
                self._lease.release()

    def abandon(self) -> None:
        """End the child that was begun, if nobody is to heed it."""
        first, self._first = self._first, None
        if first is not None:
            child, deputy = first
            with contextlib.closing(deputy or contextlib.ExitStack()):
                child.close()

    def run(self) -> None:
        """See to it that a child delivers, until stopped; never raises."""
        while not self._stopped.is_set():
            courtesy.works()
            try:
                if self._first or self._is_free():
                    self._deliver()
            except OSError as error:
                self._trouble("worker_errors", error)
            except Exception as error:  # noqa: BLE001 - the worker must outlive all mistakes; counted and said
                self._trouble("worker_crashes", error)
            finally:
                self._lease.release()
            self._rest()
        self.abandon()
        courtesy.leaves()

    def _rest(self) -> None:
        """Wait until the next try; a long pause ends when somebody asks to hurry, as a flush does, and the exit."""
        directory = self._outbox.directory
        asked, is_over = directory.hurry_asked(), False
        while not is_over:
            courtesy.sleeps(_STAND_BY)
            is_over = self._stopped.wait(_STAND_BY) or self._restarts.is_due() or directory.hurry_asked() != asked

    def _trouble(self, reason: str, error: Exception) -> None:
        self._counters.add(reason)
        self._counters.warn_once(
            (reason, type(error), str(error)[:80]), f"mlflow-outbox: delivery: {printable(repr(error), 300)}"
        )

    def _is_free(self) -> bool:
        """Take the outbox's lock; return whether nobody else delivers."""
        directory = self._outbox.directory
        if directory.network:
            found = worker_of(directory)
            if found is not None:
                if found.host != socket.gethostname():
                    self._counters.warn_once(
                        ("host", found.host),
                        f"mlflow-outbox: {described(found)} delivers {directory.path}; this one stands by",
                    )
                return False
            make_all_private(directory.lock.parent)
        return self._lease.acquire()

    def _deliver(self) -> None:
        try:
            self._deliver_by_child()
        except NoChild as error:
            self._counters.add("children_not_started")
            then = "this is tried again" if self._started else "delivery happens in this process instead"
            self._counters.warn_once(("child", then), f"mlflow-outbox: {error}; {then}")
            if not self._started:
                self._deliver_here()

    def _deliver_here(self) -> None:
        self._lease.release()
        with self._changing:
            if self._stopped.is_set():
                return
            self._here = self._otherwise()
        courtesy.leaves()  # what delivers here wants the interpreter all the time
        self._here.run()

    def _new_child(self) -> tuple[Child, Deputy | None]:
        """Start a child, which has the outbox's lock from then on."""
        directory, lock = self._outbox.directory, self._lease.fileno()
        with passed_on(self._outbox.settings, network=directory.network) as deputy:
            note, more = note_of(self._outbox, deputy=deputy), deputy.numbers if deputy else ()
            child = Child(self._program, directory.path, lock, more, note)
        self._lease.forget()
        return child, deputy

    def _deliver_by_child(self) -> None:
        first, self._first = self._first, None
        child, deputy = first or self._new_child()
        self._restarts.begun()
        with contextlib.closing(deputy or contextlib.ExitStack()), contextlib.closing(child):
            with self._changing:
                if self._stopped.is_set():
                    return
                self._connection, self._deputy = child.connection, deputy
            try:
                child.begin()
                for message in child.messages(self._stopped):
                    self._started += "ready" in message
                    for reason, more in message.get("counts", {}).items():
                        self._counters.add(reason, more)
                    if "log" in message:
                        self._pass_on(*message["log"])
            finally:
                with self._changing:
                    self._connection = self._deputy = None
        if not self._stopped.is_set():
            self._counters.add("children_lost")
            self._restarts.ended(child.end)

    def _pass_on(self, level: int, text: str) -> None:
        """Log what a child logs; of what several say one after the other, what the first one said."""
        if level < logging.WARNING:
            say(text, level)
            return
        self._counters.warn_once(("child", text), text, level)
        self._counters.forget(("child", text))
