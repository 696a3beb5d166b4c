"""Whose turn it is: what the delivery loop knows of each run, shared by the loop and its lanes.

A run is *pending* when something of it may have to be sent, *busy* while a lane has it, and *due* at a time when its
last turn failed. Ready runs wait in one queue, so that each gets its turn before any gets its next. A run whose
segments may still grow is watched by their sizes (its *tails*), and, where other machines write, by its directories'
times (its *stamp*). One that *settles* gets another turn at a time, although there is nothing to send; so does one
that is to be *filed*, for which nobody waits.
"""

from __future__ import annotations

import collections
import os
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Final, Literal, NamedTuple

from mlflow_outbox.settings import Settings
from mlflow_outbox.spool.disk import is_being_written
from mlflow_outbox_worker.retry import Backoff
from mlflow_outbox_worker.sink import SinkError

#: Seconds between two looks whether the writer of an open but silent segment still lives.
_LIFE_CHECK: Final = 2.0
#: Turns in a row at a run whose files cannot be read before it is given up for now.
TRIES: Final = 3
#: Seconds between two turns of a run that waits for another, at most, and how often the pause is doubled.
_WAITS_MOST: Final = 5.0
_DOUBLED: Final = 12

Stamp = tuple[int, ...]


class Standing(NamedTuple):
    """How a run stands.

    Attributes:
        state: "waiting" for its first turn or for more of its events to be sent, "sent" with everything that was on
            disk at its last turn, "away" because the destination does not take events, "parked" for a person,
            "broken" because its files or the ledger cannot be read.
        reason: of the last failure; "" without one.
        failures: turns in a row that failed.
    """

    state: Literal["waiting", "sent", "away", "parked", "broken"] = "waiting"
    reason: str = ""
    failures: int = 0


class _Slot:
    """One run."""

    __slots__ = (
        *("busy", "due", "filed", "live", "next_life_check", "pending"),
        *("retry", "settles", "stamp", "standing", "tails", "waited"),
    )

    def __init__(self) -> None:
        self.pending = True
        self.busy = False
        self.due = 0.0
        self.retry: Backoff | None = None
        #: Turns in a row in which it had to wait for another.
        self.waited = 0
        #: Segments that may still grow, with the offset read up to.
        self.tails: dict[Path, int] = {}
        #: They are being written, so a missing writer is news.
        self.live = False
        self.next_life_check = 0.0
        #: When its directories last changed; only known where other machines write.
        self.stamp: Stamp = ()
        #: When it wants a turn although nothing is to be sent; 0 for never.
        self.settles = 0.0
        #: When it wants one to be filed, which does not keep the outbox from being quiet; 0 for never.
        self.filed = 0.0
        self.standing = Standing()


