"""The system calls that a journal makes, as one object, so that a test can make any of them fail."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from pathlib import Path
from typing import Final

from mlflow_outbox.spool.filesystem import is_network
from mlflow_outbox.spool.private import create_private, sync_directory

#: Tries to lock a new segment, half a millisecond apart; readers hold its lock for microseconds.
_LOCK_TRIES: Final = 100
#: Modules through which an error of the disk comes.
_OWN_FRAMES: Final = frozenset(
    {"mlflow_outbox", "mlflow_outbox_worker", "os", "posixpath", "genericpath", "contextlib", "pathlib"}
)


class SystemDisk:
    """The real disk. ``mlflow_outbox.testing.FailingDisk`` is the other implementation."""

    #: write(fd, bytes) -> number written; the builtin itself, so that the logging call pays nothing for this seam.
    write = staticmethod(os.write)
    #: Where a segment's data becomes durable; its size too, its times not.
    datasync = staticmethod(getattr(os, "fdatasync", os.fsync))
    truncate = staticmethod(os.ftruncate)
    close = staticmethod(os.close)
    sync_directory = staticmethod(sync_directory)

    def create(self, path: Path) -> int:
        """Create a segment file, append-only and locked: the lock tells readers on this machine that its writer lives.

        On a network file system there is no lock: one could wait for a server that is not there.
        """
        locks = not is_network(path.parent)
        fd = create_private(path, os.O_RDWR | os.O_APPEND)  # read too: what an interrupted call has left behind
        try:
            if locks:
                _lock(fd)
        except BaseException:  # raised again: what a signal handler raised, and nobody would know of the descriptor
            os.close(fd)
            raise
        return fd

    @staticmethod
    def reopen(path: Path) -> int:
        """Open a complete segment, to sync it."""
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


#: What opening says where it may go well in a moment.
_ANOTHER_TIME: Final = frozenset({errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM})


def _lock(fd: int) -> None:
    for _ in range(_LOCK_TRIES):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.0005)  # a reader looks at this very moment; without the lock it would take us for dead
        except OSError:
            return  # a file system without locks; there age decides whether we live
        else:
            return


def is_being_written(path: Path) -> bool:
    """Return whether a living process of this machine holds a segment open for writing.

    On a network file system nobody can tell, and the answer is False; see ``writer.writer_state``. Where it cannot be
    told at this moment, for want of descriptors or of an answer of the disk, the answer is True.
    """
    return not is_network(path.parent) and is_locked(path)


def is_locked(path: Path) -> bool:
    """Return whether a living process holds the lock of a file, as a worker does wherever its lock file lies.

    A home may lie on a network file system, and with it the state directory. Where it cannot be told at this moment,
    the answer is True.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        return error.errno in _ANOTHER_TIME
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(fd)
    return False


def is_there(path: Path) -> bool:
    """Return whether there is something at a path; ``os.path.lexists`` takes a disk that fails for a file that is gone.

    Raises:
        OSError: the disk does not tell.
    """
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # of a name with a NUL, which an event may hold
        return False
    return True


def is_foreign(error: OSError) -> bool:
    """Return whether an OSError is no answer of the disk but what a signal handler raised, such as a TimeoutError."""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_globals.get("__name__", "").partition(".")[0] not in _OWN_FRAMES:
            return True
        trace = trace.tb_next
    return False


def short_write() -> OSError:
    """Return the error that a write means which took only a part."""
    return OSError(errno.ENOSPC, "the disk is full: a write was short")
