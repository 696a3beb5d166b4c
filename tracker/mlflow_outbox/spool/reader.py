"""Reading the journals of one run: all its writers, from where reading stopped last time.

A reader never opens a file for writing, takes no lock that a writer could meet, and keeps no descriptor: it may run
in another process, on another machine, on read-only media, while the run is still being written.

The segments of a writer are read in the order of their first number. A segment is *final* once its closing frame was
read, once the same writer has begun a later one, or once its writer is gone: no living process of this machine holds it
(flock), and, if it came from another machine or the file system knows no locks, nothing was added for ``settle``
seconds.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

import msgspec

from mlflow_outbox.errors import CorruptSegment, NewerFormat
from mlflow_outbox.spool.disk import is_being_written
from mlflow_outbox.spool.events import Event, Metric, RunStarted, SegmentClosed, decode, points_of
from mlflow_outbox.spool.frame import (
    MAX_HEADER,
    MAX_PAYLOAD,
    SEQUENCE_MASK,
    SHORT_OVERHEAD,
    Frame,
    SegmentHeader,
    unpack,
    unpack_header,
    wanted,
)
from mlflow_outbox.spool.recovery import Cut, Damage, frames
from mlflow_outbox.spool.writer import is_gone

E = TypeVar("E", bound=Event)

#: Bytes read at once; grown when a frame is longer.
_CHUNK: Final = 256 * 1024
#: Length field of a long frame.
_LONG: Final = 0xFFFF
#: Bytes: any frame fits.
_LARGEST: Final = MAX_PAYLOAD + 64

_head = struct.Struct("<IIH").unpack_from
_crc32 = zlib.crc32


class Cursor(msgspec.Struct, frozen=True):
    """How far one writer's events have been read.

    Attributes:
        ordinal: segment of the writer that the next event is read from.
        offset: byte offset in it of the next frame; 0 means its first.
        seq: number that the next event must have; a larger one is a gap, a smaller one was read before.
    """

    ordinal: int = 0
    offset: int = 0
    seq: int = 0


class SegmentFile(NamedTuple):
    """A segment whose header was read."""

    path: Path
    header: SegmentHeader
    body: int  # offset of the first frame


class Broken(NamedTuple):
    """Something unreadable in a run's directory.

    Attributes:
        kind: "corrupt" or "torn" bytes, an "unknown" event kind, a "header" that cannot be read, a "newer" format.
        start, end: byte range in the file.
    """

    path: Path
    kind: str
    start: int
    end: int
    reason: str


class Window(NamedTuple):
    """Some events of a run, in order, and what to remember once they are delivered.

    Attributes:
        events: (writer, event) pairs; each writer's in its order.
        cursors: of every writer, behind these events.
        broken: damage met on the way, behind the new cursors too.
        missing: events that must have existed, by their numbers, and are not there.
        more: there are further events to read at once.
        live: some writer may still be appending.
    """

    events: list[tuple[str, Event]]
    cursors: dict[str, Cursor]
    broken: list[Broken]
    missing: int
    more: bool
    live: bool


class RunReader:
    """Reads one run's directory, or several that together hold one run.

    Of files of one name the longest is read: segments are only ever appended to, so the others are older copies.

    Args:
        path: the run's directory.
        others: further directories with segments and files of the same run; a segment may move to a later one
            meanwhile.
        settle: seconds without growth after which a segment without a lock counts as left by its writer.
    """

    def __init__(self, path: Path, *others: Path, settle: float = 60.0) -> None:
        self.path = path
        self.paths = (path, *others)
        self._settle = settle
        self._headers: dict[str, SegmentFile] = {}
        self._bad: dict[str, Broken] = {}

    def segments(self) -> dict[str, list[SegmentFile]]:
        """Return the segments by writer, each writer's in reading order; see ``bad_headers`` for unreadable ones."""
        found = self._listed()
        self._bad = {name: bad for name, bad in self._bad.items() if name in found}
        for name in [n for n, held in self._headers.items() if found.get(n) != held.path]:
            del self._headers[name]
        for name in found.keys() - self._headers.keys():
            self._read_header(found[name])
        by_writer: dict[str, list[SegmentFile]] = {}
        for segment in self._headers.values():
            by_writer.setdefault(segment.header.writer, []).append(segment)
        for held in by_writer.values():
            held.sort(key=lambda s: (s.header.first_seq, s.header.ordinal))
        # Writers in the order in which they began, so that a resumed job's events follow those of the first.
        return dict(sorted(by_writer.items(), key=lambda item: (item[1][0].header.created_ms, item[0])))

    def bad_headers(self) -> list[Broken]:
        """Return the files that ``segments`` could not use."""
        return list(self._bad.values())

    def _listed(self) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for folder in self.paths:
            try:
                names = [n for n in os.listdir(folder) if n.endswith(".log")]
            except FileNotFoundError:
                continue
            for name in names:
                path = folder / name
                if name not in found or _size(path) > _size(found[name]):
                    found[name] = path
        return found

    def file(self, name: str) -> Path:
        """Return where a file of the run is, or would be; names come from ``is_digest``."""
        places = [folder / "files" / name for folder in self.paths]
        return next((place for place in places if os.path.lexists(place)), places[0])

    def _read_header(self, path: Path) -> None:
        name = path.name
        try:
            data = _read(path, 0, MAX_HEADER + 64)
            if not data:
                return  # begun by a writer that was interrupted, or about to be written
            header, body = unpack_header(data)
        except (CorruptSegment, NewerFormat) as error:
            kind = "newer" if isinstance(error, NewerFormat) else "header"
            if kind == "header" and is_being_written(path):
                return  # its header is on its way
            self._bad[name] = Broken(path, kind, 0, len(data), str(error))
            return
        except OSError as error:
            self._bad[name] = Broken(path, "header", 0, 0, str(error))
            return
        self._bad.pop(name, None)
        self._headers[name] = SegmentFile(path, header, body)

    def started(self) -> tuple[RunStarted | None, SegmentHeader | None]:
        """Return how the run began, by its first writer that says so, and the header of its first segment."""
        first: SegmentHeader | None = None
        for held in self.segments().values():
            first = first or held[0].header
            if held[0].header.first_seq != 0:
                continue
            event = _first_event(held[0])
            if isinstance(event, RunStarted) and not event.resumed:
                return event, held[0].header
        return None, first

    def first(self, kind: type[E]) -> E | None:
        """Return the first event of a kind with which a writer begins, or None."""
        for held in self.segments().values():
            if held[0].header.first_seq != 0:
                continue
            event = _first_event(held[0])
            if isinstance(event, kind):
                return event
        return None

    def window(
        self, cursors: Mapping[str, Cursor], *, points: int = 1000, items: int = 2000, size: int = 4 * 1024 * 1024
    ) -> Window:
        """Read events behind the cursors until there are enough for a few requests.

        Args:
            cursors: where to begin, by writer; a writer without one is read from its beginning.
            points: metric points to stop at.
            items: events to stop at.
            size: bytes to stop at.
        """
        budget = _Budget(points, items, size)
        events: list[tuple[str, Event]] = []
        after = dict(cursors)
        broken: list[Broken] = []
        missing = 0
        live = False
        for writer, held in self.segments().items():
            part = _WriterPass(writer, held, after.get(writer), budget, self._settle, self.paths)
            part.read()
            events += part.events
            broken += part.broken
            missing += part.missing
            live = live or part.live
            if part.cursor is not None:
                after[writer] = part.cursor
            if budget.spent:
                break
        return Window(events, after, broken, missing, budget.spent, live or budget.spent)

    def next_numbers(self, cursors: Mapping[str, Cursor] | None = None) -> dict[str, int]:
        """Return, for every writer, the number that its next event will have; nothing is decoded.

        Args:
            cursors: where to begin counting; makes it faster, not different.
        """
        result: dict[str, int] = {}
        for writer, held in self.segments().items():
            last = held[-1]
            cursor = (cursors or {}).get(writer)
            seq, offset = last.header.first_seq, last.body
            if cursor is not None and cursor.ordinal == last.header.ordinal and cursor.offset > offset:
                seq, offset = cursor.seq, cursor.offset
            result[writer] = _count_frames(last, offset, seq)
        return result


