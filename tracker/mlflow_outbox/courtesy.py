"""Calls that follow each other fast give the interpreter away when the background needs it.

CPython's lock is not handed on, it is let go of and taken. A thread that wants it sleeps until it is told that it is
free, which takes some 40 us, and asks for it only when it has been told nothing for 5 ms. A program whose calls write
an event every 0.2 ms lets go of it for 2 us each time, so that the background, woken for nothing, never gets to ask. It
waited for tenths of a second at each step of its rounds, and each call paid 7 us, more than for all else, to wake it.

So the background says when it will want the lock, and the first call after that lets go of it for as long as it takes
to come and do its work, in a C function that works on without the lock: a sleep would take as long again to end. Where
the background cannot know when, as with an fsync, it is offered the lock once in a millisecond, and later on more
rarely. Programs whose calls are more than 5 ms apart need none of this, since there a waiting thread does get to ask.
"""

from __future__ import annotations

import os
import threading
import time
import zlib
from typing import Final

#: Nanoseconds after which a thread that has waited for the lock asks for it (``sys.getswitchinterval``).
_ASKED_FOR: Final = 5_000_000
#: Nanoseconds from a timer's end until its thread waits for the lock.
_WAKING: Final = 150_000
#: Nanoseconds after which a call that gave the lock away says nothing of the calls that come now.
_FORGOTTEN: Final = 5_000_000_000
#: Nanoseconds from one offer to the next; how many of them come at this pace, while a thread waits for something and
#: while it works; and how often the pause is doubled after that.
_OFFERED: Final = 1_000_000
_OFTEN: Final = 20
_OFTEN_AT_WORK: Final = 500
_DOUBLED: Final = 9
_NEVER: Final = 1 << 63
#: What takes 60 us without the lock: zlib lets go of it for more than 5 KiB.
_SOMETHING: Final = bytes(192 * 1024)
#: How often that is done at most in one call, while the background is in the middle of something.
_AT_ONCE: Final = 4


class Courtesy:
    """When the next call is to give the lock away; one object for a process, as there is one lock.

    Attributes:
        due: wall-clock nanoseconds since the epoch. A clock that is set back delays no more than one round.
    """

    __slots__ = ("_gave", "_offers", "_wanted", "_working", "due")

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin anew, as in a forked child, which has none of the threads."""
        self.due = _NEVER
        self._offers = 0
        self._gave = 0
        #: By thread: when it will want the lock.
        self._wanted: dict[int, int] = {}
        #: The threads that are in the middle of something.
        self._working: set[int] = set()

    def give_way(self, now: int) -> bool:
        """Give the lock away if calls follow each other fast; to be called after an event, when it is due.

        Args:
            now: wall-clock nanoseconds since the epoch.

        Returns:
            Whether it did.
        """
        fast = now - self.due < _ASKED_FOR
        self._offers += 1
        beyond = self._offers - (_OFTEN_AT_WORK if self._working else _OFTEN)
        pause = _OFFERED << min(max(0, beyond), _DOUBLED)
        self.due = max(now + pause, min(list(self._wanted.values()), default=_NEVER))
        if fast:
            self._gave = now
            for _ in range(_AT_ONCE):
                zlib.crc32(_SOMETHING)
                if not self._working:
                    break
        return fast

    def is_used(self, now: int) -> bool:
        """Return whether calls that follow each other fast have given the lock away of late.

        Args:
            now: wall-clock nanoseconds since the epoch.
        """
        return now - self._gave < _FORGOTTEN

    def works(self) -> None:
        """Note that the calling thread has the lock, and will want it again each time that it lets go of it."""
        self._working.add(threading.get_ident())
        self._want(time.time_ns() + _OFFERED)

    def waits(self) -> None:
        """Note that the calling thread lets go of the lock for something that takes nobody knows how long.

        Nothing is noted of a thread that has not said before that it works, as of the program's own.
        """
        if threading.get_ident() in self._wanted:
            self._working.discard(threading.get_ident())
            self._want(time.time_ns() + _OFFERED)

    def sleeps(self, seconds: float) -> None:
        """Note that the calling thread lets go of the lock until a time from now."""
        self._working.discard(threading.get_ident())
        self._want(time.time_ns() + int(seconds * 1e9) + _WAKING)

    def leaves(self) -> None:
        """Note that the calling thread ends, or goes to where it is not waited for."""
        self._working.discard(threading.get_ident())
        self._wanted.pop(threading.get_ident(), None)
        self.due = min(list(self._wanted.values()), default=_NEVER)

    def _want(self, when: int) -> None:
        self._wanted[threading.get_ident()] = when
        self._offers = 0
        self.due = min(list(self._wanted.values()))


courtesy = Courtesy()

os.register_at_fork(after_in_child=courtesy.forget)
