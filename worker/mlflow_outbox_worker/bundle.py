"""A bundle: runs of one outbox in one file, for machines that share no network.

Format
------
A tar archive, plain or gzipped, of regular files only. The first is ``manifest.json``: a line with the SHA-256 (hex)
of what follows it, then the manifest as JSON. It names every other member, ``runs/<run id>/<segment>.log`` or
``runs/<run id>/files/<sha256>``, with its size and SHA-256, and where the runs were to be delivered to. Nothing else
may be in the archive, nothing may be twice or missing.

Reading and writing live in ``unpacking`` and ``packing``.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import stat
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final, Literal, NoReturn

import msgspec

from mlflow_outbox.counters import printable
from mlflow_outbox.destination import resolve
from mlflow_outbox.errors import OutboxError
from mlflow_outbox.spool.directory import is_run_id
from mlflow_outbox.spool.snapshot import is_digest

if TYPE_CHECKING:
    from typing_extensions import Self

FORMAT: Final = 1
MANIFEST: Final = "manifest.json"
#: Bytes; a manifest of a hundred thousand files is far below.
_MANIFEST_BYTES: Final = 256 * 1024 * 1024
#: Members that stand for the header of the next one: long names, attributes. No export's has more than some 300 bytes.
_EXTENDED: Final = frozenset(
    {tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK}
)
_EXTENDED_BYTES: Final = 64 * 1024
_CHUNK: Final = 1024 * 1024
_DRAFT_BYTES: Final = 6
_SEGMENT: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_\-]{0,150}\.log", re.ASCII)


class BundleRefused(OutboxError):
    """Raised when a bundle is damaged, or holds what no export wrote; nothing of it was used."""


class Member(msgspec.Struct, frozen=True):
    """One file of a run: its name in the run's directory, size in bytes, digest, and modification time in ms."""

    name: str
    size: int
    sha256: str
    modified_ms: int = 0


class BundledRun(msgspec.Struct, frozen=True):
    """One run in a bundle."""

    run_id: str
    experiment: str
    members: list[Member]


class Manifest(msgspec.Struct, frozen=True):
    """What a bundle holds; see the module's docstring.

    Attributes:
        outbox: id of the outbox that the runs are of, which names what belongs to no run; "" in older bundles.
    """

    format: int
    made_ms: int
    destination: str
    runs: list[BundledRun]
    artifact_root: str = ""
    outbox: str = ""


def sealed(manifest: Manifest) -> bytes:
    """Return a manifest as it stands in a bundle, behind its digest."""
    data = msgspec.json.encode(manifest)
    return hashlib.sha256(data).hexdigest().encode() + b"\n" + data


def read_manifest(path: Path) -> Manifest:
    """Return what a bundle says that it holds; the members are not looked at.

    Raises:
        BundleRefused: it is damaged, no bundle, or of a newer format.
        OSError: it cannot be read.
    """
    with archive_of(path) as archive:
        return manifest_of(archive, path)


@contextlib.contextmanager
def archive_of(path: Path) -> Iterator[tarfile.TarFile]:
    """Open a bundle for reading it once from its beginning; whatever is wrong with its bytes becomes BundleRefused."""
    with opened(Path(os.path.realpath(path))) as file:  # a link may lead to it, and no more than that
        try:
            magic = file.read(2)
            file.seek(0)  # which a pipe cannot
            mode: Literal["r|gz", "r|"] = "r|gz" if magic == b"\x1f\x8b" else "r|"
            with tarfile.open(fileobj=file, mode=mode, tarinfo=_Header) as archive:
                yield archive
        except (tarfile.TarError, EOFError, zlib.error, ValueError, OverflowError) as error:
            refuse(path, f"is damaged, cut off, or no bundle ({printable(error, 100)})")
        except OSError as error:
            if error.errno is not None:
                raise
            refuse(path, f"is damaged or cut off ({printable(error, 100)})")  # gzip's own errors have no number


