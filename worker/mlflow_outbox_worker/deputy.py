"""The process that delivers as a deputy: it syncs a program's live segments in the place of the program's own rounds.

A round of syncing takes the interpreter from the program's threads, at its beginning and after each system call; beside
calls 0.2 ms apart it is most of what one call in a thousand waits for. A process of our own that is there anyway has an
interpreter of its own, and ``fdatasync`` makes a file durable whichever process asks for it.

What holds:

* The program never relies on it: its own rounds go on, with a sync of each segment by its own descriptor, at
  ``caretaker.RELIEVED`` times the interval. So an error of the disk is still the program's to find and to mend: Linux
  reports one to each descriptor that was open when it happened, whoever has heard of it before (``man 2 fsync``,
  "ERRORS"; since 4.13).
* It counts on it only while it hears that the very segments that it has asked for were synced within the last two
  intervals. A deputy that was killed, stopped, or met an error says nothing, and the round that notices makes up for
  it: a power cut in between takes what was logged in so many intervals, not in one.
* Only live segments are left to it whose names, and all that is before them, the program has made durable. Whatever
  else there is to do, such as a new segment, a copied file, or a disk that fails, wakes the program's own background.

Between the two goes one pair of datagram sockets, neither end of which ever waits: ``{"number": n, "segments":
["<run>/<writer>-<ordinal>.log"]}`` that way, and ``n seconds`` this way after each round that was whole, with the time
of ``stopwatch`` at which it began. What does not fit into a socket's buffer is not said. The other end is
``substitute``.
"""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable, Iterator
from typing import Final

from mlflow_outbox import stopwatch
from mlflow_outbox.settings import Settings
from mlflow_outbox_worker import sockets

#: Segments that a deputy is asked to sync, at most: it holds a descriptor for each.
MOST_SEGMENTS: Final = 64
#: Intervals for which a round of the deputy counts.
_COUNTS_FOR: Final = 2.0
_DATAGRAM: Final = 65536


class Deputy:
    """A deputy, as the program sees it.

    Args:
        interval: seconds between two of its rounds.
        clock: seconds of a clock that never goes back, the same for both processes.

    Raises:
        OSError: there is no pair of sockets.
    """

    def __init__(self, interval: float, clock: Callable[[], float] = stopwatch.seconds) -> None:
        self._interval = interval
        self._clock = clock
        self._own, self.theirs = map(sockets.above_streams, socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM))
        for one in (self._own, self.theirs):
            one.settimeout(0.0)
        self._segments: tuple[str, ...] = ()
        self._number = 0
        self._is_told = False
        self._heard = (0, float("-inf"))
        sockets.close_in_children(self._own, self.theirs)

    def __repr__(self) -> str:
        return f"<Deputy for {len(self._segments)} segments, last heard of number {self._heard[0]}>"

    def syncs(self, segments: tuple[str, ...]) -> bool:
        """Return whether it has synced these segments a moment ago; ask it to do so from now on.

        Args:
            segments: ``<run>/<file name>`` of each, all that the program writes to.
        """
        if segments != self._segments:
            self._segments, self._number, self._is_told = segments, self._number + 1, False
        try:
            if not self._is_told and len(segments) <= MOST_SEGMENTS:
                self._own.send(json.dumps({"number": self._number, "segments": segments}).encode())
                self._is_told = True
            while True:
                number, _, at = self._own.recv(_DATAGRAM).partition(b" ")
                self._heard = (int(number), float(at))
        except OSError:  # there is nothing more to hear; or no room for what is said, or nobody to hear it
            pass
        number_heard, at_heard = self._heard
        return number_heard == self._number and self._clock() - at_heard <= _COUNTS_FOR * self._interval

    def __del__(self) -> None:
        """Give the sockets back with the worker that is forgotten, without a warning."""
        self.close()

    @property
    def numbers(self) -> tuple[int]:
        """The descriptor that the process is to be given, for ``pass_fds``."""
        return (self.theirs.fileno(),)

    def close(self) -> None:
        """Give both ends up."""
        self._own.close()
        self.theirs.close()


@contextlib.contextmanager
def passed_on(settings: Settings) -> Iterator[Deputy | None]:
    """Make a deputy of the process that the block starts; None where there is nothing for one to do.

    Args:
        settings: the sync level, and the interval.
    """
    deputy = None
    if settings.sync == "interval":
        with contextlib.suppress(OSError):  # no descriptors left: the program's own rounds do without
            deputy = Deputy(settings.sync_interval)
    if deputy is None:
        yield None
        return
    try:
        yield deputy
    except BaseException:  # raised again: nothing was started
        deputy.close()
        raise
    deputy.theirs.close()
