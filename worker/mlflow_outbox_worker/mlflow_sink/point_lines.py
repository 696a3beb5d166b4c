"""The file of one metric in a file store: a line for each point, ``<time in ms> <value> <step>`` and a line feed.

The points of a batch are added in one write, all of them or none. A process that is killed in it, or a full disk,
leaves a torn last line, and half a line can look like another point. So it is cut off before anything is added to the
file, and nobody takes it for a point.

While a write goes on, its beginning is seen by everybody else, and ends in the middle of a line too. Whoever adds lines
or cuts one off has the file's lock (flock) meanwhile; who gets it knows that none of ours is at it. Where there are no
locks, readers cut nothing off.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections import OrderedDict
from collections.abc import Iterator

from mlflow_outbox import stopwatch

#: In the line of a point: time in ms, value, step.
_FIELDS = 3
#: Seconds for which a writer waits for another, which takes milliseconds; and between two tries.
_PATIENCE = 5.0
_PAUSE = 0.001
#: Lines that are held of all files together: some 40 MB.
_HELD = 300_000


class Unusual(Exception):
    """Raised for a point as earlier versions of MLflow have written it, or one that names a dataset."""


class Lines:
    """Knows the lines of files to which lines are only added; each is read once, as long as it is held."""

    def __init__(self) -> None:
        #: By path, the one asked for last at the end: how far the file was read, and its lines.
        self._files: OrderedDict[str, tuple[int, set[bytes]]] = OrderedDict()

    def has(self, path: str, line: str) -> bool:
        """Return whether a file has a line, which is given with its line feed.

        Raises:
            OSError: the file cannot be read.
        """
        read, lines = self._files.pop(path, (0, set()))
        try:
            file = open(path, "rb")  # noqa: SIM115 - closed by the with statement below
        except FileNotFoundError:
            return False
        with file:
            if os.fstat(file.fileno()).st_size < read:  # another file
                read, lines = 0, set()
            file.seek(read)
            for one in file:
                if one.endswith(b"\n"):  # else torn, or on its way
                    lines.add(one)
                    read += len(one)
        self._files[path] = read, lines
        while len(self._files) > 1 and sum(len(held) for _, held in self._files.values()) > _HELD:
            self._files.popitem(last=False)
        return line.encode() in lines


def plain(path: str) -> Iterator[tuple[int, int, float]]:
    """Yield step, time in ms and value of each point.

    Args:
        path: of the file.

    Raises:
        Unusual: a line does not consist of these three.
    """
    with open(path, "rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                return  # torn, or on its way
            fields = line.split(b" ")
            if len(fields) != _FIELDS:
                raise Unusual
            yield int(fields[2]), int(fields[0]), float(fields[1])


def append(path: str, lines: bytes) -> None:
    """Add lines, all of them or none.

    Args:
        path: of the file, which is made when it is not there.
        lines: each with its line feed.

    Raises:
        BlockingIOError: another process does not let go of the file.
        OSError: the disk did not take them.
    """
    os.makedirs(os.path.dirname(path), exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        _take(fd, path)
        size = _without_torn_line(fd)
        rest = memoryview(lines)
        try:
            while rest:
                rest = rest[os.write(fd, rest) :]
        except OSError:
            os.ftruncate(fd, size)
            raise
    finally:
        os.close(fd)


def mended(path: str) -> bool:
    """Cut a torn last line off a file that nobody writes; return whether a point is in it.

    Args:
        path: of the file.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if not size or os.pread(file.fileno(), 1, size - 1) == b"\n":
            return bool(size)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:  # read-only: MLflow finds the words, if it can make nothing of the line
            return True
        try:
            if locked(fd, fcntl.LOCK_EX):
                return bool(_without_torn_line(fd))
            return b"\n" in os.pread(fd, size, 0)
        finally:
            os.close(fd)


def locked(fd: int, kind: int, *, unless_unsupported: bool = False) -> bool:
    """Take a lock if it is free, and return whether it is ours.

    Args:
        fd: of the file or directory.
        kind: fcntl.LOCK_SH or fcntl.LOCK_EX.
        unless_unsupported: what to return where there are no locks.
    """
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return unless_unsupported
    return True


def _take(fd: int, path: str) -> None:
    until = stopwatch.seconds() + _PATIENCE
    while not locked(fd, fcntl.LOCK_EX, unless_unsupported=True):
        if stopwatch.seconds() >= until:
            raise BlockingIOError(path)
        time.sleep(_PAUSE)


def _without_torn_line(fd: int) -> int:
    """Cut the torn last line off a file, if it has one, and return the size."""
    size = os.fstat(fd).st_size
    if size and os.pread(fd, 1, size - 1) != b"\n":
        size = os.pread(fd, size, 0).rfind(b"\n") + 1
        os.ftruncate(fd, size)
    return size
