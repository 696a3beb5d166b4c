"""A reserve beside the ledger: bytes of the disk taken while there is room, to be given back when there is none.

Noting that an event was delivered takes room (SQLite writes before it forgets), and so may filing a run (a directory
takes a block). On a disk without a byte free nothing would be acknowledged any more, and so nothing deleted. The
reserve is a file of nothing, allocated in full when its outbox is made and again whenever there is room; whoever
writes to the ledger gives it back before the disk is full, and what delivery frees makes the next one.

It is a help, never a condition: where it cannot be made nothing is said, and everything else works as without it.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path
from typing import Final

from mlflow_outbox.spool.extent import RESERVE

NAME: Final = RESERVE
#: Bytes: a new ledger (0.1 MB), its log until it is cut (see LOW), a directory for each of a hundred runs.
SIZE: Final = 1024 * 1024
#: Bytes free below which it is given back; the commit of a run with a thousand keys takes less.
LOW: Final = 256 * 1024
#: Bytes free above which it is made: it must not be what fills the disk.
ROOM: Final = 8 * SIZE
#: Bytes that count as free where nobody tells: more than any setting asks for, so that nothing gives way for it.
_UNTOLD: Final = 1 << 62


def free(folder: Path) -> int:
    """Return the bytes that are free on the disk of a directory; as good as unlimited when that cannot be told.

    Some file systems say that they have no blocks at all: tmpfs without a limit, FUSE where its program does not say.
    """
    try:
        found = os.statvfs(folder)
    except OSError:
        return _UNTOLD
    return found.f_bavail * found.f_frsize if found.f_blocks else _UNTOLD


def make(folder: Path) -> None:
    """Make the reserve of a directory, and that too, unless it is there or the disk has little room."""
    path = folder / NAME
    with contextlib.suppress(OSError):
        if os.path.lexists(path) and os.lstat(path).st_blocks * 512 >= SIZE:  # a copy may be all holes
            return
        if free(folder.parent) < ROOM:
            return
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, 0o700)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                return
            try:
                os.posix_fallocate(fd, 0, SIZE)
            except OSError:
                os.ftruncate(fd, 0)  # a part of it would be taken for all
        finally:
            os.close(fd)


def release(folder: Path) -> bool:
    """Give the reserve of a directory back; return whether there was one."""
    try:
        fd = os.open(folder / NAME, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or not found.st_size:
            return False
        os.ftruncate(fd, 0)  # takes no room, unlike a name that comes and goes
    except OSError:
        return False
    finally:
        os.close(fd)
    return True
