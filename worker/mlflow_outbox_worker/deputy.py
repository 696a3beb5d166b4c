"""The process that delivers as a deputy: it syncs a program's live segments in the place of the program's own rounds.

A round of syncing takes the interpreter from the program's threads, at its beginning and after each system call; beside
calls 0.2 ms apart it is most of what one call in a thousand waits for. A process of our own that is there anyway has an
interpreter of its own, and on a disk of this machine ``fdatasync`` makes a file durable whichever process asks for it.
(On a file system of the network it may know only what was written by that very descriptor, as sshfs and s3fs do: there
is no deputy there.)

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

The program asks over a pair of datagram sockets, ``{"number": n, "segments": ["<run>/<writer>-<ordinal>.log"]}``, and
never waits: what does not fit into the buffer is said at its next round. It is answered on a page of memory that both
processes have (``memfd_create``; where there is none, there is no deputy): 8 bytes with the number of what was asked,
and 8 with the time of ``stopwatch`` at which the last round began that was whole. To look there is no system call.
The other end is ``substitute``.
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from typing import Final

from mlflow_outbox import stopwatch
from mlflow_outbox.settings import Settings
from mlflow_outbox.spool import private
from mlflow_outbox_worker import sockets

#: Segments that a deputy is asked to sync, at most: it holds a descriptor for each.
MOST_SEGMENTS: Final = 64
#: Intervals for which a round of the deputy counts.
_COUNTS_FOR: Final = 2.0
#: What stands on the page: the number, and the seconds.
ANSWER: Final = struct.Struct("=Qd")


class Page:
    """A page of memory with the last answer, which lasts as long as somebody has it.

    Args:
        fd: its descriptor, which is this object's from now on; the memory stays when it is closed.

    Raises:
        OSError: it cannot be used.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        try:
            with private.streams_taken():  # it keeps a descriptor of its own
                self._memory = mmap.mmap(fd, ANSWER.size)
        except BaseException:  # raised again: nobody would know of the descriptor
            os.close(fd)
            raise

    @classmethod
    def made(cls) -> Page:
        """Return a new one, on which nothing was asked and nothing answered.

        Raises:
            OSError: it cannot be made.
        """
        make: Callable[[str], int] | None = getattr(os, "memfd_create", None)
        if make is None:
            raise OSError(errno.ENOSYS, "no memory can be shared here")
        fd = private.above_streams(make("mlflow-outbox"))
        try:
            os.ftruncate(fd, ANSWER.size)
        except OSError:  # a limit for the size of files counts for memory too
            os.close(fd)
            raise
        return cls(fd)

    def read(self) -> tuple[int, float]:
        """Return the number of what was asked, and the seconds at which that was done last."""
        found: tuple[int, float] = ANSWER.unpack_from(self._memory)
        return found

    def write(self, number: int, at: float) -> None:
        """Answer. Read half, it is another number, or a time before this one."""
        ANSWER.pack_into(self._memory, 0, number, at)

    def close(self) -> None:
        """Give the descriptor back."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


class Deputy:
    """A deputy, as the program sees it.

    Args:
        interval: seconds between two of its rounds.
        clock: seconds of a clock that never goes back, the same for both processes.

    Attributes:
        theirs: the socket of the process.
        page: where it answers.

    Raises:
        OSError: there are no sockets, or there is no such memory.
    """

    def __init__(self, interval: float, clock: Callable[[], float] = stopwatch.seconds) -> None:
        self._interval = interval
        self._clock = clock
        self._held = contextlib.ExitStack()
        self.page = self._held.enter_context(contextlib.closing(Page.made()))
        pair = map(sockets.above_streams, socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM))
        self._own, self.theirs = map(self._held.enter_context, pair)
        for one in (self._own, self.theirs):
            one.settimeout(0.0)
        self._segments: tuple[str, ...] = ()
        self._number = 0
        self._is_told = False
        sockets.close_in_children(self._own, self.theirs)

    def __repr__(self) -> str:
        return f"<Deputy for {len(self._segments)} segments, asked {self._number} times>"

    def syncs(self, segments: tuple[str, ...]) -> bool:
        """Return whether it has synced these segments a moment ago; ask it to do so from now on.

        Args:
            segments: ``<run>/<file name>`` of each, all that the program writes to.
        """
        if segments != self._segments:
            self._segments, self._number, self._is_told = segments, self._number + 1, False
        if not self._is_told and len(segments) <= MOST_SEGMENTS:
            with contextlib.suppress(OSError):  # no room for what is said, or nobody to hear it
                self._own.send(json.dumps({"number": self._number, "segments": segments}).encode())
                self._is_told = True
        number, at = self.page.read()
        return number == self._number and self._clock() - at <= _COUNTS_FOR * self._interval

    def __del__(self, _is_ending: Callable[[], bool] = sys.is_finalizing) -> None:
        """Give the sockets back with a worker that has died; the default is there to the very last."""
        if not _is_ending():
            self.close()

    @property
    def numbers(self) -> tuple[int, int]:
        """The descriptors that the process is to be given, for ``pass_fds``: the socket's and the page's."""
        return self.theirs.fileno(), self.page.fd

    def passed_on(self) -> None:
        """Give up what the process has by now."""
        self.theirs.close()
        self.page.close()

    def close(self) -> None:
        """Give both ends up."""
        self._held.close()


@contextlib.contextmanager
def passed_on(settings: Settings, *, network: bool = False) -> Iterator[Deputy | None]:
    """Make a deputy of the process that the block starts; None where there is nothing for one to do.

    Args:
        settings: the sync level, and the interval.
        network: the outbox is on a file system of the network.
    """
    deputy = None
    if settings.sync == "interval" and not network:
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
    deputy.passed_on()
