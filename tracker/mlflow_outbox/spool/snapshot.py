"""Copies of artifact files, named by their content, made when the file is logged.

What MLflow gets is the file as it was at the call: the experiment may go on writing, move or delete it. A copy lies
inside the run's directory (``files/<sha256>``), so that the directory can be moved to another machine as a whole; the
same content logged twice is kept once.

The source is opened without blocking and must be a regular file: a FIFO would stop the experiment, a device would
never end. A file that changes while it is copied is taken as read; its digest is that of the copy.

What a worker may take away
---------------------------
A worker moves copies that are delivered out of ``files`` while the run goes on, and ``files`` itself with a run that is
filed. Whoever logs a file holds a shared lock (flock) on the directory from before the copy's draft is made until the
event that names it is on disk (``Hold``). A worker moves something only while it has the directory to itself
(``alone``), and only what no undelivered event on disk names by then. So it never meets a copy whose event is still to
come, and what it has moved no later event relies on: a call makes a copy of its own, at its place in ``files``, unless
it finds one there.

Any of them may be killed at any point, and the kernel gives back what it held. A program killed before its event was
written leaves a draft, or a copy that no event names: the next worker removes the one and takes the other for
delivered. A worker that is killed has moved some copies and not others, each of them by one rename. The lock is that
of the directory's inode, so whoever gets it looks whether its path still leads there, and else begins anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from mlflow_outbox import stopwatch
from mlflow_outbox.counters import printable
from mlflow_outbox.errors import ArtifactRefused
from mlflow_outbox.interrupts import forward
from mlflow_outbox.spool import descriptors
from mlflow_outbox.spool.filesystem import is_network
from mlflow_outbox.spool.private import create_private, sync_directory

_CHUNK: Final = 1024 * 1024
#: The reason of a refusal for want of room.
NO_ROOM: Final = "no_room_for_file"
#: That of one because a worker, which may be stopped, does not let go of the copies.
IN_USE: Final = "files_in_use"
#: What the draft of a copy is called at first.
_DRAFT: Final = ".draft-"
#: Seconds for which a call waits for a worker that moves copies, which takes it milliseconds; and between two tries.
_PATIENCE: Final = 5.0
_PAUSE: Final = 0.002
#: Seconds after which the draft of another machine's program is one of a program that died.
_ABANDONED: Final = 24 * 3600.0
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


class Snapshot(NamedTuple):
    """A file that was kept: hex digest and size in bytes."""

    sha256: str
    size: int


class Hold:
    """Keeps workers from a run's copies, as long as it is not let go; see the module's text.

    Args:
        folder: the ``files`` directory.
        fd: a descriptor of it; what a forked child has of it is closed.
    """

    def __init__(self, folder: Path, fd: int) -> None:
        self._folder = folder
        self._fd = fd
        self._pid = os.getpid()
        #: The copies that were not there before.
        self._made: dict[str, tuple[int, int, int]] = {}

    def is_locked(self, kind: int) -> bool:
        """Lock the directory, if that can be done at once and its path still leads to it; return whether it is so."""
        try:
            fcntl.flock(self._fd, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks: a call goes on, a worker moves nothing
            return kind == fcntl.LOCK_SH
        try:
            found = os.stat(self._folder, follow_symlinks=False)
        except FileNotFoundError:
            return False
        held = os.fstat(self._fd)
        return (held.st_dev, held.st_ino) == (found.st_dev, found.st_ino)

    def made(self, sha256: str, found: os.stat_result) -> None:
        """Take notice of a copy that was not there before."""
        self._made[sha256] = found.st_dev, found.st_ino, found.st_mtime_ns

    def handed_on(self) -> Hold:
        """Return another hold in place of this one, which has nothing to let go of any more."""
        other, self._fd = Hold(self._folder, self._fd), -1
        return other

    def discard(self, sha256: str) -> None:
        """Remove a copy whose event was refused and end the hold; where others may rely on it, it is left to a worker.

        Nobody else may be between a copy and its event, and nobody may have made the same one, or found it, meanwhile.
        """
        made = self._made.get(sha256)
        if made is None or self._fd < 0 or self._pid != os.getpid():
            return
        with contextlib.suppress(OSError):
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found = os.stat(self._folder / sha256, follow_symlinks=False)
            if (found.st_dev, found.st_ino, found.st_mtime_ns) == made:
                os.unlink(self._folder / sha256)

    def let_go(self) -> None:
        """Let workers have the copies."""
        fd, self._fd = self._fd, -1
        if fd >= 0 and self._pid == os.getpid():
            with contextlib.suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_UN)  # a process that was forked meanwhile may hold a copy of the descriptor
            descriptors.close(os.close, fd, self._folder)


class SnapshotStore:
    """The ``files`` directory of one run.

    Args:
        run_directory: the run's directory, which exists.
        durable: make each copy survive a power cut before returning.
        keeps_free: bytes of the disk that a copy leaves free, for the events above all.
    """

    def __init__(self, run_directory: Path, *, durable: bool = False, keeps_free: int = 0) -> None:
        self.path = run_directory / "files"
        self._durable = durable
        self._keeps_free = keeps_free

    @contextlib.contextmanager
    def held(self) -> Iterator[Hold]:
        """Keep what is copied meanwhile where it is; for a call, until the event is written.

        Raises:
            ArtifactRefused: the directory cannot be made, or a worker does not let go of it.
        """
        try:
            hold = self._hold()
        except ArtifactRefused:  # which is an OSError too
            raise
        except OSError as error:
            raise self._no_room("a file", error) from None
        try:
            yield hold
        finally:
            hold.let_go()

    def _hold(self) -> Hold:
        until = stopwatch.seconds() + _PATIENCE
        while True:
            with contextlib.suppress(FileExistsError):
                os.mkdir(self.path.parent, 0o700)
            with contextlib.suppress(FileNotFoundError):  # a worker that files the run removes what is empty
                hold = self._try_to_hold()
                if hold is not None:
                    return hold
            if stopwatch.seconds() >= until:
                msg = f"a worker keeps {self.path} to itself; is it stopped?"
                raise ArtifactRefused(IN_USE, msg)
            time.sleep(_PAUSE)

    def _try_to_hold(self) -> Hold | None:
        with contextlib.suppress(FileExistsError):
            os.mkdir(self.path, 0o700)
        hold = Hold(self.path, descriptors.opened(_opened, self.path))
        try:
            return hold.handed_on() if hold.is_locked(fcntl.LOCK_SH) else None
        finally:
            hold.let_go()

    def add_file(self, source: str | os.PathLike[str], *, limit: int, hold: Hold | None = None) -> Snapshot:
        """Copy a file.

        Args:
            source: path of a regular file; a symbolic link is followed.
            limit: bytes; a larger file is refused.
            hold: from ``held``; None takes one for as long as the copying lasts.

        Raises:
            ArtifactRefused: it is missing or unreadable, which is the cause then; it is not a regular file or too
                large; or the outbox has no room for it.
        """
        shown = printable(os.fspath(source), 400)
        try:
            fd = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            msg = f"the file {shown!r} cannot be read: {reason}"
            raise ArtifactRefused("bad_file", msg) from error
        try:
            found = os.fstat(fd)
            self._check_source(found, shown, limit)
            self._check_room(found.st_size, shown)
            return self._add(iter(lambda: _read(fd, shown), b""), shown, limit, hold)
        finally:
            os.close(fd)

    @staticmethod
    def _check_source(found: os.stat_result, shown: str, limit: int) -> None:
        if not stat.S_ISREG(found.st_mode):
            kind = "directory; use log_artifacts" if stat.S_ISDIR(found.st_mode) else "FIFO, socket or device"
            msg = f"{shown!r} is not a regular file but a {kind}"
            raise ArtifactRefused("bad_file", msg)
        if found.st_size > limit:
            msg = f"the file {shown!r} has {found.st_size} bytes, the setting artifact_bytes allows {limit}"
            raise ArtifactRefused("file_too_large", msg)

    def _check_room(self, size: int, shown: str) -> None:
        """Refuse what the disk has no room for before it is full of it: others write there too, as the program does."""
        try:
            found = os.statvfs(self.path.parent)
        except OSError as error:  # the copying will say what is wrong
            forward(error)
            return
        free, kept = found.f_bavail * found.f_frsize, self._keeps_free
        if found.f_blocks and size + kept > free:
            msg = f"no copy of {shown!r} could be made in {self.path}: it has {size:,} bytes, {free:,} are free there"
            raise ArtifactRefused(NO_ROOM, msg + (f", the setting free_bytes keeps {kept:,}" if kept else ""))

    def add_bytes(self, data: bytes, *, limit: int, name: str = "text", hold: Hold | None = None) -> Snapshot:
        """Keep bytes that have no file; see ``add_file``.

        Raises:
            ArtifactRefused: they are too large, or the outbox has no room for them.
        """
        self._check_room(len(data), name)
        return self._add(iter([data] if data else []), name, limit, hold)

    def _add(self, chunks: Iterator[bytes], shown: str, limit: int, hold: Hold | None) -> Snapshot:
        if hold is None:
            with self.held() as own:
                return self._add(chunks, shown, limit, own)
        draft = self.path / f"{_DRAFT}{os.urandom(8).hex()}"
        digest, size = hashlib.sha256(), 0
        try:
            # Not the built-in, which is gone when what is logged at the very end is.
            with io.open(create_private(draft), "wb") as copy:  # noqa: UP020
                for chunk in chunks:
                    size += len(chunk)
                    if size > limit:
                        msg = f"the file {shown!r} grew beyond {limit} bytes, which the setting artifact_bytes allows"
                        raise ArtifactRefused("file_too_large", msg)
                    digest.update(chunk)
                    copy.write(chunk)
                copy.flush()
                if self._durable:
                    os.fsync(copy.fileno())
            self._name(draft, Snapshot(digest.hexdigest(), size), hold)
            if self._durable:
                self.sync_names()
        except ArtifactRefused:  # which is an OSError too
            raise
        except OSError as error:
            raise self._no_room(repr(shown), error) from None
        finally:
            self._discard(draft)  # by now it has its final name, unless something went wrong
        return Snapshot(digest.hexdigest(), size)

    def _name(self, draft: Path, kept: Snapshot, hold: Hold) -> None:
        """Give a draft its final name; only a link tells for sure that there was no such copy before.

        One that is there, and whole, stays: a durable event may name it, and what took its place would not be durable.
        """
        place, made = self.path / kept.sha256, os.stat(draft, follow_symlinks=False)
        try:
            os.link(draft, place)
        except OSError as error:  # there is one, or the file system knows no links
            forward(error)
            if not _is_shared(place, kept):
                os.rename(draft, place)
            elif self._durable:
                self.sync(kept.sha256)
        else:
            hold.made(kept.sha256, made)

    def _no_room(self, what: str, error: OSError) -> ArtifactRefused:
        msg = f"no copy of {what} could be made in {self.path}: {error.strerror or error}"
        return ArtifactRefused(NO_ROOM, msg)

    def sync(self, sha256: str) -> None:
        """Make a copy and its name survive a power cut.

        Raises:
            FileNotFoundError: it is not there any more.
            OSError: the disk could not do it.
        """
        self.sync_content(sha256)
        self.sync_names()

    def sync_content(self, sha256: str) -> None:
        """Make a copy survive a power cut, its name aside; see ``sync``."""
        fd = os.open(self.path / sha256, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def sync_names(self) -> None:
        """Make the names of all copies survive a power cut; see ``sync``."""
        sync_directory(self.path)
        sync_directory(self.path.parent)  # where "files" itself is a name

    @staticmethod
    def _discard(draft: Path) -> None:
        with contextlib.suppress(OSError):
            os.unlink(draft)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[bool]:
    """Have a ``files`` directory to oneself, to move what is in it; false while somebody logs a file there.

    The lock of somebody on another machine is not seen on every network file system, but the draft is.

    Args:
        folder: the directory.

    Raises:
        OSError: there is none, or it cannot be opened.
    """
    hold = Hold(folder, descriptors.opened(_opened, folder))
    try:
        yield hold.is_locked(fcntl.LOCK_EX) and not (is_network(folder) and any(map(_is_recent, _drafts(folder))))
    finally:
        hold.let_go()


def _drafts(folder: Path) -> list[Path]:
    return [folder / name for name in os.listdir(folder) if is_draft(name)]


def _is_recent(draft: Path) -> bool:
    try:
        return time.time() - os.stat(draft, follow_symlinks=False).st_mtime < _ABANDONED
    except FileNotFoundError:
        return False


def is_draft(name: str) -> bool:
    """Return whether a file is called like a draft; while ``alone``, it is of a program that died."""
    return name.startswith(_DRAFT)


def _opened(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _read(fd: int, shown: str) -> bytes:
    """Read on in a file that is copied; what its own disk fails at is no trouble of the outbox."""
    try:
        return os.read(fd, _CHUNK)
    except OSError as error:
        forward(error)
        msg = f"the file {shown!r} cannot be read: {error.strerror or error}"
        raise ArtifactRefused("bad_file", msg) from error


def _is_shared(place: Path, kept: Snapshot) -> bool:
    """Return whether there is a copy that holds what it should, which a power cut may have taken.

    If so, a later time tells whoever has made it that somebody else relies on it.
    """
    try:
        fd = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            found, digest = os.fstat(fd), hashlib.sha256()
            if not stat.S_ISREG(found.st_mode) or found.st_size != kept.size:
                return False
            for chunk in iter(lambda: os.read(fd, _CHUNK), b""):
                digest.update(chunk)
            os.utime(fd, ns=(found.st_atime_ns, max(time.time_ns(), found.st_mtime_ns + 1)))
            return digest.hexdigest() == kept.sha256 and os.fstat(fd).st_mtime_ns > found.st_mtime_ns
        finally:
            os.close(fd)
    except OSError as error:
        forward(error)
        return False


def size_of(source: str | os.PathLike[str]) -> int:
    """Return the bytes of a file that is to be copied; 0 when they cannot be told, which the copying then says."""
    try:
        return os.stat(source).st_size
    except (OSError, ValueError):
        return 0


def is_digest(text: str) -> bool:
    """Return whether text is a hex SHA-256, and so safe as the name of a copy."""
    return _SHA256.fullmatch(text) is not None