class Schedule:
    """The runs of one outbox, and whose turn it is; every method may be called from any thread.

    Args:
        settings: the pauses after failures.
        clock: seconds of a clock that never goes back.

    Attributes:
        changed: notified when a lane gives a run back.
    """

    def __init__(self, settings: Settings, clock: Callable[[], float]) -> None:
        self._settings = settings
        self._clock = clock
        self.changed = threading.Condition()
        self._slots: dict[str, _Slot] = {}
        self._ready: collections.deque[str] = collections.deque()
        #: The runs that lanes have, and those that may change while they rest: a look at either must not cost more
        #: because ten thousand others wait.
        self._busy: set[str] = set()
        self._watched: set[str] = set()
        #: Runs whose turn comes at once when that of another, by which they are found here, went well.
        self._after: dict[str, set[str]] = {}

    def __len__(self) -> int:
        """Return how many runs are ready, due or not."""
        return len(self._ready)

    def clear(self) -> None:
        """Forget every run; none may be busy."""
        with self.changed:
            self._slots, self._ready = {}, collections.deque()
            self._busy.clear()
            self._watched.clear()
            self._after.clear()

    def mark(self, run_id: str) -> None:
        """Take notice that something of a run may have to be sent."""
        with self.changed:
            slot = self._slots.get(run_id)
            if slot is None:
                self._slots[run_id] = _Slot()
                self._ready.append(run_id)
            elif not slot.pending:
                slot.pending = True
                if not slot.busy:
                    self._ready.append(run_id)

    def look_around(self, known: Collection[str]) -> None:
        """Take notice of runs that were not known, and forget those that are there no more."""
        there = set(known)
        for run_id in sorted(there - self._slots.keys()):
            self.mark(run_id)
        with self.changed:
            for run_id in [r for r, slot in self._slots.items() if r not in there and not slot.busy]:
                del self._slots[run_id]
                self._watched.discard(run_id)

    def grown(self, stamp_of: Callable[[str], Stamp]) -> list[str]:
        """Return the runs at rest that want a turn.

        A segment of theirs has grown or lost its writer, a directory has changed, or they are to settle or to be filed
        now.

        Args:
            stamp_of: returns when a run's directories last changed; () where a doorbell tells.
        """
        now = self._clock()
        found = []
        with self.changed:
            watched = [(run_id, self._slots[run_id]) for run_id in self._watched]
        for run_id, slot in watched:
            if slot.busy or slot.pending:
                continue
            grown = 0.0 < slot.settles <= now or 0.0 < slot.filed <= now
            grown = grown or any(_size(path) != offset for path, offset in slot.tails.items())
            if not grown and now >= slot.next_life_check:
                slot.next_life_check = now + _LIFE_CHECK
                grown = slot.live and any(not is_being_written(path) for path in slot.tails)
                grown = grown or stamp_of(run_id) != slot.stamp
            if grown:
                found.append(run_id)
        return found

    def take(self, most: int) -> list[str]:
        """Return runs whose turn it is, which are busy from now on.

        Args:
            most: runs that may be busy at once, those included that are busy already.
        """
        now = self._clock()
        chosen: list[str] = []
        with self.changed:
            for _ in range(len(self._ready)):
                if self.busy() >= most:
                    break
                run_id = self._ready.popleft()
                slot = self._slots.get(run_id)
                if slot is None or not slot.pending or slot.busy:
                    continue
                if slot.due > now:
                    self._ready.append(run_id)
                    continue
                slot.busy, slot.pending = True, False
                self._busy.add(run_id)
                chosen.append(run_id)
        return chosen

    def release(self, run_id: str) -> None:
        """Take a run back from its lane."""
        with self.changed:
            slot = self._slots.get(run_id)
            if slot is not None:
                slot.busy = False
                self._busy.discard(run_id)
                if slot.pending:
                    self._ready.append(run_id)
            self.changed.notify_all()

    def turned(self, run_id: str, tails: dict[Path, int], *, live: bool, more: bool) -> None:
        """Note a turn that went well.

        Args:
            run_id: the run.
            tails: segments that may still grow, with the offsets read up to.
            live: they are being written.
            more: there is more to send at once.
        """
        with self.changed:
            slot = self._slots[run_id]
            slot.retry, slot.due, slot.tails, slot.live = None, 0.0, tails, live
            slot.standing, slot.waited = Standing(), 0
            slot.pending = slot.pending or more
            self._watch(run_id, slot)
            for name in self._after.pop(run_id, ()):
                other = self._slots.get(name)
                if other is not None:
                    other.due = 0.0
                    if other.standing.state != "sent":  # as it may be since before the end of this turn
                        other.standing = Standing()

    def sent(self, run_id: str, stamp: Stamp, *, settles_in: float = 0.0, filed_in: float = 0.0) -> None:
        """Note that everything of a run was sent that was on disk when its directories had this stamp.

        Args:
            run_id: the run.
            stamp: of its directories.
            settles_in: seconds after which it gets another turn in any case; 0 for none.
            filed_in: the same for one that nobody waits for.
        """
        with self.changed:
            slot = self._slots[run_id]
            slot.stamp, slot.standing = stamp, Standing("sent")
            slot.settles = self._clock() + settles_in if settles_in else 0.0
            slot.filed = self._clock() + filed_in if filed_in else 0.0
            self._watch(run_id, slot)

    def _watch(self, run_id: str, slot: _Slot) -> None:
        if slot.tails or slot.stamp or slot.settles or slot.filed:
            self._watched.add(run_id)
        else:
            self._watched.discard(run_id)

    def again(self, run_id: str, seconds: float, failed: Standing | None = None, *, after: str = "") -> None:
        """Give a run its next turn after a pause.

        Args:
            run_id: the run.
            seconds: the pause.
            failed: why it is needed; None when nothing failed.
            after: a run after whose next good turn it comes at once.
        """
        with self.changed:
            slot = self._slots.get(run_id)
            if slot is not None:
                slot.due, slot.pending = self._clock() + seconds, True
                if failed is not None:
                    slot.standing = failed._replace(failures=max(failed.failures, slot.standing.failures + 1))
                if after:
                    self._after.setdefault(after, set()).add(run_id)

    def waits(self, run_id: str, *, after: str) -> None:
        """Give a run that waits for another its next turn when that one had a good one, and soon, but ever less so.

        What it asks MLflow for before it comes to that would be asked for at each look, for minutes where nobody knows
        what it waits for.

        Args:
            run_id: the run.
            after: the other one; "" when it is not known.
        """
        with self.changed:
            slot = self._slots.get(run_id)
            if slot is not None:
                pause = min(_WAITS_MOST, self._settings.poll_interval * 2.0 ** min(slot.waited, _DOUBLED))
                slot.waited += 1
                self.again(run_id, pause, after=after)

    def failed(self, run_id: str, error: SinkError, reason: str) -> None:
        """Give a run its next turn after the back-off that its failures ask for."""
        slot = self._slots[run_id]
        if slot.retry is None:
            slot.retry = Backoff(self._settings.retry_initial, self._settings.retry_max, clock=self._clock)
        self.again(run_id, slot.retry.failed(error), Standing("away", reason))

    def hurry(self) -> None:
        """Make every run due now."""
        with self.changed:
            for slot in self._slots.values():
                slot.due = 0.0

    def busy(self) -> int:
        """Return how many runs lanes have."""
        return len(self._busy)

    def is_busy(self, run_id: str) -> bool:
        """Return whether a lane has a run."""
        return run_id in self._busy

    def is_quiet(self) -> bool:
        """Return whether no run is busy, ready, pending or settling."""
        with self.changed:
            waits = any(slot.pending or slot.settles for slot in self._slots.values())
            return not self._ready and not self._busy and not waits

    def is_settling(self) -> bool:
        """Return whether a run of which everything was sent wants another turn."""
        with self.changed:
            return any(slot.settles for slot in self._slots.values())

    def standing(self, run_id: str) -> Standing:
        """Return how one run stands; one that is not known waits."""
        with self.changed:
            slot = self._slots.get(run_id)
            return slot.standing if slot is not None else Standing()

    def standings(self) -> dict[str, Standing]:
        """Return how every known run stands."""
        with self.changed:
            return {run_id: slot.standing for run_id, slot in self._slots.items()}


def _size(path: Path) -> int:
    try:
        return os.stat(path, follow_symlinks=False).st_size
    except OSError:
        return -1
