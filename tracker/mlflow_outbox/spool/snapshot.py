"""Copies of artifact files, named by their content, made when the file is logged.

What MLflow gets is the file as it was at the call: the experiment may go on writing, move or delete it. A copy lies
inside the run's directory (``files/<sha256>``), so that the directory can be moved to another machine as a whole; the
same content logged twice is kept once.

The source is opened without blocking and must be a regular file: a FIFO would stop the experiment, a device would
never end. A file that changes while it is copied is taken as read; its digest is that of the copy.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import posixpath
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import unquote

from mlflow_outbox.counters import printable
from mlflow_outbox.errors import ArtifactRefused, InvalidEvent, InvalidEventType
from mlflow_outbox.spool.private import create_private, sync_directory

_CHUNK: Final = 1024 * 1024
#: Bytes of a path: what file systems take (4096), less room for the folder of a run.
_MAX_PATH: Final = 3500
#: Bytes of one part of a path that file systems take; a server that keeps artifacts in one would answer 500 for ever.
_MAX_PART: Final = 255
#: Times that a path is decoded; nobody encodes a name so often.
_MOST_DECODED: Final = 10
#: What leads to another place on a Windows machine too, where a colon ends a drive's name.
_ABSOLUTE: Final = re.compile(r"[/\\]|[A-Za-z]:[/\\]")
_SEPARATORS: Final = re.compile(r"[/\\:]")
#: What MLflow's server refuses in the path of a file, however it is encoded, or finds no handler for.
_NOT_SERVED: Final = re.compile(r"[#\n]")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


class Snapshot(NamedTuple):
    """A file that was kept: hex digest and size in bytes."""

    sha256: str
    size: int


class SnapshotStore:
    """The ``files`` directory of one run.

    Args:
        run_directory: the run's directory, which exists.
        durable: make each copy survive a power cut before returning.
    """

    def __init__(self, run_directory: Path, *, durable: bool = False) -> None:
        self.path = run_directory / "files"
        self._durable = durable

    def add_file(self, source: str | os.PathLike[str], *, limit: int) -> Snapshot:
        """Copy a file.

        Args:
            source: path of a regular file; a symbolic link is followed.
            limit: bytes; a larger file is refused.

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
            self._check_source(os.fstat(fd), shown, limit)
            return self._add(iter(lambda: os.read(fd, _CHUNK), b""), shown, limit)
        finally:
            os.close(fd)

    @staticmethod
    def _check_source(found: os.stat_result, shown: str, limit: int) -> None:
        if not stat.S_ISREG(found.st_mode):
            kind = "directory" if stat.S_ISDIR(found.st_mode) else "FIFO, socket or device"
            msg = f"{shown!r} is not a regular file but a {kind}"
            raise ArtifactRefused("bad_file", msg)
        if found.st_size > limit:
            msg = f"the file {shown!r} has {found.st_size} bytes, the setting artifact_bytes allows {limit}"
            raise ArtifactRefused("file_too_large", msg)

    def add_bytes(self, data: bytes, *, limit: int, name: str = "text") -> Snapshot:
        """Keep bytes that have no file.

        Raises:
            ArtifactRefused: they are too large, or the outbox has no room for them.
        """
        return self._add(iter([data] if data else []), name, limit)

    def _add(self, chunks: Iterator[bytes], shown: str, limit: int) -> Snapshot:
        draft = self.path / f".draft-{os.urandom(8).hex()}"
        digest, size = hashlib.sha256(), 0
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(self.path, 0o700)
            with os.fdopen(create_private(draft), "wb") as copy:
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
            os.rename(draft, self.path / digest.hexdigest())
            if self._durable:
                self._sync_names()
        except ArtifactRefused:  # which is an OSError too
            raise
        except OSError as error:
            msg = f"no copy of {shown!r} could be made in {self.path}: {error.strerror or error}"
            raise ArtifactRefused("no_room_for_file", msg) from None
        finally:
            self._discard(draft)  # by now it has its final name, unless something went wrong
        return Snapshot(digest.hexdigest(), size)

    def sync(self, sha256: str) -> None:
        """Make a copy and its name survive a power cut.

        Raises:
            OSError: the disk could not do it.
        """
        fd = os.open(self.path / sha256, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        self._sync_names()

    def _sync_names(self) -> None:
        sync_directory(self.path)
        sync_directory(self.path.parent)  # where "files" itself is a name

    @staticmethod
    def _discard(draft: Path) -> None:
        with contextlib.suppress(OSError):
            os.unlink(draft)


def is_digest(text: str) -> bool:
    """Return whether text is a hex SHA-256, and so safe as the name of a copy."""
    return _SHA256.fullmatch(text) is not None


def checked_artifact_path(path: str | os.PathLike[str], *, what: str = "artifact path", served: bool = True) -> str:
    """Return an artifact path in MLflow's form, checked to stay inside the run's artifacts.

    The checks are made at the call and again before delivery, because the journal may come from another machine.
    Percent signs are decoded as often as they decode to something else, since a server may do so too
    (mlflow/utils/uri.py, validate_path_is_safe), and what comes of it is checked as it is and in MLflow's form. A
    backslash counts as a slash there, and a letter with a colon before either as absolute, as MLflow's server has it:
    the files may be kept, or be fetched, by a machine with Windows. Such characters alone are a name like any other,
    and so are invisible ones: MLflow takes them.

    Args:
        path: relative.
        what: it is called so in an error.
        served: the file goes through MLflow's server, or may do so; storage that is written to itself takes more names.

    Raises:
        InvalidEvent: it is absolute, climbs out, is too long, or has characters that MLflow's servers refuse.
    """
    text = os.fspath(path) if isinstance(path, os.PathLike) else path
    shown = printable(text)
    if not isinstance(text, str):
        msg = f"the {what} {shown!r} must be text, not {type(text).__name__}"
        raise InvalidEventType("bad_path", msg)
    found = posixpath.normpath(text) if text else ""
    for start in dict.fromkeys((text, found)):
        problem = _problem_decoded(start, served=served)
        if problem:
            msg = f"the {what} {shown!r} {problem}; use a relative path such as 'plots/loss.png'"
            raise InvalidEvent("bad_path", msg)
    return found


def _problem_decoded(text: str, *, served: bool) -> str | None:
    for _ in range(_MOST_DECODED):
        for form in dict.fromkeys((text, posixpath.normpath(text))):
            problem = _path_problem(form, served=served)
            if problem:
                return problem
        text, before = unquote(text), text
        if text == before:
            return None
    return "is encoded too often"


def _path_problem(text: str, *, served: bool) -> str | None:
    try:
        size, longest = len(text.encode()), max(len(part.encode()) for part in text.split("/"))
    except UnicodeEncodeError:
        return "is no Unicode"
    if size > _MAX_PATH:
        return f"has {size} bytes, more than {_MAX_PATH}"
    if longest > _MAX_PART:
        return f"has a part of {longest} bytes, more than {_MAX_PART}"
    if "\0" in text:
        return "holds a NUL"
    if served and _NOT_SERVED.search(text):
        return "holds a '#' or a line break, which MLflow's server does not take"
    if _ABSOLUTE.match(text):
        return "is absolute"
    if any(part.strip(" ") == ".." for part in _SEPARATORS.split(text)):
        return "climbs out of the run's artifacts"
    return None
