"""One machine per outbox on a network file system, where flock excludes nobody on other machines.

``host.lease`` in the outbox says which machine delivers. It is made whole under another name and linked into place,
which is atomic on every network file system that has links (exclusive creation serves those that have none). Its
holder writes the same words into it again every ``beat`` seconds. Who finds it looks at its modification time against
that of a file made just now on the same file system, so that only the file server's clock counts: after ``missed``
beats the holder is dead, its file is moved away, and the content of what was moved is compared, so that of two
successors only one believes that it was first.

A full file system has room for a name, not always for words. Then the file is one hole, and known by its length, drawn
by lot (not by its inode: over SFTP the same file gets a new one with every look): it excludes others as well as any,
and only does not say who it is. What such a file system answers to a write is not always that it is full (over SFTP it
is an input/output error), so any refusal counts.

On one machine the lock of the local state directory decides (``Lease``), as it does for a local outbox. So a file
that names this lock was left by a process of this machine that has died, and is replaced at once.

A holder that was stopped or cut off for longer than its beats allow finds its file gone or changed and lets go. What
it may have sent meanwhile does no harm: runs are found by their tag, and sending something twice changes nothing.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
import time
from pathlib import Path
from typing import Final, NamedTuple, Protocol

import msgspec

from mlflow_outbox import stopwatch
from mlflow_outbox.counters import printable
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox.spool.private import create_private, make_all_private
from mlflow_outbox.spool.writer import boot_id
from mlflow_outbox_worker.lease import Holder, Lease, holder

#: Seconds between two signs of life.
BEAT: Final = 10.0
#: Signs of life that are missed before a holder counts as dead; together a minute, more than attributes are cached for.
MISSED: Final = 6
#: Seconds after which a holder's silence is beyond doubt, for who only looks and makes no file to compare times with.
_SILENT: Final = 2 * BEAT * MISSED
#: Bytes of the longest lease without words: a hole, which takes no room, but counts where a budget is measured.
_LENGTHS: Final = 64 * 1024


class WorkerLease(Protocol):
    """The right to deliver; ``Lease`` and ``HostLease`` are the two kinds."""

    def acquire(self) -> bool:
        """Take it unless another worker has it; return whether it is held now."""
        ...

    def is_held(self) -> bool:
        """Return whether this object holds it."""
        ...

    def is_sound(self) -> bool:
        """Return whether it is still this object's."""
        ...

    def release(self) -> None:
        """Give it back."""
        ...

    def other(self) -> Holder | None:
        """Return who else holds it; None when nobody does, or this object, which may just be taking it."""
        ...


class HostNote(msgspec.Struct, frozen=True):
    """The content of ``host.lease``; ``lock`` is the identity of the holder's local lock file."""

    host: str
    pid: int
    kind: str
    boot_id: str
    lock: str
    token: str


class _Seen(NamedTuple):
    """A lease file as it was found; ``note`` is None when it holds no words, or none that make sense."""

    note: HostNote | None
    length: int
    changed: float

    def is_same(self, other: _Seen | None) -> bool:
        """Return whether two looks found the lease of the same holder."""
        if other is None or self.note != other.note:
            return False
        return self.note is not None or self.length == other.length


