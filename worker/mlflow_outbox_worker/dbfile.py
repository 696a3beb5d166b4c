"""The files of the ledger's database: looking at them, making them, setting them aside.

SQLite keeps ``cache.db``, and beside it ``cache.db-wal`` and ``cache.db-shm`` while it is in use. The rules:

* They lie in a directory of mode 0700 that belongs to the user. A link, a pipe, a device, a file with a second name
  or of another user in their place is refused and left untouched: whoever put it there may want us to write to it.
* **Files are renamed, never deleted.** What is damaged, foreign or altered becomes ``cache.db.corrupt-<n>``, with
  its ``-wal`` and ``-shm``, so that SQLite can still open what is in it.
* **cache.db is only looked at by lstat.** Opening and closing it would drop the POSIX locks of every SQLite
  connection that this process has to it. For the same reason nobody may copy it with ``open()`` while it is in use.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path
from typing import Final, NamedTuple, NoReturn

from mlflow_outbox.errors import OutboxUnusable
from mlflow_outbox.spool.private import make_all_private

#: Name of the database; diskcache's.
NAME: Final = "cache.db"
#: Bytes of the header of a -wal, which SQLite syncs before it writes the first frame.
LOG_HEADER: Final = 32
_SUFFIXES: Final = ("", "-wal", "-shm")
#: Where in the header of a database stands by which version it may be written.
_WRITE_VERSION: Final = 18
#: Bytes of the smallest page that SQLite can be told to use; a shorter file it takes for an empty one.
_LEAST_SIZE: Final = 512


class FileState(NamedTuple):
    """What lstat says of a file: inode, bytes, time of change in ns, and whether it is a directory."""

    inode: int
    size: int
    changed_ns: int
    is_directory: bool


def look(directory: Path) -> dict[str, FileState]:
    """Return the state of those files of the database that there are, by suffix: "", "-wal", "-shm".

    Raises:
        OutboxUnusable: the directory or one of the files is not safe to use.
    """
    try:
        status = os.lstat(directory)
    except FileNotFoundError:
        return {}
    if not stat.S_ISDIR(status.st_mode):
        refuse(directory, "is a symbolic link" if stat.S_ISLNK(status.st_mode) else "is not a directory")
    if status.st_uid != os.geteuid():
        refuse(directory, f"belongs to user {status.st_uid}")
    if status.st_mode & 0o077:
        refuse(directory, f"has mode {status.st_mode & 0o777:04o} instead of 0700 (chmod 700 makes it so)")
    found = {}
    for suffix in _SUFFIXES:
        path = directory / (NAME + suffix)
        try:
            status = os.lstat(path)
        except FileNotFoundError:
            continue
        is_directory = stat.S_ISDIR(status.st_mode)
        if not stat.S_ISREG(status.st_mode) and not is_directory:
            refuse(path, "is a symbolic link" if stat.S_ISLNK(status.st_mode) else "is not a regular file")
        if status.st_nlink > 1 and not is_directory:
            refuse(path, "has a second name (a hard link)")
        if status.st_uid != os.geteuid():
            refuse(path, f"belongs to user {status.st_uid}")
        found[suffix] = FileState(status.st_ino, status.st_size, status.st_mtime_ns, is_directory)
    return found


def ruin(found: dict[str, FileState]) -> str:
    """Return what is wrong with files that SQLite would delete, or take for a new database's; "" for all others."""
    main, log = found.get(""), found.get("-wal")
    if any(state.is_directory for state in found.values()):
        return "is a directory"
    if main is None:
        return "has lost its main file" if found else ""
    if main.size < _LEAST_SIZE and (main.size or (log and log.size)):
        return f"was cut to {main.size} bytes"
    return ""


def is_marked_read_only(path: Path) -> bool:
    """Return whether SQLite would take a database for one that only a later version may write, as damage can make it.

    It says then what it says of a file that may not be written, which can pass. To be called while this process has the
    file open nowhere else: closing it gives up all locks that the process has on it.

    Args:
        path: the database; its header is described in sqlite.org/fileformat.html, 1.3.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        version = file.read(_WRITE_VERSION + 1)[_WRITE_VERSION:]
    return version > b"\2"  # 1 is with a rollback journal, 2 with a log; an empty file has none


def make_directory(directory: Path) -> None:
    """Make the directory with mode 0700, unless there is one.

    Raises:
        OSError: it cannot be made.
    """
    if not os.path.lexists(directory):
        make_all_private(directory)
        _sync(directory.parent)


def make(directory: Path) -> None:
    """Make an empty database file of mode 0600, a mode that SQLite gives to -wal and -shm too, unless there is one.

    Raises:
        OSError: it cannot be made.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with contextlib.suppress(FileExistsError):
        os.close(os.open(directory / NAME, flags, 0o600))
        _sync(directory)


def set_aside(directory: Path) -> str:
    """Rename the files of the database to the next free name, and return that.

    Raises:
        OSError: they cannot be renamed.
    """
    number = 1
    while any(os.path.lexists(directory / f"{NAME}.corrupt-{number}{suffix}") for suffix in _SUFFIXES):
        number += 1
    aside = f"{NAME}.corrupt-{number}"
    for suffix in _SUFFIXES:
        with contextlib.suppress(FileNotFoundError):
            os.rename(directory / (NAME + suffix), directory / (aside + suffix))
    _sync(directory)
    return aside


def refuse(path: Path, why: str) -> NoReturn:
    """Raise OutboxUnusable for a file or directory that is not to be touched."""
    msg = f"{path} {why}; it is not safe to use and was left untouched"
    raise OutboxUnusable(msg)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
