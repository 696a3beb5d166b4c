"""One worker per outbox: a lock that the kernel releases when its holder dies.

``worker.lock`` is locked with flock and never unlinked (a lock on a file that is no longer there excludes nobody).
Its content says who
holds it, for messages only: what decides is the lock. The file's identity is checked after locking, so that somebody
who removed or replaced it meanwhile cannot make two workers.

Processes on another machine are not excluded by flock on every network file system; see ``host_lease`` for those.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import threading
from pathlib import Path
from typing import Final

import msgspec

from mlflow_outbox.living import Living
from mlflow_outbox.spool.private import above_streams

#: What file systems answer that have no locks, such as some of a cluster's on which homes lie, and what helps.
_NO_LOCKS: Final = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP})
_REMEDY: Final = "give MLFLOW_OUTBOX_DIR, or XDG_STATE_HOME if the outbox is on the network, a disk of this machine"


class Holder(msgspec.Struct):
    """Who holds a lease, as it wrote itself down; ``host`` is "" when it could not."""

    host: str
    pid: int
    kind: str


class Lease:
    """The right to deliver one outbox.

    Args:
        path: the lock file.
        kind: what this worker is, for the message that others show: "thread", "process", "command".
        inherited: a descriptor of the lock file that was locked by the process that started this one; -1 when there is
            none.
    """

    def __init__(self, path: Path, kind: str, *, inherited: int = -1) -> None:
        self._path = path
        self._kind = kind
        self._inherited = inherited
        self._fd = -1
        self._acquiring = threading.Lock()
        _leases.add(self)

    def __repr__(self) -> str:
        return f"<Lease {str(self._path)!r}, {'held' if self.is_held() else 'not held'}>"

    def acquire(self) -> bool:
        """Take the lease unless another worker has it; return whether it is held now.

        Raises:
            OSError: the lock file cannot be made or locked for another reason.
        """
        with self._acquiring:
            return self._fd >= 0 or self._take()

    def _take(self) -> bool:
        fd, self._inherited = self._inherited, -1
        if fd < 0:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = above_streams(os.open(self._path, flags, 0o600))  # it is handed down to a child, which has streams
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_same(fd, self._path):
                os.close(fd)
                return False
        except BlockingIOError:
            os.close(fd)
            return False
        except OSError as error:
            os.close(fd)
            if error.errno not in _NO_LOCKS:
                raise
            msg = f"{error.strerror}: {self._path} cannot be locked; {_REMEDY}"
            raise OSError(error.errno, msg) from None
        except BaseException:  # raised again: nobody would know of the descriptor
            os.close(fd)
            raise
        self._fd = fd
        note = msgspec.json.encode(Holder(socket.gethostname(), os.getpid(), self._kind))
        with contextlib.suppress(OSError):  # a full disk must not keep a worker from making room
            os.ftruncate(fd, 0)
            os.pwrite(fd, note, 0)
        return True

    def fileno(self) -> int:
        """Return the descriptor of the locked file, for a child process that is to hold the lease; -1 without it."""
        return self._fd

    def is_held(self) -> bool:
        """Return whether this object holds the lease."""
        return self._fd >= 0

    def is_sound(self) -> bool:
        """Return whether the lock file is still the one that was locked; else another worker may lock the new one."""
        return self._fd >= 0 and _is_same(self._fd, self._path)

    def release(self) -> None:
        """Give the lease back."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                fcntl.flock(self._fd, fcntl.LOCK_UN)  # a forked child may hold a copy of the descriptor
        self.forget()

    def forget(self) -> None:
        """Close the descriptor and leave the lock to whoever holds another copy of it."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def other(self) -> Holder | None:
        """Return who else holds the lease; None when nobody does, or this object, which may just be taking it."""
        with self._acquiring:
            return None if self._fd >= 0 else holder(self._path)

    def forked(self) -> None:
        """Let go in a forked child, where another thread's lock would be held for ever."""
        self._acquiring = threading.Lock()
        self.forget()


def holder(path: Path) -> Holder | None:
    """Return who holds the lease at a path; None when nobody does."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        try:
            return msgspec.json.decode(os.pread(fd, 4096, 0), type=Holder)
        except (OSError, ValueError, RecursionError):  # no JSON, no UTF-8, nested too deeply
            return Holder("", 0, "")
    except OSError:
        return None
    finally:
        os.close(fd)
    return None


def _is_same(fd: int, path: Path) -> bool:
    try:
        there = os.stat(path, follow_symlinks=False)
    except OSError:
        return False
    here = os.fstat(fd)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


_leases: Living[Lease] = Living()


def _after_fork_in_child() -> None:
    """Let go in the child: a lock belongs to the open file, so an inherited descriptor would outlive the parent."""
    for lease in _leases.members():
        lease.forked()


os.register_at_fork(after_in_child=_after_fork_in_child)