class HostLease:
    """The right to deliver one outbox that several machines see.

    Args:
        path: the lease file, in the outbox.
        lock: the local lock file; its directory is made.
        kind: what this worker is: "thread", "process", "command".
        local: the lease of the lock file; None makes one.
        host: this machine's name.
        beat: seconds between two signs of life.
        missed: signs of life after which a silent holder is dead.
    """

    def __init__(
        self,
        path: Path,
        lock: Path,
        kind: str,
        *,
        local: Lease | None = None,
        host: str | None = None,
        beat: float = BEAT,
        missed: int = MISSED,
    ) -> None:
        self._path = path
        self._lock_path = lock
        self._kind = kind
        self._host = socket.gethostname() if host is None else host
        self._beat = beat
        self._dead_after = beat * missed
        self._local = Lease(lock, kind) if local is None else local
        self._mine: _Seen | None = None
        self._last_beat = 0.0
        self._stop = threading.Event()

    def __repr__(self) -> str:
        return f"<HostLease {str(self._path)!r}, {'held' if self.is_held() else 'not held'}>"

    def acquire(self) -> bool:
        """Take the lease unless another worker, here or on another machine, has it; return whether it is held now.

        Raises:
            OSError: the outbox or the local state directory cannot be written.
        """
        if self.is_held():
            return True
        make_all_private(self._lock_path.parent)
        if not self._local.acquire():
            return False
        try:
            taken = self._take()
        except BaseException:  # raised again: what is locked here must not outlast the attempt
            self._local.release()
            raise
        if not taken:
            self._local.release()
        return taken

    def _take(self) -> bool:
        lock = _identity(self._lock_path)
        note = HostNote(self._host, os.getpid(), self._kind, boot_id(), lock, secrets.token_hex(8))
        draft = self._path.with_name(f".{self._path.name}-{note.token}")
        fd = create_private(draft)
        try:
            mine = _written(fd, note)
            if not self._link(draft, mine) and not (
                self._is_left_behind(note, mine.changed) and self._link(draft, mine)
            ):
                return False
        finally:
            os.close(fd)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(draft)
        self._last_beat = stopwatch.seconds()
        self._stop = threading.Event()
        threading.Thread(target=self._beats, args=(self._stop,), name="mlflow-outbox-beat", daemon=True).start()
        return True

    def _link(self, draft: Path, mine: _Seen) -> bool:
        try:
            os.link(draft, self._path)
        except FileExistsError:
            return False
        except OSError:  # a file system without links: exclusive creation, whose content comes a moment later
            try:
                fd = create_private(self._path)
            except FileExistsError:
                return False
            try:
                mine = _written(fd, mine.note)
            finally:
                os.close(fd)
        self._mine = mine
        return True

    def _is_left_behind(self, note: HostNote, now: float) -> bool:
        """Return whether the holder was dead, and its file has been moved away by us."""
        held = _look(self._path)
        if held is None:
            return True  # given back meanwhile
        left = held.note
        here = left is not None and (left.boot_id, left.lock) == (note.boot_id, note.lock) and note.boot_id != ""
        if not here and now - held.changed <= self._dead_after:
            return False
        aside = self._path.with_name(f".{self._path.name}-left-{note.token}")
        try:
            os.rename(self._path, aside)
        except FileNotFoundError:
            return True
        dead = held.is_same(_look(aside))
        if not dead:  # another successor was faster, and this is its file: give it back
            with contextlib.suppress(OSError):
                os.link(aside, self._path)
        os.unlink(aside)
        return dead

    def _beats(self, stop: threading.Event) -> None:
        while not stop.wait(self._beat):
            try:
                if not self._beaten():
                    return
                self._last_beat = stopwatch.seconds()
            except OSError:
                continue  # the file server is away; ``is_sound`` counts what was missed

    def _beaten(self) -> bool:
        """Give a sign of life; return False when the file is not this object's any more."""
        mine = self._mine
        fd = os.open(self._path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if mine is None or not mine.is_same(_seen(fd)):
                return False
            try:
                # A write has the file server's time; asked to set the time, some file systems set this machine's.
                os.pwrite(fd, _words(mine.note), 0)
                os.fsync(fd)
            except OSError:
                os.utime(fd)  # no room even to write the same again
            else:
                if mine.note is None:
                    os.utime(fd)
        finally:
            os.close(fd)
        return True

    def is_held(self) -> bool:
        """Return whether this object holds the lease."""
        return self._mine is not None and self._local.is_held()

    def is_sound(self) -> bool:
        """Return whether no other machine can have taken the lease."""
        if not self.is_held() or not self._local.is_sound():
            return False
        if stopwatch.seconds() - self._last_beat > self._dead_after:
            return False
        return self._mine is not None and self._mine.is_same(_look(self._path))

    def release(self) -> None:
        """Give the lease back."""
        mine, self._mine = self._mine, None
        self._stop.set()
        if mine is not None and self._local.is_held():  # a forked child has let go of the lock, and owns nothing
            with contextlib.suppress(OSError):
                if mine.is_same(_look(self._path)):
                    os.unlink(self._path)
        self._local.release()

    def other(self) -> Holder | None:
        """Return who else holds the lease, here or on another machine; None when nobody does, or this object."""
        if self.is_held():
            return None
        # While this object takes it, which it does with the local lock first, its own file is not another's.
        return self._local.other() or (None if self._local.is_held() else _other(self._path, self._lock_path))


def lease_of(directory: OutboxDirectory, kind: str, *, inherited: int = -1) -> WorkerLease:
    """Return the lease of an outbox: of the kind that its file system needs.

    Args:
        directory: the outbox.
        kind: what the worker is: "thread", "process", "command".
        inherited: a descriptor of the local lock file that is locked already; -1 when there is none.
    """
    local = Lease(directory.lock, kind, inherited=inherited)
    return HostLease(directory.host_lease, directory.lock, kind, local=local) if directory.network else local


def worker_of(directory: OutboxDirectory) -> Holder | None:
    """Return who delivers an outbox at present, on this machine or another; None when nobody does."""
    return holder(directory.lock) or (_other(directory.host_lease, directory.lock) if directory.network else None)


def delivers_elsewhere(directory: OutboxDirectory) -> bool:
    """Return whether another machine has the lease, or a container with a state of its own, and so the ledger too."""
    seen = _look(directory.host_lease) if directory.network else None
    return seen is not None and seen.note is not None and not _is_here(seen.note, directory.lock)


def is_elsewhere(found: Holder) -> bool:
    """Return whether whoever holds a lease is on another machine, so that its ledger is there too."""
    return found.host not in {"", socket.gethostname()}


def described(found: Holder) -> str:
    """Return who holds a lease, in words."""
    if not found.host:
        return "a worker that could not write its name down"
    where = "this machine" if found.host == socket.gethostname() else f"the machine {printable(found.host)}"
    return f"a worker ({printable(found.kind)}, process {found.pid}) on {where}"


def _words(note: HostNote | None) -> bytes:
    return b"" if note is None else msgspec.json.encode(note)


def _written(fd: int, note: HostNote | None) -> _Seen:
    """Write a note into a new file, or make that a hole where there is no room; return what it is then."""
    try:
        os.pwrite(fd, _words(note), 0)
        os.fsync(fd)
    except OSError:
        note = None
        with contextlib.suppress(OSError):
            os.ftruncate(fd, 0)
            os.ftruncate(fd, 1 + secrets.randbelow(_LENGTHS))
    found = os.fstat(fd)
    return _Seen(note, found.st_size, found.st_mtime)


def _look(path: Path) -> _Seen | None:
    """Return a lease file's content and time; opening it makes a network file system fetch both anew."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return _seen(fd)
    finally:
        os.close(fd)


def _seen(fd: int) -> _Seen:
    found = os.fstat(fd)
    try:
        note = msgspec.json.decode(os.pread(fd, 4096, 0), type=HostNote)
    except (OSError, ValueError, RecursionError):  # no JSON, no UTF-8, nested too deeply
        note = None
    return _Seen(note, found.st_size, found.st_mtime)


def _identity(lock: Path) -> str:
    found = os.stat(lock)
    return f"{found.st_dev}:{found.st_ino}"


#: By lease file: what the last look found, and when by this process's clock one found that first.
_heard: dict[Path, tuple[_Seen, float]] = {}


def _other(path: Path, lock: Path) -> Holder | None:
    """Return who holds a lease on another machine, or in a container of this one, with a local lock of its own."""
    seen = _look(path)
    if seen is None:
        _heard.pop(path, None)
        return None
    # This machine's clock and the file server's may differ by hours, so that a dead holder's file is young all day, or
    # in the future: then only this tells that nothing happens to it.
    now = stopwatch.seconds()
    before, since = _heard.get(path, (seen, now))
    since = since if before == seen else now
    _heard[path] = seen, since
    if time.time() - seen.changed > _SILENT or now - since > _SILENT:
        return None
    if seen.note is None:
        return Holder("", 0, "")
    if _is_here(seen.note, lock):
        return holder(lock)  # where the lock tells whether its process lives
    return Holder(seen.note.host, seen.note.pid, seen.note.kind)


def _is_here(note: HostNote, lock: Path) -> bool:
    """Return whether a lease belongs to whoever has, or had, this local lock."""
    try:
        return note.boot_id == boot_id() != "" and note.lock == _identity(lock)
    except OSError:  # nobody has taken it yet
        return False
