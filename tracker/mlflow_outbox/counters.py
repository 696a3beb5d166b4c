"""Counters with reasons, and warnings that do not storm: every loss, refusal and delay passes through here.

The counters are plain integers in a dict, guarded by the interpreter's own atomicity being not enough for ``+=``;
they are touched on rare paths only, never by a logging call that goes well.

A fork waits for a warning that another thread is just writing: in the child the stream would stay locked, and whoever
prints something there would wait for ever. What a program's own threads print is its own business; that threads of
this library do, at a moment of their choice, it does not know.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Final

from mlflow_outbox import stopwatch
from mlflow_outbox.forklock import ForkLock
from mlflow_outbox.interrupts import forward

logger = logging.getLogger("mlflow_outbox")
#: Held while something is logged; who reads a pipe may be slow.
_saying: Final = ForkLock(patience=1.0)

#: Distinct warnings remembered per tracker; beyond it a warning may come twice, but memory stays bounded.
_REMEMBERED = 1000
#: Seconds after which a warning is said again whose trouble was over in between: a server that fails now and then would
#: fill a program's log.
_AGAIN: Final = 600.0


class Counters:
    """Counts by reason, and says each distinct warning once.

    Args:
        clock: seconds of a clock that never goes back.
    """

    def __init__(self, clock: Callable[[], float] = stopwatch.seconds) -> None:
        self._lock = threading.RLock()  # a signal handler may count while its own thread does
        self._clock = clock
        self._counts: Counter[str] = Counter()
        #: What was warned about, and when; and that of which the trouble was over since.
        self._said: dict[Hashable, float] = {}
        self._over: set[Hashable] = set()

    def __repr__(self) -> str:
        return f"Counters({self.snapshot()!r})"

    def add(self, reason: str, number: int = 1) -> None:
        """Count something under a reason."""
        with self._lock:
            self._counts[reason] += number

    def snapshot(self) -> dict[str, int]:
        """Return the counts by reason."""
        with self._lock:
            return dict(self._counts)

    def __getitem__(self, reason: str) -> int:
        with self._lock:
            return self._counts[reason]

    def warn_once(self, about: Hashable, message: str, level: int = logging.WARNING) -> None:
        """Log a warning, or what is worse than one, unless one about the same thing was logged before."""
        now = self._clock()
        with self._lock:
            if about in self._said and (about not in self._over or now < self._said[about] + _AGAIN):
                return
            if len(self._said) >= _REMEMBERED:
                self._said.clear()
                self._over.clear()
            self._said[about] = now
            self._over.discard(about)
        if not say(message, level):
            self.add("warnings_not_written")

    def forget(self, about: Hashable) -> None:
        """Let warnings about a thing be logged again, if not within minutes: the trouble was over in between."""
        with self._lock:
            if about in self._said:
                self._over.add(about)

    def renew_lock(self) -> None:
        """Make the counters usable in a forked child, where another thread's lock would be held for ever."""
        self._lock = threading.RLock()


def say(message: str, level: int = logging.WARNING) -> bool:
    """Log a message of this library.

    Args:
        message: the whole text.
        level: as ``logging`` knows it.

    Returns:
        False when a handler or a filter of the program's raised: a logging call must not do so for its sake.
    """
    lock = _saying.alone()
    is_held = lock.acquire(timeout=_saying.patience)  # a handler that hangs in another thread holds up only forks
    try:
        logger.log(level, "%s", message)
    except Exception as error:  # noqa: BLE001 - the program's handlers may raise anything; ``warn_once`` counts it
        forward(error)
        return False
    else:
        return True
    finally:
        if is_held:
            lock.release()


def printable(text: object, limit: int = 80) -> str:
    """Return text for a message: one line, control characters escaped, bounded in length."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text)[: limit + 1])
    return line if len(line) <= limit else line[: limit - 1] + "…"


def shown(thing: object, limit: int = 80) -> str:
    """Return what a message can show of any object."""
    try:
        return printable(repr(thing), limit)
    # What is to be said about the object is said, and counted, without its own words.
    except Exception as failed:  # noqa: BLE001 - the __repr__ of a host's object may raise anything
        forward(failed)
        return printable(object.__repr__(thing), limit)


def described(error: BaseException, limit: int = 200) -> str:
    """Return an exception's class and words; the class alone when there are none."""
    name = type(error).__name__
    try:
        words = " ".join(str(error).split())
    # The exception itself is said, and counted, without them.
    except Exception as failed:  # noqa: BLE001 - the __str__ of a host's exception may raise anything
        forward(failed)
        words = ""
    return printable(f"{name}: {words}" if words else name, limit)