class _Header(tarfile.TarInfo):
    """The header of a member. What stands in place of one, and tarfile reads whole before anybody sees it, is small."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """Return what 512 bytes say.

        Raises:
            tarfile.ReadError: a name or attribute longer than any export's follows, or a list of holes.
        """
        found = super().frombuf(buf, encoding, errors)
        if found.type == tarfile.GNUTYPE_SPARSE or (found.type in _EXTENDED and found.size > _EXTENDED_BYTES):
            msg = f"a header of {found.size} bytes, or of a file with holes"
            raise tarfile.ReadError(msg)
        return found

    def _proc_gnusparse_10(self, *_: object) -> None:
        """Refuse the other form of a file with holes, whose list is as long as it says."""
        msg = "a file with holes"
        raise tarfile.ReadError(msg)


def manifest_of(archive: tarfile.TarFile, path: Path) -> Manifest:
    """Read the manifest, which is the first member, and check everything in it that can be checked by itself."""
    info = archive.next()
    if info is None or info.name != MANIFEST or not is_plain(info) or info.size > _MANIFEST_BYTES:
        refuse(path, f"does not begin with {MANIFEST}, so it is no bundle of mlflow-outbox")
    content = archive.extractfile(info)
    digest, _, data = (content.read() if content is not None else b"").partition(b"\n")
    if hashlib.sha256(data).hexdigest().encode() != digest:
        refuse(path, "has a damaged manifest")
    try:
        found = msgspec.json.decode(data, type=_Version).format
        if found > FORMAT:
            refuse(path, f"has format {found} and this version reads up to {FORMAT}; upgrade mlflow-outbox")
        manifest = msgspec.json.decode(data, type=Manifest)
        known = resolve(manifest.destination).uri == manifest.destination
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, nested too deeply, no destination
        refuse(path, f"has a manifest of another form ({printable(error, 100)})")
    if not known or (manifest.outbox and not is_run_id(manifest.outbox)):
        refuse(path, "has a manifest that no export wrote")
    ids: set[str] = set()
    for run in manifest.runs:  # without members too: a directory is made for each
        if not is_run_id(run.run_id):
            refuse(path, f"names the run {printable(run.run_id, 200)!r}, which is no id of a run")
        if run.run_id in ids:
            refuse(path, f"names the run {run.run_id} twice")
        ids.add(run.run_id)
    for member in (member for run in manifest.runs for member in run.members):
        folder, slash, digest_name = member.name.partition("/")
        fits = _SEGMENT.fullmatch(member.name) or (folder == "files" and slash and digest_name == member.sha256)
        if not fits or not is_digest(member.sha256) or member.size < 0:
            refuse(path, f"names the file {printable(member.name, 200)!r}, which is none of a run's")
    return manifest


class _Version(msgspec.Struct):
    format: int


def is_plain(info: tarfile.TarInfo) -> bool:
    """Return whether a member is a plain file: no link, device, directory, or file with holes."""
    return info.type in {tarfile.REGTYPE, tarfile.AREGTYPE} and getattr(info, "sparse", None) is None


def refuse(path: Path, what: str) -> NoReturn:
    """Raise BundleRefused for a path and what is wrong with it."""
    msg = f"{path} {what}"
    raise BundleRefused(msg)


def pieces(file: IO[bytes], size: int) -> Iterator[bytes]:
    """Yield the next so many bytes of a file, in pieces that fit into memory."""
    while size > 0:
        data = file.read(min(_CHUNK, size))
        if not data:
            msg = f"{file.name} is shorter than it was a moment ago"
            raise BundleRefused(msg)
        yield data
        size -= len(data)


def opened(path: Path) -> IO[bytes]:
    """Open a file for reading without following a link or waiting for a FIFO."""
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb")


def listed(folder: Path) -> list[str]:
    """Return the sorted names in a directory, none when it is not there."""
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []


def draft_of(path: Path) -> Path:
    """Return a name of its own beside a path for what is to become it."""
    return path.with_name(f".{path.name}.{secrets.token_hex(_DRAFT_BYTES)}")


def remove_drafts(path: Path, kind: Literal["file", "directory"]) -> None:
    """Remove what earlier attempts left that were killed; those of living processes are locked.

    A name that could be a draft's does not make it one: others' files, and what is of another kind, is left alone.

    Args:
        path: what the drafts were to become.
        kind: of the drafts.
    """
    form = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{{2 * _DRAFT_BYTES}}}")
    for name in filter(form.fullmatch, listed(path.parent)):
        draft = path.with_name(name)
        try:
            fd = os.open(draft, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            found = os.fstat(fd)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if found.st_uid != os.geteuid():
                continue
            if kind == "directory" and stat.S_ISDIR(found.st_mode):
                shutil.rmtree(draft, ignore_errors=True)
            elif kind == "file" and stat.S_ISREG(found.st_mode):
                os.unlink(draft)
        except OSError:
            continue  # somebody is at it
        finally:
            os.close(fd)
