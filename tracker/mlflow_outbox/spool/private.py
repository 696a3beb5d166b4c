"""Files and directories that are the user's alone: how they are made, and checked before they are trusted."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from mlflow_outbox.errors import OutboxUnusable

#: The first descriptor that is no standard stream's.
_FIRST: Final = 3
#: What helps where modes cannot be set, as on sticks, on Windows' disks under WSL, and those of its servers.
_ELSEWHERE: Final = (
    "(if its file system keeps no modes, set MLFLOW_OUTBOX_DIR to a directory of another one; what lies here is "
    "sent by mlflow-outbox replay, which only reads it)"
)


def create_private(path: Path, flags: int = os.O_WRONLY) -> int:
    """Create a new file that only the user can read and return its descriptor; never follows a link.

    Raises:
        OSError: it exists already, or cannot be made.
    """
    return above_streams(os.open(path, flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))


def above_streams(fd: int) -> int:
    """Return a descriptor, or another one in its place that is none of a standard stream's.

    In a program that was started without one of these, as daemons are, whatever a library writes to standard error
    would be in the file, or socket. (SQLite does the same, for that reason.)

    Raises:
        OSError: there is no other one; this one is given back.
    """
    if fd >= _FIRST:
        return fd
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FIRST)
    finally:
        os.close(fd)


@contextlib.contextmanager
def streams_taken() -> Iterator[None]:
    """Have nothing that is opened in the block get the number of a standard stream; for what opens by itself.

    Raises:
        OSError: there is no descriptor left.
    """
    with contextlib.ExitStack() as taken:
        while (fd := os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)) < _FIRST:
            taken.callback(os.close, fd)
        os.close(fd)
        yield


def sync_directory(path: Path) -> None:
    """Make the names in a directory survive a power cut.

    Raises:
        OSError: the file system could not do it.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_private(path: Path) -> None:
    """Make a directory that only the user can enter, and those above it as the umask says; leave one that is there.

    So an outbox in a folder of results, which a group may read, closes that to nobody; see ``make_all_private``.

    Raises:
        OSError: it cannot be made.
    """
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        return
    except FileNotFoundError:
        os.makedirs(path.parent, 0o700, exist_ok=True)
        make_private(path)


def make_all_private(path: Path) -> None:
    """Make a directory, and whichever above it is not there, each one that only the user can enter.

    ``os.makedirs`` leaves those above to the umask, with which a group may be allowed to put others in their places.

    Raises:
        OSError: one cannot be made.
    """
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        return
    except FileNotFoundError:
        if path.parent == path:  # a current directory that is gone
            raise
        make_all_private(path.parent)
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)


def check_parent(root: Path) -> None:
    """Check that not everybody can replace what lies in a directory.

    Raises:
        OutboxUnusable: everybody can.
        OSError: it cannot be looked at.
    """
    found = os.stat(root)
    if found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX:
        what = f"{root} can be written by everybody, who could swap the outbox in it"
        msg = f"{what} {_ELSEWHERE}; run: chmod o-w {_quoted(root)}"
        raise OutboxUnusable(msg)


def check_private(path: Path) -> os.stat_result:
    """Return what a directory is that is the user's and that nobody else can enter.

    Raises:
        OutboxUnusable: it is no such directory; the message has the remedy.
        OSError: it cannot be looked at.
    """
    found = os.stat(path, follow_symlinks=False)
    if stat.S_ISLNK(found.st_mode):
        msg = f"{path} is a symbolic link; give the directory that it points to"
        raise OutboxUnusable(msg)
    if not stat.S_ISDIR(found.st_mode):
        msg = f"{path} is not a directory; move it away"
        raise OutboxUnusable(msg)
    if found.st_uid != os.geteuid():
        msg = (
            f"{path} belongs to user {found.st_uid}, this process runs as user {os.geteuid()}; "
            "give a directory of your own"
        )
        raise OutboxUnusable(msg)
    if found.st_mode & 0o077:
        mode = f"{stat.S_IMODE(found.st_mode):04o}"
        msg = f"{path} has mode {mode}, so others can enter it {_ELSEWHERE}; run: chmod 700 {_quoted(path)}"
        raise OutboxUnusable(msg)
    return found


def check_parts(path: Path, names: Iterable[str]) -> None:
    """Check that what has one of some names in a directory is a file or a directory there.

    Raises:
        OutboxUnusable: one is a link, which leads elsewhere, or a pipe or device, which is waited for.
        OSError: one cannot be looked at.
    """
    for name in names:
        try:
            mode = os.stat(path / name, follow_symlinks=False).st_mode
        except FileNotFoundError:
            continue
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            what = "a symbolic link" if stat.S_ISLNK(mode) else "neither a file nor a directory"
            msg = f"{path / name} is {what}, which no outbox holds under that name; move it away"
            raise OutboxUnusable(msg)


def check_no_link(*places: Path) -> None:
    """Check that what is moved from or to some places stays in the outbox, which somebody else may have packed.

    Raises:
        OSError: one is a symbolic link.
    """
    for place in places:
        if os.path.islink(place):
            raise OSError(errno.ELOOP, "it is a symbolic link, which is never followed; remove it", str(place))


def _quoted(path: Path) -> str:
    """Return a path as a shell takes it."""
    import shlex  # only needed for the remedy

    return shlex.quote(str(path))


def read_regular(path: Path) -> bytes:
    """Return the content of a regular file, at most 1 MiB; never follows a link, never waits for a pipe.

    Raises:
        OutboxUnusable: it is something else.
        OSError: it cannot be read.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            msg = f"{path} is not a regular file"
            raise OutboxUnusable(msg)
        return file.read(1024 * 1024)


def write_once(path: Path, data: bytes) -> None:
    """Write a file wholly and durably, or leave the one that another process wrote first.

    Raises:
        OSError: it cannot be written.
    """
    draft = path.with_name(f".{path.name}-{os.urandom(4).hex()}")
    fd = create_private(draft)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(fd)
        try:
            os.link(draft, path)  # unlike rename, fails when another process was first
        except FileExistsError:
            return
        except OSError:
            if os.path.lexists(path):
                return  # another process was first and has removed the draft
            with contextlib.suppress(FileNotFoundError):  # one that found another's file there has removed the draft
                os.rename(draft, path)  # a file system without hard links
            return
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(draft)
    remove_drafts(path)
    sync_directory(path.parent)


def remove_drafts(path: Path) -> None:
    """Remove what processes that died in ``write_once`` have left beside a file; it is there, so that is worthless.

    One that lives and has lost its draft finds that the file is there.
    """
    with contextlib.suppress(OSError):
        for name in os.listdir(path.parent):
            if name.startswith(f".{path.name}-"):
                with contextlib.suppress(OSError):
                    os.unlink(path.parent / name)
