"""The segment files of one run, in one directory or several, as a reader finds them.

Nothing here opens a file for writing, takes a lock that a writer could meet, or keeps a descriptor.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from mlflow_outbox.errors import CorruptSegment, NewerFormat
from mlflow_outbox.spool.disk import is_being_written
from mlflow_outbox.spool.events import Event, SegmentClosed, decode
from mlflow_outbox.spool.frame import (
    MAX_HEADER,
    MAX_PAYLOAD,
    SEQUENCE_MASK,
    Frame,
    SegmentHeader,
    unpack,
    unpack_header,
    wanted,
)
from mlflow_outbox.spool.recovery import frames

#: Bytes read at once; grown when a frame is longer.
CHUNK: Final = 256 * 1024
#: Bytes: any frame fits.
LARGEST: Final = MAX_PAYLOAD + 64


class SegmentFile(NamedTuple):
    """A segment whose header was read."""

    path: Path
    header: SegmentHeader
    body: int  # offset of the first frame


class Broken(NamedTuple):
    """Something unreadable in a run's directory.

    Attributes:
        kind: "corrupt" or "torn" bytes, an "unknown" event kind, a "header" that cannot be read, a "newer" format, or a
            file that is "unread", as the disk does not give it now.
        start, end: byte range in the file.
    """

    path: Path
    kind: str
    start: int
    end: int
    reason: str


class Listing:
    """The segments of one run, whose headers are read once.

    Of files of one name the longest is taken: segments are only ever appended to, so the others are older copies.

    Args:
        paths: the directories that together hold the run; a segment may move to a later one meanwhile.

    Attributes:
        bad: the files that ``by_writer`` could not use, by name.
        unread: those of them that may hold events, which the disk does not give at present: why, by name.
    """

    def __init__(self, paths: tuple[Path, ...]) -> None:
        self._paths = paths
        self._headers: dict[str, SegmentFile] = {}
        self.bad: dict[str, Broken] = {}
        self.unread: dict[str, OSError] = {}

    def by_writer(self) -> dict[str, list[SegmentFile]]:
        """Return the segments by writer, each writer's in reading order; see ``bad`` for unreadable ones."""
        found = self._listed()
        self.bad = {name: bad for name, bad in self.bad.items() if name in found}
        self.unread = {}
        for name in [n for n, held in self._headers.items() if found.get(n) != held.path]:
            del self._headers[name]
        for name in found.keys() - self._headers.keys():
            self._read_header(found[name])
        by_writer: dict[str, list[SegmentFile]] = {}
        for segment in self._headers.values():
            by_writer.setdefault(segment.header.writer, []).append(segment)
        for held in by_writer.values():
            _sort(held)
        # Writers in the order in which they began, so that a resumed job's events follow those of the first.
        return dict(sorted(by_writer.items(), key=lambda item: (item[1][0].header.created_ms, item[0])))

    def _listed(self) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for folder in self._paths:
            try:
                names = [n for n in os.listdir(folder) if n.endswith(".log")]
            except FileNotFoundError:
                continue
            for name in names:
                path = folder / name
                if name not in found or _size(path) > _size(found[name]):
                    found[name] = path
        return found

    def _read_header(self, path: Path) -> None:
        name = path.name
        try:
            data = read_bytes(path, 0, MAX_HEADER + 64)
            if not data:
                return  # begun by a writer that was interrupted, or about to be written
            header, body = unpack_header(data)
        except (CorruptSegment, NewerFormat) as error:
            kind = "newer" if isinstance(error, NewerFormat) else "header"
            if kind == "header" and is_being_written(path):
                return  # its header is on its way
            self.bad[name] = Broken(path, kind, 0, len(data), str(error))
            return
        except FileNotFoundError:  # it was moved or reclaimed meanwhile
            now = self._listed().get(name, path)
            if now != path:
                self._read_header(now)
            return
        except OSError as error:
            waits = _may_hold_events(path)
            self.bad[name] = Broken(path, "unread" if waits else "header", 0, 0, str(error))
            if waits:
                self.unread[name] = error
            return
        self.bad.pop(name, None)
        self._headers[name] = SegmentFile(path, header, body)


def _sort(held: list[SegmentFile]) -> None:
    """Sort one writer's segments by their first numbers, which wrap, counted from those of its earliest file."""
    begin = min(held, key=lambda segment: segment.header.ordinal).header.first_seq
    half = (SEQUENCE_MASK + 1) // 2
    held.sort(
        key=lambda segment: (
            ((segment.header.first_seq - begin + half) & SEQUENCE_MASK) - half,
            segment.header.ordinal,
        )
    )


def number_behind(segment: SegmentFile, offset: int, seq: int) -> int:
    """Return the number behind the last intact frame, hopping from head to head as long as the heads make sense."""
    seed = segment.header.seed
    try:
        data = read_bytes(segment.path, offset, os.stat(segment.path).st_size - offset)
    except FileNotFoundError:
        return seq
    at, last, size = 0, -1, len(data)
    while 0 < (end := wanted(data, at)) <= size:
        last, at = at, end
    if at == size and last >= 0 and (found := unpack(data, last, seed)) is not None:
        return _number_after(found)
    for frame in frames(data, 0, seed, next_seq=seq, final=True):  # damaged, or a frame is on its way: every CRC counts
        if isinstance(frame, Frame) and (_number_after(frame) - seq) & SEQUENCE_MASK < 1 << 31:
            seq = _number_after(frame)
    return seq


def first_event(segment: SegmentFile) -> Event | None:
    """Return the event of a segment's first frame, however long, or None when it is not whole and intact."""
    chunk = CHUNK
    while True:
        try:
            data = read_bytes(segment.path, segment.body, chunk)
        except FileNotFoundError:
            return None
        found = unpack(data, 0, segment.header.seed)
        if found is not None:
            event = decoded(found.payload)
            return None if isinstance(event, str) else event
        if len(data) < chunk or wanted(data, 0) <= chunk:
            return None
        chunk = LARGEST


def _number_after(frame: Frame) -> int:
    """Return the number of the next event; a closing frame carries it itself."""
    closes = isinstance(decoded(frame.payload), SegmentClosed)
    return frame.seq if closes else (frame.seq + 1) & SEQUENCE_MASK


def decoded(payload: bytes) -> Event | str:
    """Return the event, or a sentence about why there is none."""
    try:
        return decode(payload)
    except msgspec.DecodeError as error:
        return f"an event of a kind or shape that this version does not know: {error}"


def read_bytes(path: Path, offset: int, size: int) -> bytes:
    """Return bytes of a file from an offset, fewer only at its end.

    Raises:
        OSError: it is not there, is a link, or cannot be read.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        parts: list[bytes] = []
        while size > 0:
            part = os.pread(fd, size, offset)
            if not part:
                break
            parts.append(part)
            offset += len(part)
            size -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)
    finally:
        os.close(fd)


def _may_hold_events(path: Path) -> bool:
    """Return False for what no writer has made: a link, a directory, a pipe, a device."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return True


def _size(path: Path) -> int:
    try:
        return os.stat(path, follow_symlinks=False).st_size
    except OSError:
        return -1
