"""Writing a bundle.

A segment that is still being written goes in up to its last whole frame: segments are looked at before files, and a
file is there before the event that names it, so what goes in is a state that the run once had. The bundle is written
under another name, synced, and renamed. It begins with what is in it: when a run is reclaimed in the middle of it, for
want of the very room that the bundle takes, say, it is begun anew without that.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import os
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Final, Literal

from mlflow_outbox.destination import Destination
from mlflow_outbox.spool.listing import SegmentFile
from mlflow_outbox.spool.private import create_private, sync_directory
from mlflow_outbox.spool.reader import RunReader
from mlflow_outbox.spool.recovery import Cut, frames
from mlflow_outbox.spool.snapshot import is_digest
from mlflow_outbox.spool.writer import is_closed, is_gone
from mlflow_outbox_worker.bundle import (
    FORMAT,
    MANIFEST,
    BundledRun,
    BundleRefused,
    Manifest,
    Member,
    draft_of,
    listed,
    opened,
    pieces,
    remove_drafts,
    sealed,
)

_CHUNK: Final = 1024 * 1024
#: Seconds without a change after which a writer on another machine counts as gone.
_SETTLE: Final = 60.0
#: Looks at a run whose files are moved meanwhile, before that is an error.
_TRIES: Final = 10


class _Lost(Exception):
    """Raised when the disk does not give a file any more that has been looked at."""

    def __init__(self, run_id: str, error: OSError) -> None:
        super().__init__(str(error))
        self.run_id = run_id
        self.error = error


def write_bundle(
    target: Path,
    runs: Mapping[str, tuple[Path, ...]],
    destination: Destination,
    *,
    now_ms: int,
    outbox: str = "",
    replace: bool = False,
    unread: Callable[[str, OSError], object] | None = None,
) -> Manifest:
    """Write runs into a bundle.

    Args:
        target: the bundle; gzipped when its name ends with ``.gz`` or ``.tgz``.
        runs: the directories of each run, by run id; only read.
        destination: where the runs are to be delivered to.
        now_ms: wall-clock milliseconds since the epoch, kept in the manifest.
        outbox: id of the outbox that the runs are of, kept in the manifest.
        replace: replace a file that is there already.
        unread: told of each run that the disk does not give, which is left out as a whole: a part of it would look like
            all that there is. None raises.

    Returns:
        what the bundle holds. A run that is not on disk any more is not in it; with no run there is none.

    Raises:
        BundleRefused: a file changed in a way in which no file of a run changes.
        OSError: a file cannot be read, or the bundle cannot be written, for instance because there is one.
    """
    target = Path(os.path.abspath(target))
    if os.path.lexists(target) and not replace:
        raise FileExistsError(errno.EEXIST, "there is such a file already", str(target))
    remove_drafts(target, "file")
    places: dict[str, Path] = {}
    bundled: list[BundledRun] = []
    for run_id, folders in sorted(runs.items()):
        try:
            bundled.append(_bundled(run_id, folders, places))
        except OSError as error:
            if unread is None:
                raise
            unread(run_id, error)
    held = [run for run in bundled if any(member.name.endswith(".log") for member in run.members)]
    while True:
        manifest = Manifest(FORMAT, now_ms, destination.uri, held, destination.artifact_root, outbox)
        try:
            if held:
                _write(target, manifest, runs, places)
        except _Lost as lost:
            if unread is None:
                raise lost.error from None
            if not isinstance(lost.error, FileNotFoundError):
                unread(lost.run_id, lost.error)
            held = [run for run in held if run.run_id != lost.run_id]
        else:
            return manifest


def _write(target: Path, manifest: Manifest, runs: Mapping[str, tuple[Path, ...]], places: Mapping[str, Path]) -> None:
    draft = draft_of(target)
    try:
        with os.fdopen(create_private(draft, os.O_RDWR), "w+b") as file:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # says that the draft is no leftover
            mode: Literal["w:gz", "w"] = "w:gz" if target.name.endswith((".gz", ".tgz")) else "w"
            with tarfile.open(fileobj=file, mode=mode, format=tarfile.PAX_FORMAT) as archive:
                _add(archive, MANIFEST, sealed(manifest), manifest.made_ms)
                for run in manifest.runs:
                    for member in run.members:
                        seen = places[f"{run.run_id}/{member.name}"]
                        moved = (folder / member.name for folder in runs[run.run_id])
                        _add_file(archive, run.run_id, member, [seen, *moved])
            file.flush()
            os.fsync(file.fileno())
            os.rename(draft, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(draft)
    sync_directory(target.parent)


def _bundled(run_id: str, folders: tuple[Path, ...], places: dict[str, Path]) -> BundledRun:
    for _ in range(_TRIES):
        with contextlib.suppress(FileNotFoundError):  # a worker files the run, or reclaims it: it is looked at anew
            return _looked_at(run_id, folders, places)
    return _looked_at(run_id, folders, places)


def _looked_at(run_id: str, folders: tuple[Path, ...], places: dict[str, Path]) -> BundledRun:
    reader = RunReader(*folders)
    members: dict[str, Member] = {}
    experiment = ""
    for held in reader.complete_segments().values():
        for segment in held:
            experiment = experiment or segment.header.experiment
            size = _whole_frames(segment, is_last=segment is held[-1])
            members[segment.path.name] = _member(segment.path, segment.path.name, size)
            places[f"{run_id}/{segment.path.name}"] = segment.path
    for folder in reader.paths:
        for digest in listed(folder / "files"):
            name = f"files/{digest}"
            if is_digest(digest) and name not in members:
                path = folder / "files" / digest
                members[name] = _member(path, name, os.stat(path, follow_symlinks=False).st_size)
                places[f"{run_id}/{name}"] = path
    return BundledRun(run_id, experiment, list(members.values()))


def _whole_frames(segment: SegmentFile, *, is_last: bool) -> int:
    """Return how many bytes of a segment can be taken: all, unless it is being written."""
    size = os.stat(segment.path).st_size
    if not is_last or is_closed(segment.path, segment.header) or is_gone(segment.path, segment.header, _SETTLE):
        return size
    with open(segment.path, "rb") as file:
        data = file.read(size)
    end = segment.body
    for found in frames(data, segment.body, segment.header.seed, next_seq=segment.header.first_seq, final=False):
        if not isinstance(found, Cut):
            end = found.end
    return end


def _member(path: Path, name: str, size: int) -> Member:
    digest = hashlib.sha256()
    with opened(path) as file:
        for chunk in pieces(file, size):
            digest.update(chunk)
        modified = os.fstat(file.fileno()).st_mtime_ns // 1_000_000
    return Member(name, size, digest.hexdigest(), modified)


def _add_file(archive: tarfile.TarFile, run_id: str, member: Member, places: list[Path]) -> None:
    info = _info(f"runs/{run_id}/{member.name}", member.size, member.modified_ms)
    try:
        content = _opened(places)
    except OSError as error:
        raise _Lost(run_id, error) from error
    with content as file:
        checked = _Checked(file, member, run_id)
        archive.addfile(info, checked)
        checked.finish()


def _opened(places: list[Path]) -> IO[bytes]:
    for place in (*places, *places):  # a worker may move it from one to another between two looks
        with contextlib.suppress(FileNotFoundError):
            return opened(place)
    return opened(places[0])


def _add(archive: tarfile.TarFile, name: str, data: bytes, now_ms: int) -> None:
    archive.addfile(_info(name, len(data), now_ms), io.BytesIO(data))


def _info(name: str, size: int, modified_ms: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size, 0o600, modified_ms // 1000
    return info


class _Checked:
    """Reads a file and compares what was read with what its manifest says."""

    def __init__(self, file: IO[bytes], member: Member, run_id: str) -> None:
        self._file = file
        self._member = member
        self._run_id = run_id
        self._digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        try:
            data = self._file.read(size)
        except OSError as error:
            raise _Lost(self._run_id, error) from error
        self._digest.update(data)
        return data

    def finish(self) -> None:
        if self._digest.hexdigest() != self._member.sha256:
            msg = f"{self._file.name} changed while it was exported; export again"
            raise BundleRefused(msg)
