"""Reading a bundle into an outbox.

Everything is unpacked beside the outbox's runs and compared with the manifest before any of it is used; a name, a
size, a type or a digest that is not as it must be refuses the whole bundle. Then a run that is new is renamed into
place as a whole. A run that is there already gets what it lacks: files first, then segments in their order, each by
one rename, so that whenever a reader looks it finds a state that the run once had, and the same import again does the
rest. A segment is replaced by a longer one only when it is the beginning of that; segments that contradict each other
refuse the bundle.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final, Literal

from mlflow_outbox import stopwatch
from mlflow_outbox.counters import printable
from mlflow_outbox.destination import Destination
from mlflow_outbox.errors import OutOfTime
from mlflow_outbox.settings import state_directory
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox.spool.filesystem import is_network
from mlflow_outbox.spool.private import create_private, make_all_private, sync_directory
from mlflow_outbox.spool.reader import RunReader
from mlflow_outbox.spool.snapshot import SnapshotStore
from mlflow_outbox_worker.bundle import (
    BundledRun,
    Manifest,
    Member,
    archive_of,
    draft_of,
    is_plain,
    manifest_of,
    opened,
    pieces,
    read_manifest,
    refuse,
    remove_drafts,
    sealed,
)

_CHUNK: Final = 1024 * 1024
_STAGING: Final = "import"
_FILES: Final = "files/"
#: What is named after a machine, and the seconds after which one is not expected back that has unpacked nothing.
_OF_A_MACHINE: Final = re.compile(r"[0-9a-f]{12}")
_GONE: Final = 30 * 24 * 3600.0

#: What an import did with a run: it is new, it got something it lacked, or it had everything.
Imported = Literal["new", "completed", "unchanged"]


def import_bundle(
    path: Path, directory: OutboxDirectory, *, deadline: float | None = None, passing: bool = False
) -> dict[str, Imported]:
    """Put the runs of a bundle into an outbox, after all of it has been checked.

    Args:
        path: the bundle.
        directory: the outbox.
        deadline: when to leave off, in seconds of the monotonic clock; None never does.
        passing: the outbox need not survive a power cut.

    Raises:
        BundleRefused: it is damaged, or contradicts what the outbox holds; nothing of it was used.
        OutOfTime: the deadline came first; nothing of it was used.
        OSError: it cannot be read, or there is no room for it.
    """
    with _turn(directory):
        return _imported(path, directory, deadline, passing=passing)


def _imported(path: Path, directory: OutboxDirectory, deadline: float | None, *, passing: bool) -> dict[str, Imported]:
    with _alone(directory):
        remove_drafts(directory.path / _STAGING, "directory")
        staging = draft_of(directory.path / _STAGING)
        os.mkdir(staging, 0o700)
        lock = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        if not directory.network:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # says that the directory is no leftover
    try:
        manifest = _unpack(path, staging, deadline, sync=not passing)
        with _alone(directory):
            plans = {run.run_id: _lacking(run, staging, directory) for run in manifest.runs}
            result = {run.run_id: _publish(run, plans[run.run_id], staging, directory) for run in manifest.runs}
            sync_directory(directory.runs)
        for run_id in result:
            with contextlib.suppress(OSError):  # a worker finds it at its next look around
                directory.ring(run_id)
        return result
    finally:
        os.close(lock)
        shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def _turn(directory: OutboxDirectory) -> Iterator[None]:
    """Have imports of this machine into an outbox on a network file system take turns, by a lock that is elsewhere.

    There nothing says which of the directories to unpack into is a leftover, nor keeps one from what another adds.
    """
    if not directory.network:
        yield
        return
    lock = directory.lock.with_name("import.lock")
    make_all_private(lock.parent)
    fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def _alone(directory: OutboxDirectory) -> Iterator[None]:
    """Keep other imports into an outbox waiting, where locks can be relied on: one may add to what another looks at."""
    fd = os.open(directory.runs, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if not directory.network:
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _unpack(path: Path, staging: Path, deadline: float | None, *, sync: bool) -> Manifest:
    with archive_of(path) as archive:
        manifest = manifest_of(archive, path)
        wanted = {f"runs/{run.run_id}/{member.name}": member for run in manifest.runs for member in run.members}
        needed = sum(member.size for member in wanted.values())
        free = shutil.disk_usage(staging).free
        if needed > free:
            raise OSError(errno.ENOSPC, f"the bundle needs {needed:,} bytes, {free:,} are free", str(staging))
        for run in manifest.runs:
            os.makedirs(staging / run.run_id / "files", 0o700)
        while (info := archive.next()) is not None:
            member = wanted.pop(info.name, None)
            if member is None:
                refuse(path, f"holds {printable(info.name, 200)!r}, which its manifest does not name, or twice")
            if not is_plain(info) or info.size != member.size:
                refuse(path, f"holds {printable(info.name, 200)!r} in another form or size than its manifest says")
            content = archive.extractfile(info)
            if content is None:
                refuse(path, f"holds no content of {printable(info.name, 200)!r}")
            _write(staging / info.name.removeprefix("runs/"), content, member, path, deadline, sync=sync)
    if wanted:
        refuse(
            path, f"lacks {len(wanted)} of its files, {printable(next(iter(wanted)), 200)!r} for one; it was cut off"
        )
    for folder, _, _ in os.walk(staging) if sync else ():
        sync_directory(Path(folder))
    return manifest


def _write(
    target: Path, content: IO[bytes], member: Member, bundle: Path, deadline: float | None, *, sync: bool
) -> None:
    digest = hashlib.sha256()
    with os.fdopen(create_private(target), "wb") as copy:
        for chunk in iter(lambda: content.read(_CHUNK), b""):
            if deadline is not None and stopwatch.seconds() >= deadline:
                msg = f"time was up before {bundle} was unpacked; nothing of it was sent, give it a longer --timeout"
                raise OutOfTime(msg)
            digest.update(chunk)
            copy.write(chunk)
        copy.flush()
        if digest.hexdigest() != member.sha256:
            refuse(bundle, f"holds {printable(member.name, 200)!r} with another content than its manifest says")
        stamp = member.modified_ms * 1_000_000
        os.utime(copy.fileno(), ns=(stamp, stamp))  # its age says whether its writer may still live
        if sync:
            os.fsync(copy.fileno())


def _lacking(run: BundledRun, staging: Path, directory: OutboxDirectory) -> list[str] | None:
    """Return the files that the outbox lacks of a run, in the order to add them in; None when it has none of it."""
    places = (directory.run(run.run_id), directory.delivered / run.run_id)
    found = {segment.header.run_id for held in RunReader(staging / run.run_id).segments().values() for segment in held}
    if found - {run.run_id}:
        refuse(staging, f"holds segments of another run in the place of {run.run_id}")
    if not any(place.is_dir() for place in places):
        return None
    files: list[str] = []
    segments: list[str] = []
    for member in run.members:
        held = next((place / member.name for place in places if os.path.lexists(place / member.name)), None)
        if member.name.startswith(_FILES):
            files += [member.name] if held is None else []
        elif held is None or _is_beginning(held, staging / run.run_id / member.name):
            segments.append(member.name)
    order = {
        segment.path.name: (segment.header.writer, segment.header.ordinal)
        for written in RunReader(staging / run.run_id).segments().values()
        for segment in written
    }
    return files + sorted(segments, key=lambda name: order.get(name, ("", 0)))


def _is_beginning(held: Path, new: Path) -> bool:
    """Return whether a new segment is longer than the held one, which it must agree with as far as both go."""
    with opened(held) as ours, opened(new) as theirs:
        size_held, size_new = os.fstat(ours.fileno()).st_size, os.fstat(theirs.fileno()).st_size
        common = min(size_held, size_new)
        for mine, other in zip(pieces(ours, common), pieces(theirs, common), strict=True):
            if mine != other:
                refuse(new, f"contradicts {held}: both were written on, or one is damaged")
    return size_new > size_held


def _publish(run: BundledRun, lacking: list[str] | None, staging: Path, directory: OutboxDirectory) -> Imported:
    source, target = staging / run.run_id, directory.run(run.run_id)
    if lacking is None:
        os.rename(source, target)
        return "new"
    if not lacking:
        return "unchanged"
    with SnapshotStore(target).held():  # a worker must not take a file for delivered before the segment is there
        if any(not name.startswith(_FILES) for name in lacking):
            # Also those that are filed, which give way: a segment that comes may name them.
            files = (member.name for member in run.members if member.name.startswith(_FILES))
            lacking = [*(name for name in files if not os.path.lexists(target / name)), *lacking]
        for name in dict.fromkeys(lacking):
            os.rename(source / name, target / name)
        sync_directory(target / "files")
        sync_directory(target)
    return "completed"


@contextlib.contextmanager
def unpacked(path: Path, deadline: float | None = None) -> Iterator[Path]:
    """Unpack a bundle into an outbox of its own in the local state directory, for as long as it is used.

    Args:
        path: the bundle.
        deadline: when to leave off, in seconds of the monotonic clock; None never does.

    Raises:
        BundleRefused: it is damaged.
        OutOfTime: the deadline came first.
        OSError: it cannot be read, or there is no room for it.
    """
    manifest = read_manifest(path)
    parent = state_directory() / "bundles"
    if is_network(parent):  # a home that machines share: the lock below is this one's alone, so each has its own place
        name = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:12]
        _remove_those_of_machines_that_are_gone(parent, besides=name)
        parent /= name
    make_all_private(parent)
    remove_drafts(parent / "bundle", "directory")
    place = draft_of(parent / "bundle")
    os.mkdir(place, 0o700)
    lock = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # says that the directory is no leftover
        destination = Destination(manifest.destination, manifest.artifact_root)
        # Not one of its own: what was done to an experiment is known at the destination by the outbox that it is from.
        outbox_id = manifest.outbox or hashlib.sha256(sealed(manifest)).hexdigest()[:32]
        directory = OutboxDirectory.create(place, destination, now_ms=manifest.made_ms, outbox_id=outbox_id)
        import_bundle(path, directory, deadline=deadline, passing=True)
        yield directory.path
    finally:
        os.close(lock)
        shutil.rmtree(place, ignore_errors=True)


def _remove_those_of_machines_that_are_gone(parent: Path, besides: str) -> None:
    """Remove what replays that were killed have left under a name that may never come back, such as a container's."""
    with contextlib.suppress(OSError), os.scandir(parent) as entries:
        for entry in entries:
            if not _OF_A_MACHINE.fullmatch(entry.name) or entry.name == besides:
                continue
            with contextlib.suppress(OSError):  # its time is that of the last replay's beginning or end there
                if entry.stat(follow_symlinks=False).st_mtime < time.time() - _GONE:
                    shutil.rmtree(entry.path, ignore_errors=True)  # a link is left alone
