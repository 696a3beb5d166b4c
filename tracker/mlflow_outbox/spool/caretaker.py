"""The background thread that makes journals durable: one per process, started by the first event, gone when idle.

Every ``sync_interval`` seconds it syncs what was appended since, writes out what waits in memory for a disk that
failed, and closes full segments. It holds on to a journal until there is nothing left to do for it, so an experiment
may drop its run objects at once.

A fork leaves the thread behind in the parent; the child starts its own with its first event. At the exit of the
interpreter no thread can be started any more: then the journals are synced by ``close``.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from mlflow_outbox import stopwatch
from mlflow_outbox.counters import Counters
from mlflow_outbox.courtesy import courtesy
from mlflow_outbox.ending import usable
from mlflow_outbox.interrupts import forward
from mlflow_outbox.living import Living

if TYPE_CHECKING:
    from mlflow_outbox.spool.journal import Journal

#: Rounds without anything to watch after which the thread ends.
_IDLE_ROUNDS: Final = 20


class Pace:
    """When rounds are due: every so many seconds, whatever each of them takes, but never without a pause.

    Beside a program that logs every 0.2 ms a round takes 0.15 s, most of which it waits for the interpreter.

    Args:
        interval: seconds.
        now: seconds of a clock that never goes back.
    """

    def __init__(self, interval: float, now: float) -> None:
        self._interval = interval
        self._due = now

    def pause(self, now: float) -> float:
        """Return the seconds until the next round; to be called once for each round.

        Args:
            now: seconds of the same clock.
        """
        self._due = max(self._due + self._interval, now + self._interval / 2)
        return self._due - now


class Caretaker:
    """Looks after the journals of one outbox in this process.

    Args:
        interval: seconds between two rounds.
        counters: where trouble is counted.
        each_round: called at the beginning of each round, for whatever else is looked at in the background.
        let_go: told of each journal that is closed and clean, after which it may be gone.
    """

    def __init__(
        self,
        interval: float,
        counters: Counters,
        *,
        each_round: Callable[[], None] = lambda: None,
        let_go: Callable[[Journal], None] = lambda _: None,
    ) -> None:
        self._interval = interval
        self._each_round = each_round
        self._let_go = let_go
        self._counters = counters
        self._renew()
        _caretakers.add(self)

    def _renew(self) -> None:
        self._lock = threading.RLock()
        self._watched: dict[int, Journal] = {}
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    def watch(self, journal: Journal) -> bool:
        """Look after a journal until it is closed and clean; return False while no thread can be started for that."""
        self._watched[id(journal)] = journal  # one dict store: atomic, so a nested call needs no lock
        if self._thread is None:
            self._start()
        return self._thread is not None

    def _start(self) -> None:
        if sys.is_finalizing():  # a thread started now would be waited for forever
            return
        with self._lock:
            if self._thread is not None:
                return
            thread = threading.Thread(target=self._rounds, args=(self._stop,), name="mlflow-outbox-sync", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # at interpreter exit, or no threads left: a later call tries again, or close() syncs
                self._counters.add("sync_thread_not_started")
                return
            self._thread = thread

    def _rounds(self, stop: threading.Event) -> None:
        idle = 0
        pace = Pace(self._interval, stopwatch.seconds())
        try:
            while True:
                pause = pace.pause(stopwatch.seconds())
                courtesy.sleeps(pause)
                if stop.wait(pause):
                    return
                courtesy.works()
                try:
                    self.round()
                except BaseException:  # noqa: BLE001 - a log handler that ends programs ends only this thread; counted
                    self._counters.add("caretaker_errors")
                idle = 0 if self._watched else idle + 1
                if idle >= _IDLE_ROUNDS and self._retires(stop):
                    return
        finally:
            courtesy.leaves()

    def _retires(self, stop: threading.Event) -> bool:
        """End this thread unless there is something to watch again."""
        with self._lock:
            if self._stop is not stop:
                return True
            self._thread = None  # first this, then another look: who watches looks in the opposite order
            if not self._watched:
                return True
            self._thread = threading.current_thread()
            return False

    @property
    def is_watching(self) -> bool:
        """Whether there is a journal that is open, or not clean yet."""
        return any(not journal.is_idle for journal in list(self._watched.values()))

    def round(self) -> None:
        """Sync all watched journals once, and let go of those that are closed and clean."""
        self._guarded(self._each_round)
        self._sync()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 - trouble with one thing must not end the care for the others
            forward(error)
            self._counters.add("caretaker_errors")
            self._counters.warn_once(("caretaker", type(error)), f"mlflow-outbox: syncing failed: {error!r}")

    def _sync(self) -> None:
        for key, journal in list(self._watched.items()):
            self._guarded(journal.sync)
            if journal.is_idle:
                self._let_go(journal)
                self._watched.pop(key, None)
                if not journal.is_idle:  # an append slipped in between
                    self._watched[key] = journal

    def stop(self, *, for_good: bool = False) -> None:
        """Sync once more and end the thread; a journal that is used, now or again, gets a new one.

        Args:
            for_good: the interpreter exits, and nothing is begun any more.
        """
        self._lock = usable(self._lock)
        with self._lock:
            self._stop.set()
            self._stop, self._thread = threading.Event(), None
        self._sync()
        if self._watched and not for_good:  # somebody else's, who goes on logging to this outbox
            self._start()


#: All caretakers of this process, so that a forked child can begin anew.
_caretakers: Living[Caretaker] = Living()


def _after_fork_in_child() -> None:
    for caretaker in _caretakers.members():
        caretaker._renew()  # noqa: SLF001 - one class with its fork handler
        caretaker._counters.renew_lock()  # noqa: SLF001 - as above


os.register_at_fork(after_in_child=_after_fork_in_child)
