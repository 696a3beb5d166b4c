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
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import unquote

from mlflow_outbox.counters import printable
from mlflow_outbox.errors import ArtifactRefused, InvalidEvent, InvalidEventType
from mlflow_outbox.spool.private import create_private, sync_directory

_CHUNK: Final = 1024 * 1024
_MAX_PATH: Final = 1000
#: Bytes of one part of a path that file systems take; a server that keeps artifacts in one would answer 500 for ever.
_MAX_PART: Final = 255
_BAD: Final = re.compile(r"[\x00-\x1f\x7f\\#]")
_BAD_DECODED: Final = re.compile(r"[\x00\x7f\\#]")
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
            ArtifactRefused: it is missing, unreadable, not a regular file or too large, or the outbox has no room for
                it.
        """
        shown = printable(os.fspath(source), 400)
        try:
            fd = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            msg = f"the file {shown!r} cannot be read: {reason}"
            raise ArtifactRefused("bad_file", msg) from None
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


def checked_artifact_path(path: str | os.PathLike[str], *, what: str = "artifact path") -> str:
    """Return an artifact path in MLflow's form, checked to stay inside the run's artifacts.

    The checks are made at the call and again before delivery, because the journal may come from another machine.
    Percent signs are decoded as often as they decode to something else, since a server may do so too
    (mlflow/utils/uri.py, validate_path_is_safe).

    Raises:
        InvalidEvent: it is absolute, climbs out, is too long, or has characters that MLflow's servers refuse.
    """
    text = os.fspath(path) if isinstance(path, os.PathLike) else path
    shown = printable(text)
    if not isinstance(text, str):
        msg = f"the {what} {shown!r} must be text, not {type(text).__name__}"
        raise InvalidEventType("bad_path", msg)
    decoded, before = text, ""
    for _ in range(10):
        if decoded == before:
            break
        before, decoded = decoded, unquote(decoded)
    for form in {text, decoded}:
        problem = _path_problem(form, literal=form == text)
        if problem:
            msg = f"the {what} {shown!r} {problem}; use a relative path such as 'plots/loss.png'"
            raise InvalidEvent("bad_path", msg)
    return posixpath.normpath(text) if text else ""


def _path_problem(text: str, *, literal: bool) -> str | None:
    if len(text) > _MAX_PATH:
        return f"has {len(text)} characters, more than {_MAX_PATH}"
    longest = max(len(part.encode("utf-8", "surrogatepass")) for part in text.split("/"))
    if longest > _MAX_PART:
        return f"has a part of {longest} bytes, more than {_MAX_PART}"
    # Older MLflow names images "loss%step%1%timestamp%17...": what that seems to escape is no control character.
    if (_BAD if literal else _BAD_DECODED).search(text):
        return "holds a control character, a backslash or '#'"
    if literal and any(unicodedata.category(c) in {"Cc", "Cf", "Cs"} for c in text):
        return "holds an invisible character"
    if text.startswith("/") or re.match(r"[A-Za-z]:", text):
        return "is absolute"
    if ".." in text.split("/"):
        return "climbs out of the run's artifacts"
    if any(part != part.rstrip(". ") for part in text.split("/") if part not in {"", "."}):
        return "has a part that ends with a dot or a space"
    return None
