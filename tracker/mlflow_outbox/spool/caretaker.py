"""The background thread that makes journals durable: one per process, started by the first event, gone when idle.

Every ``sync_interval`` seconds it syncs what was appended since, writes out what waits in memory for a disk that
failed, and closes full segments. While another process syncs the segments meanwhile, it does so more rarely, unless
something else comes up (``mlflow_outbox_worker.deputy``). It holds on to a journal until there is nothing left to do
for it, so an experiment may drop its run objects at once.

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
from mlflow_outbox.spool.alarm import Alarm

if TYPE_CHECKING:
    from mlflow_outbox.spool.journal import Journal

#: Rounds without anything to watch after which the thread ends.
_IDLE_ROUNDS: Final = 20
#: Intervals from one round to the next while another process syncs in between.
RELIEVED: Final = 4
#: Seconds between the intervals for which that is worth it: more often, asking and answering is most of the work; more
#: rarely, whatever else a round looks at would wait for long.
SHORTEST: Final = 0.1
LONGEST: Final = 1.0


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

    def pause(self, now: float, intervals: int = 1) -> float:
        """Return the seconds until the next round; to be called once for each round.

        Args:
            now: seconds of the same clock.
            intervals: from this round to the next one.
        """
        self._due = max(self._due + self._interval * intervals, now + self._interval / 2)
        return self._due - now

    def hurry(self, now: float) -> float:
        """Return the seconds until the next round, which is to come no later than an interval from now."""
        self._due = min(self._due, now + self._interval)
        return self._due - now


class Caretaker:
    """Looks after the journals of one outbox in this process.

    Args:
        interval: seconds between two rounds.
        counters: where trouble is counted.
        each_round: called at the beginning of each round, for whatever else is looked at in the background.
        let_go: told of each journal that is closed and clean, after which it may be gone.
        is_relieved: given the live segments, returns whether another process syncs them all at this pace; None where
            there will be no such process.
    """

    def __init__(
        self,
        interval: float,
        counters: Counters,
        *,
        each_round: Callable[[], None] = lambda: None,
        let_go: Callable[[Journal], None] = lambda _: None,
        is_relieved: Callable[[tuple[str, ...]], bool] | None = None,
    ) -> None:
        self._interval = interval
        self._each_round = each_round
        self._let_go = let_go
        self._is_relieved = is_relieved
        self._counters = counters
        self._renew()
        _caretakers.add(self)

    def _renew(self) -> None:
        self._lock = threading.RLock()
        self._watched: dict[int, Journal] = {}
        self._thread: threading.Thread | None = None
        self._alarm = Alarm()
        #: The next round is late on purpose, and nobody has asked for it to come sooner.
        self._rests = False

    def watch(self, journal: Journal) -> bool:
        """Look after a journal until it is closed and clean; return False while no thread can be started for that."""
        self._watched[id(journal)] = journal  # one dict store: atomic, so a nested call needs no lock
        if not self._is_begun():
            self._start()
        self.hurry()
        return self._is_begun()

    def _is_begun(self) -> bool:
        """Return whether there is a thread; what ends one in the middle of a step, a lack of memory, tells nobody."""
        thread = self._thread
        return thread is not None and thread.is_alive()

    def hurry(self) -> None:
        """Have the next round come no later than an interval from now; may be called in the middle of anything."""
        if self._rests:
            self._rests = False
            self._alarm.ring()

    def _start(self) -> None:
        if sys.is_finalizing():  # a thread started now would be waited for forever
            return
        with self._lock:
            if self._is_begun():
                return
            thread = threading.Thread(target=self._rounds, args=(self._alarm,), name="mlflow-outbox-sync", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # at interpreter exit, or no threads left: a later call tries again, or close() syncs
                self._counters.add("sync_thread_not_started")
                return
            self._thread = thread

    def _rounds(self, alarm: Alarm) -> None:
        idle, intervals = 0, 1
        pace = Pace(self._interval, stopwatch.seconds())
        try:
            while True:
                self._sleep(alarm, pace, intervals)
                if alarm.is_over:
                    return
                courtesy.works()
                intervals = 1
                try:
                    self.round()
                    intervals = self._intervals()
                except BaseException:  # noqa: BLE001 - a log handler that ends programs ends only this thread; counted
                    self._counters.add("caretaker_errors")
                idle = 0 if self._watched else idle + 1
                if idle >= _IDLE_ROUNDS and self._retires(alarm):
                    return
        finally:
            courtesy.leaves()

    def _sleep(self, alarm: Alarm, pace: Pace, intervals: int) -> None:
        pause = pace.pause(stopwatch.seconds(), intervals)
        courtesy.sleeps(pause)
        while alarm.sleep(pause) and not alarm.is_over:
            pause = pace.hurry(stopwatch.seconds())
            courtesy.sleeps(pause)

    def _intervals(self) -> int:
        """Return the number of intervals until the next round."""
        if self._is_relieved is None or not SHORTEST <= self._interval <= LONGEST:
            return 1
        self._rests = True  # first this, then a look: what gives this thread more to do looks in the opposite order
        segments = [journal.lend() for journal in list(self._watched.values())]
        if segments and all(segments) and self._is_relieved(tuple(segments)):
            return RELIEVED
        self._rests = False
        return 1

    def _retires(self, alarm: Alarm) -> bool:
        """End this thread unless there is something to watch again."""
        with self._lock:
            if self._alarm is not alarm:
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
            self._alarm.end()
            self._alarm, self._thread, self._rests = Alarm(), None, False
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