class _Budget:
    """How much one window may still take."""

    def __init__(self, points: int, items: int, size: int) -> None:
        self.points, self.items, self.size = points, items, size
        self.spent = False

    def take(self, event: Event, size: int) -> None:
        self.points -= points_of(event)
        self.items -= 1
        self.size -= size
        self.spent = self.points <= 0 or self.items <= 0 or self.size <= 0


class _WriterPass:
    """One writer's share of a window."""

    def __init__(
        self,
        writer: str,
        held: list[SegmentFile],
        cursor: Cursor | None,
        budget: _Budget,
        settle: float,
        paths: tuple[Path, ...],
    ) -> None:
        self.writer = writer
        self.events: list[tuple[str, Event]] = []
        self.broken: list[Broken] = []
        self.missing = 0
        self.live = False
        self.cursor = cursor
        self._held = held
        self._budget = budget
        self._settle = settle
        self._paths = paths
        # Without a cursor what is there is read; earlier segments were delivered and moved before the ledger was lost.
        self._seq = cursor.seq if cursor is not None else held[0].header.first_seq

    def read(self) -> None:
        """Read this writer's segments, from the cursor's on."""
        for place, segment in enumerate(self._from_cursor()):
            if self._budget.spent:
                return
            last = place == len(self._todo) - 1
            if not self._read_segment(segment, is_last=last):
                return

    def _from_cursor(self) -> Iterable[SegmentFile]:
        cursor = self.cursor
        todo = self._held
        if cursor is not None:
            at = next((i for i, s in enumerate(todo) if s.header.ordinal == cursor.ordinal), None)
            # A segment that was reclaimed is not there any more; go on with the first that holds later numbers.
            todo = todo[at:] if at is not None else [s for s in todo if s.header.ordinal > cursor.ordinal]
        self._todo = list(todo)
        return self._todo

    def _read_segment(self, segment: SegmentFile, *, is_last: bool) -> bool:
        """Read on in one segment; return whether the next one may be read."""
        header = segment.header
        here = self.cursor is not None and self.cursor.ordinal == header.ordinal
        offset = max(self.cursor.offset, segment.body) if here and self.cursor is not None else segment.body
        # Looked at before reading: a writer that is gone now cannot have appended anything after this.
        gone = not is_last or is_gone(segment.path, header, self._settle)
        chunk = _CHUNK
        while True:
            try:
                data = _read(segment.path, offset, chunk)
            except FileNotFoundError:
                return not self._was_moved(segment)
            at_end = len(data) < chunk
            plain = self._take_plain(data, header.seed)
            if plain:
                offset, data = offset + plain, data[plain:]
                self.cursor = Cursor(header.ordinal, offset, self._seq)
                if self._budget.spent:
                    return False
            base, cut, closed = offset, False, False
            for found in frames(data, 0, header.seed, next_seq=self._seq, final=gone, complete=at_end):
                if isinstance(found, Cut):
                    cut = True
                    break
                offset = base + found.end
                if isinstance(found, Damage):
                    self.broken.append(Broken(segment.path, found.kind, base + found.start, offset, "no intact frame"))
                else:
                    closed = self._take(segment, found.seq, found.payload, offset) or closed
                self.cursor = Cursor(header.ordinal, offset, self._seq)
                if self._budget.spent:
                    return False
            if closed:
                return True
            if at_end:
                self.live = self.live or not gone
                return gone
            chunk, offset = self._go_on(segment, chunk, offset, stuck=cut and offset == base and not plain)

    def _was_moved(self, segment: SegmentFile) -> bool:
        """Return whether a segment that is gone was moved while this reader looked, and not reclaimed by a worker."""
        moved = any(os.path.lexists(folder / segment.path.name) for folder in self._paths)
        self._budget.spent = self._budget.spent or moved  # the next window finds it
        return moved

    def _go_on(self, segment: SegmentFile, chunk: int, offset: int, *, stuck: bool) -> tuple[int, int]:
        """Return how much to read next, and where: more of the same, or behind a hole larger than any frame."""
        if not stuck:
            return _CHUNK, offset
        if chunk < 2 * _LARGEST:
            return min(chunk * 4, 2 * _LARGEST), offset
        # No intact frame begins in the first half, for any such would end in the second.
        behind = offset + _LARGEST
        self.broken.append(Broken(segment.path, "corrupt", offset, behind, "no intact frame"))
        self.cursor = Cursor(segment.header.ordinal, behind, self._seq)
        return chunk, behind

    def _take_plain(self, data: bytes, seed: int) -> int:
        """Take the frames at the beginning that are as they should be; return the bytes that they take up.

        Does what ``frames`` and ``_take`` do for all others, in one loop: reading is what a worker does most, and in a
        thread of the experiment it does so at the experiment's expense.
        """
        at, size, seq, budget, writer = 0, len(data), self._seq, self._budget, self.writer
        append = self.events.append
        while not budget.spent and at + SHORT_OVERHEAD < size:
            crc, number, length = _head(data, at)
            end = at + SHORT_OVERHEAD + length
            if number != seq or not 0 < length < _LONG or end > size or _crc32(data[at + 4 : end], seed) != crc:
                break
            try:
                event = decode(data[at + SHORT_OVERHEAD : end])
            except msgspec.DecodeError:
                break
            if type(event) is Metric:
                budget.points -= 1
                budget.items -= 1
                budget.size -= length
                budget.spent = budget.points <= 0 or budget.items <= 0 or budget.size <= 0
            elif type(event) is SegmentClosed:
                break
            else:
                budget.take(event, length)
            append((writer, event))
            seq = (seq + 1) & SEQUENCE_MASK
            at = end
        self._seq = seq
        return at

    def _take(self, segment: SegmentFile, seq: int, payload: bytes, end: int) -> bool:
        """Take one frame; return whether it closes the segment."""
        ahead = (seq - self._seq) & SEQUENCE_MASK
        event = _decoded(payload)
        if isinstance(event, SegmentClosed):
            if 0 < ahead < 1 << 31:
                self.missing += ahead
                self._seq = seq
            return True
        if ahead >= 1 << 31:
            return False  # passed before: written again after a failed sync
        self.missing += ahead
        self._seq = (seq + 1) & SEQUENCE_MASK
        if isinstance(event, str):
            self.broken.append(Broken(segment.path, "unknown", end - len(payload), end, event))
            return False
        self.events.append((self.writer, event))
        self._budget.take(event, len(payload))
        return False


