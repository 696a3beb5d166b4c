"""The outbox directory: its layout, how it is made, and the checks before it is trusted.

Layout::

    <outbox>/             0700, owned by the user
      outbox.json         format, id, destination without credentials, artifact root, creation time
      runs/<run_id>/      segments (*.log) and files/<sha256>, until the run is delivered
      delivered/<run_id>/ the same, until the retention time is over; what is being deleted is called .gone-<random>
      refused/            what programs refused, counts by reason; only when they did
      quarantine/         bytes that were no intact frames, as they were found
      delivery/           the ledger (diskcache), and a reserve for when the disk is full
      worker.lock         flock: held by the one worker that delivers
      doorbell            a line with the run's id for each segment that a writer opened
      size                bytes of all this, as the last process that measured it found; only when that takes long
      hurry               its modification time changes when somebody wants delivery at once
      wanted              bytes of a file that found no room, for which what is delivered is to give way
      budget              what a program allows that refuses events: the worker keeps to that too

On a network file system the ledger and the lock lie in the local state directory instead, and ``host.lease`` says
which machine delivers (see ``mlflow_outbox_worker.host_lease``).

The directory is a trust boundary: whoever may write to it decides what is sent under the user's name. So it is
refused when it belongs to somebody else, when group or others may enter it, or when it or a part of it is a link; and
``outbox.json`` alone says where events go, never a segment (rows F90 and F92 of the fault list).
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
from pathlib import Path
from typing import Final

import msgspec

from mlflow_outbox.counters import printable
from mlflow_outbox.destination import Destination
from mlflow_outbox.errors import OutboxMismatch, OutboxUnusable
from mlflow_outbox.interrupts import forward
from mlflow_outbox.settings import state_directory
from mlflow_outbox.spool import reserve
from mlflow_outbox.spool.filesystem import is_network
from mlflow_outbox.spool.private import (
    check_parent,
    check_parts,
    check_private,
    create_private,
    make_private,
    read_regular,
    remove_drafts,
    write_once,
)

FORMAT: Final = 1
#: Run ids: what MLflow itself accepts (mlflow/utils/validation.py), and safe as a directory name.
_RUN_ID: Final = re.compile(r"[a-zA-Z0-9][\w\-]{0,255}", re.ASCII)
_IDENTITY: Final = "outbox.json"
#: What is an outbox's own, and no way to another place: somebody else may have packed or copied it. The ledger looks at
#: its files itself.
_PARTS: Final = (
    *("runs", "delivered", "refused", "quarantine"),
    *("worker.lock", "host.lease", "doorbell", "size", "hurry", "wanted", "budget"),
)
#: What a disk or a network file system may answer once and not again, and the seconds after which it is asked again:
#: a whole training would go untracked for it.
_PASSING: Final = {errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT, errno.ENFILE, errno.EMFILE}
_ASKED_AGAIN: Final = (0.02, 0.2)
#: Bytes after which the doorbell is emptied; some thousand lines.
_DOORBELL_BYTES: Final = 256 * 1024


class OutboxIdentity(msgspec.Struct, frozen=True):
    """The content of ``outbox.json``."""

    format: int
    id: str
    destination: str
    created_ms: int
    artifact_root: str = ""


class OutboxDirectory:
    """One outbox: one directory, one destination."""

    def __init__(self, path: Path, identity: OutboxIdentity, inode: tuple[int, int]) -> None:
        self.path = path
        self.identity = identity
        self._inode = inode
        self.runs = path / "runs"
        self.delivered = path / "delivered"
        self.quarantine = path / "quarantine"
        #: Other machines may see this directory too, and neither locks nor SQLite can be relied on in it.
        self.network = is_network(path)
        own = state_directory() / self.destination.slug / identity.id if self.network else path
        self.ledger = own / "delivery"
        self.lock = own / "worker.lock"
        self.host_lease = path / "host.lease"
        self._doorbell = path / "doorbell"
        self._hurry = path / "hurry"

    def __repr__(self) -> str:
        return f"<OutboxDirectory {str(self.path)!r} to {self.identity.destination!r}>"

    @property
    def destination(self) -> Destination:
        """Where this outbox delivers to, without credentials."""
        return Destination(self.identity.destination, self.identity.artifact_root)

    @property
    def place(self) -> tuple[str, int, int, str]:
        """What tells it from another one at the same path: somebody may have removed it and made it anew."""
        return (str(self.path), *self._inode, self.identity.id)

    @classmethod
    def create(cls, root: Path, destination: Destination, *, now_ms: int, outbox_id: str = "") -> OutboxDirectory:
        """Open the outbox of a destination under root, and make it when there is none.

        Args:
            root: directory that holds outboxes, one per destination; or an existing outbox itself.
            destination: where it delivers to.
            now_ms: wall-clock milliseconds since the epoch, kept as its creation time.
            outbox_id: the id of one that is made; "" gives it one that no other has.

        Raises:
            OutboxUnusable: it cannot be made, or is not safe to use.
            OutboxMismatch: the directory holds an outbox of another destination or a newer format.
        """
        for seconds in _ASKED_AGAIN:
            try:
                return cls._create(root, destination, now_ms, outbox_id)
            except OutboxUnusable as error:
                if getattr(error.__cause__, "errno", None) not in _PASSING:
                    raise
            time.sleep(seconds)
        return cls._create(root, destination, now_ms, outbox_id)

    @classmethod
    def _create(cls, root: Path, destination: Destination, now_ms: int, outbox_id: str) -> OutboxDirectory:
        root = _absolute(root)
        path = root if os.path.lexists(root / _IDENTITY) else root / destination.slug
        try:
            make_private(root)
            check_parent(root)
            if path != root:
                make_private(path)
            check_private(path)
            for part in ("runs", "delivered"):
                make_private(path / part)
                check_private(path / part)
            if not os.path.lexists(path / _IDENTITY):
                outbox_id = outbox_id or os.urandom(16).hex()
                identity = OutboxIdentity(FORMAT, outbox_id, destination.uri, now_ms, destination.artifact_root)
                write_once(path / _IDENTITY, msgspec.json.format(msgspec.json.encode(identity)))
                if not is_network(path):
                    reserve.make(path / "delivery")
            else:
                remove_drafts(path / _IDENTITY)
        except OutboxUnusable:
            raise
        except OSError as error:
            msg = f"the outbox directory {path} cannot be made: {error.strerror or error}"
            raise OutboxUnusable(msg) from error
        outbox = cls.open(path)
        if outbox.identity.destination != destination.uri:
            msg = (
                f"{path} is the outbox of {outbox.identity.destination}, not of {destination.uri}; "
                "give another directory"
            )
            raise OutboxMismatch(msg)
        return outbox

    @classmethod
    def open(cls, path: Path) -> OutboxDirectory:
        """Open an existing outbox.

        Raises:
            OutboxUnusable: it is missing, unreadable, or not safe to use.
            OutboxMismatch: a newer version made it.
        """
        path = _absolute(path)
        try:
            found = check_private(path)
        except OutboxUnusable:
            raise
        except OSError as error:
            msg = f"{path} is not a usable outbox: {error.strerror or error}"
            raise OutboxUnusable(msg) from error
        return cls(path, read_identity(path), (found.st_dev, found.st_ino))

    def run(self, run_id: str) -> Path:
        """Return the directory of a run whose id was checked with ``is_run_id``."""
        return self.runs / run_id

    def ledger_in(self, place: Path | None) -> Path:
        """Return where the ledger is.

        Args:
            place: directory for ledgers, in which each outbox has one of its own; None is where the file system allows.
        """
        return self.ledger if place is None else place / self.identity.id

    def run_ids(self) -> list[str]:
        """Return the ids of all runs that have something on disk that is not filed as delivered."""
        return run_directories(self.runs)

    def segments(self, run_id: str) -> list[Path]:
        """Return the segments of a run that are not filed, in any order; none of one that is filed at this moment."""
        folder = self.run(run_id)
        try:  # where pathlib's glob would look whether it is there, and raise if it no longer is
            return [folder / name for name in os.listdir(folder) if name.endswith(".log")]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def delivered_ids(self) -> list[str]:
        """Return the ids of all runs that are delivered and kept for the retention time."""
        return run_directories(self.delivered)

    def look_anew(self) -> None:
        """Have a network file system show the runs that other machines have made since it was last asked.

        It may show a directory as it was up to a minute ago. A name that comes and goes in it makes it ask its server;
        where nothing can be written it is left at that.
        """
        if self.network:
            path = self.runs / f".look-{os.urandom(4).hex()}"
            with contextlib.suppress(OSError):
                os.close(create_private(path))
                os.unlink(path)

    def make_run(self, run_id: str) -> Path:
        """Make a run's directory.

        Raises:
            OSError: it cannot be made, or the outbox was replaced by another directory since it was opened.
        """
        self.check_unchanged()
        path = self.runs / run_id
        make_private(path)
        return path

    def check_unchanged(self) -> None:
        """Check that the path still leads to the directory that was checked.

        Raises:
            OutboxUnusable: it was removed, or replaced by another directory.
        """
        try:
            found = os.stat(self.path, follow_symlinks=False)
        except OSError as error:
            forward(error)
            msg = f"the outbox directory {self.path} is gone: {error.strerror}"
            raise OutboxUnusable(msg) from None
        if (found.st_dev, found.st_ino) != self._inode:
            msg = f"the outbox directory {self.path} was replaced by another one while in use"
            raise OutboxUnusable(msg)

    def ring(self, run_id: str) -> None:
        """Tell a worker that a run has a new segment to look at.

        Raises:
            OSError: the doorbell cannot be written.
        """
        fd = os.open(self._doorbell, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, f"{run_id}\n".encode())
        finally:
            os.close(fd)

    def rung(self, offset: int) -> tuple[set[str], int] | None:
        """Return the runs that rang since an offset, and the next offset; None when only a look at all runs will tell.

        Args:
            offset: what the last call returned; 0 at first.
        """
        try:
            size = os.stat(self._doorbell, follow_symlinks=False).st_size
            if size == offset:
                return set(), offset
            if size < offset:
                return None
            fd = os.open(self._doorbell, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return set(), 0
        try:
            lines = os.pread(fd, _DOORBELL_BYTES * 2, offset).split(b"\n")
        finally:
            os.close(fd)
        ids = {line.decode("ascii", "replace") for line in lines[:-1]}
        found = {run_id for run_id in ids if is_run_id(run_id) and not os.path.islink(self.runs / run_id)}
        return found, offset + sum(len(line) + 1 for line in lines[:-1])

    def answer_doorbell(self) -> None:
        """Begin the doorbell anew when it has grown long; the caller looks at all runs afterwards."""
        try:
            if os.stat(self._doorbell, follow_symlinks=False).st_size > _DOORBELL_BYTES:
                os.truncate(self._doorbell, 0)
        except OSError:
            return

    def ask_hurry(self) -> None:
        """Ask whichever worker delivers this outbox to do so at once, cutting its back-off short."""
        _touch(self._hurry)

    def hurry_asked(self) -> int:
        """Return when hurry was last asked for, in ns, only good for comparing; 0 when never."""
        return _modified(self._hurry)


def read_identity(path: Path) -> OutboxIdentity:
    """Return what an outbox is, also one that is not safe to deliver from: somebody else's, or on read-only media.

    Raises:
        OutboxUnusable: it has no ``outbox.json`` that can be read, or a part of it is a link.
        OutboxMismatch: a newer version made it.
    """
    try:
        check_parts(path, _PARTS)
        identity = msgspec.json.decode(read_regular(path / _IDENTITY), type=OutboxIdentity)
    except OutboxUnusable:
        raise
    except OSError as error:
        msg = f"{path} is not a usable outbox: {error.strerror or error}"
        raise OutboxUnusable(msg) from error
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, nested too deeply
        msg = f"{path / _IDENTITY} is damaged ({error}); restore it from a copy, or write the destination into it again"
        raise OutboxUnusable(msg) from error
    if identity.format > FORMAT:
        msg = f"{path} has format {identity.format} and this version reads up to {FORMAT}; upgrade mlflow-outbox"
        raise OutboxMismatch(msg)
    if not is_run_id(identity.id):
        msg = f"{path / _IDENTITY} names no id of an outbox; restore it from a copy"
        raise OutboxUnusable(msg)
    return identity


def is_run_id(text: str) -> bool:
    """Return whether text can be a run id: what MLflow accepts as one, and safe as a directory name."""
    return isinstance(text, str) and _RUN_ID.fullmatch(text) is not None


def is_outbox(path: str) -> bool:
    """Return whether a directory looks like an outbox, as a directory that is logged may hold: nothing to send."""
    return os.path.lexists(os.path.join(path, _IDENTITY)) and os.path.isdir(os.path.join(path, "runs"))


def _absolute(path: Path) -> Path:
    try:
        found = Path(os.path.abspath(path.expanduser()))
    except (RuntimeError, ValueError) as error:  # the home of an unknown user; a NUL character
        msg = f"{printable(path)!r} cannot be an outbox directory: {error}"
        raise OutboxUnusable(msg) from None
    except OSError as error:
        msg = (
            f"{printable(path)!r} depends on the current directory, which is gone ({error.strerror}); give a whole path"
        )
        raise OutboxUnusable(msg) from None
    try:
        os.lstat(found)
    except ValueError as error:  # a NUL character
        msg = f"{printable(path)!r} cannot be an outbox directory: {error}"
        raise OutboxUnusable(msg) from None
    except OSError:
        pass  # whatever it is, it is said when the directory is used
    return found


def find_outboxes(root: Path) -> list[Path]:
    """Return the outboxes at or directly under a directory, sorted by name.

    Raises:
        OutboxUnusable: the path can be no directory's.
    """
    root = _absolute(root)
    if os.path.lexists(root / _IDENTITY):
        return [root]
    try:
        with os.scandir(root) as entries:
            return sorted(Path(e.path) for e in entries if os.path.lexists(os.path.join(e.path, _IDENTITY)))
    except OSError:
        return []


def run_directories(parent: Path) -> list[str]:
    """Return the names of the directories in ``runs`` or ``delivered`` that can be a run's, sorted."""
    try:
        with os.scandir(parent) as entries:
            return sorted(e.name for e in entries if is_run_id(e.name) and e.is_dir(follow_symlinks=False))
    except FileNotFoundError:
        return []


def _touch(path: Path) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        now = (
            time.time_ns()
        )  # exact, where the file system's own clock has ticks of milliseconds that can hide a change
        os.utime(fd, ns=(now, now))
    finally:
        os.close(fd)


def _modified(path: Path) -> int:
    try:
        return os.stat(path, follow_symlinks=False).st_mtime_ns
    except OSError:
        return 0