def _count_frames(segment: SegmentFile, offset: int, seq: int) -> int:
    """Return the number behind the last intact frame, hopping from head to head as long as the heads make sense."""
    seed = segment.header.seed
    try:
        data = _read(segment.path, offset, os.stat(segment.path).st_size - offset)
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


def _first_event(segment: SegmentFile) -> Event | None:
    """Return the event of a segment's first frame, however long, or None when it is not whole and intact."""
    chunk = _CHUNK
    while True:
        try:
            data = _read(segment.path, segment.body, chunk)
        except FileNotFoundError:
            return None
        found = unpack(data, 0, segment.header.seed)
        if found is not None:
            event = _decoded(found.payload)
            return None if isinstance(event, str) else event
        if len(data) < chunk or wanted(data, 0) <= chunk:
            return None
        chunk = _LARGEST


def _number_after(frame: Frame) -> int:
    """Return the number of the next event; a closing frame carries it itself."""
    closes = isinstance(_decoded(frame.payload), SegmentClosed)
    return frame.seq if closes else (frame.seq + 1) & SEQUENCE_MASK


def _decoded(payload: bytes) -> Event | str:
    """Return the event, or a sentence about why there is none."""
    try:
        return decode(payload)
    except msgspec.DecodeError as error:
        return f"an event of a kind or shape that this version does not know: {error}"


def _read(path: Path, offset: int, size: int) -> bytes:
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


def _size(path: Path) -> int:
    try:
        return os.stat(path, follow_symlinks=False).st_size
    except OSError:
        return -1
