"""Reading one writer's events: from where reading stopped last time, as far as a budget goes.

A segment is *final* once its closing frame was read, once the same writer has begun a later one, or once its writer is
gone: no living process of this machine holds it (flock), and, if it came from another machine or the file system knows
no locks, nothing was added for ``settle`` seconds. What is no intact frame in a final segment is damage; at the end of
one that is not final it may be a frame on its way. So it may be wherever it lies in what another machine writes over a
network, until this process has known it for half as long (``writer.may_come``).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from mlflow_outbox.spool.disk import is_there
from mlflow_outbox.spool.events import Event, Metric, SegmentClosed, decode, points_of
from mlflow_outbox.spool.frame import SEQUENCE_MASK, SHORT_OVERHEAD, Frame
from mlflow_outbox.spool.listing import CHUNK, LARGEST, Broken, SegmentFile, decoded, read_bytes
from mlflow_outbox.spool.recovery import Cut, Damage, frames
from mlflow_outbox.spool.writer import is_gone, may_come, may_go_on

#: Length field of a long frame.
_LONG: Final = 0xFFFF

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


class Window(NamedTuple):
    """Some events of a run, in order, and what to remember once they are delivered.

    Attributes:
        events: (writer, event) pairs; each writer's in its order.
        cursors: of every writer, behind these events.
        broken: damage met on the way, behind the new cursors too.
        missing: events that must have existed, by their numbers, and are not there.
        more: there are further events to read at once.
        live: some writer may still be appending.
        used_up_by: the writer at whose events there were enough; "" when all were read to their ends.
        begun: of writers that had no cursor, the number of the first event of which there was a segment.
        gaps: the missing events by writer: the number of the first, and how many they are.
        waits: what comes next of some writer is on its way, so that what is behind it was not read.
    """

    events: list[tuple[str, Event]]
    cursors: dict[str, Cursor]
    broken: list[Broken]
    missing: int
    more: bool
    live: bool
    used_up_by: str = ""
    begun: Mapping[str, int] = {}
    waits: bool = False
    gaps: Mapping[str, list[tuple[int, int]]] = {}


class Budget:
    """How much one window may still take."""

    def __init__(self, points: int, items: int, size: int) -> None:
        self.points, self.items, self.size = points, items, size
        self.spent = False

    def take(self, event: Event, size: int) -> None:
        """Take what one event of so many bytes costs."""
        self.points -= points_of(event)
        self.items -= 1
        self.size -= size
        self.spent = self.points <= 0 or self.items <= 0 or self.size <= 0


def unread(held: list[SegmentFile], cursor: Cursor) -> list[SegmentFile]:
    """Return the segments that a reader at a cursor still looks at, in reading order, the cursor's own first.

    Their place in reading order decides and not their ordinals: what was written again after a failed sync lies in a
    later file and is read earlier. Where the cursor's own segment is not there all of them are read, for any may hold
    what comes next; what was read before is passed by its numbers.

    Args:
        held: one writer's segments, in reading order.
        cursor: how far it was read.
    """
    return held[next((i for i, segment in enumerate(held) if segment.header.ordinal == cursor.ordinal), 0) :]


class WriterPass:
    """One writer's share of a window."""

    def __init__(
        self,
        writer: str,
        held: list[SegmentFile],
        cursor: Cursor | None,
        budget: Budget,
        settle: float,
        paths: tuple[Path, ...],
        *,
        whole: bool = False,
    ) -> None:
        self.writer = writer
        self.events: list[tuple[str, Event]] = []
        self.broken: list[Broken] = []
        self.missing = 0
        self.gaps: list[tuple[int, int]] = []
        self.live = self.waits = False
        self.cursor = cursor
        self._held = held
        self._budget = budget
        self._settle = settle
        self._paths = paths
        # Without a cursor what is there is read; earlier segments were delivered and moved before the ledger was lost.
        self._seq = cursor.seq if cursor is not None else held[0].header.first_seq
        if whole and cursor is None and self._seq < 1 << 31:
            self._seq = 0  # where they were delivered to somebody else, they are missing

    def read(self) -> None:
        """Read this writer's segments, from the cursor's on."""
        for segment in self._held if self.cursor is None else unread(self._held, self.cursor):
            if self._budget.spent or not self._read_segment(segment, is_last=segment is self._held[-1]):
                return

    def _read_segment(self, segment: SegmentFile, *, is_last: bool) -> bool:
        """Read on in one segment; return whether the next one may be read."""
        header = segment.header
        here = self.cursor is not None and self.cursor.ordinal == header.ordinal
        offset = max(self.cursor.offset, segment.body) if here and self.cursor is not None else segment.body
        # Looked at before reading: a writer that is gone now cannot have appended anything after this.
        gone = not is_last or is_gone(segment.path, header, self._settle)
        if gone and not here:
            self._pass_gap_before(segment)
        chunk = CHUNK
        while True:
            try:
                data = read_bytes(segment.path, offset, chunk)
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
            rest = frames(data, 0, header.seed, next_seq=self._seq, final=gone, complete=at_end)
            for found in self._until_on_its_way(rest, segment, base):
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
            if at_end or self.waits:
                return self._come_to_end(header.ordinal, offset, gone=gone and not self.waits)
            chunk, offset = self._go_on(segment, chunk, offset, stuck=cut and offset == base and not plain)

    def _until_on_its_way(
        self, found: Iterator[Frame | Damage | Cut], segment: SegmentFile, base: int
    ) -> Iterator[Frame | Damage | Cut]:
        """Yield what was found, up to the beginning of a frame of which the rest may still come."""
        for one in found:
            if isinstance(one, Damage) and self._is_on_its_way(one, segment, base + one.start):
                self.waits = True
                return
            yield one

    def _is_on_its_way(self, damage: Damage, segment: SegmentFile, offset: int) -> bool:
        path, header = segment.path, segment.header
        is_last = damage.kind == "torn" and segment is self._held[-1]
        return (is_last and may_go_on(path, header, self._settle)) or may_come(path, header, offset, self._settle)

    def _come_to_end(self, ordinal: int, offset: int, *, gone: bool) -> bool:
        """Take notice that there is no more in a segment now; return whether the next one may be read."""
        self.live = self.live or not gone
        if gone:  # also where nothing is behind the header: the number with which it says that it begins was reached
            self.cursor = Cursor(ordinal, offset, self._seq)
        return gone

    def _pass_gap_before(self, segment: SegmentFile) -> None:
        """Count what is missing between the segments before and the number with which this one says that it begins.

        Where a power cut left nothing behind the header no frame will ever say so, and a flush would wait for that
        number. A writer that lives will say so itself.
        """
        ahead = (segment.header.first_seq - self._seq) & SEQUENCE_MASK
        if 0 < ahead < 1 << 31:
            self._miss(ahead)
            self._seq = segment.header.first_seq

    def _miss(self, number: int) -> None:
        """Count events that are not there, from the next one on."""
        if number:
            self.missing += number
            self.gaps.append((self._seq, number))

    def _was_moved(self, segment: SegmentFile) -> bool:
        """Return whether a segment that is gone was moved while this reader looked, and not reclaimed by a worker."""
        moved = any(is_there(folder / segment.path.name) for folder in self._paths)
        self._budget.spent = self._budget.spent or moved  # the next window finds it
        return moved

    def _go_on(self, segment: SegmentFile, chunk: int, offset: int, *, stuck: bool) -> tuple[int, int]:
        """Return how much to read next, and where: more of the same, or behind a hole larger than any frame."""
        if not stuck:
            return CHUNK, offset
        if chunk < 2 * LARGEST:
            return min(chunk * 4, 2 * LARGEST), offset
        # No intact frame begins in the first half, for any such would end in the second.
        behind = offset + LARGEST
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
        event = decoded(payload)
        if isinstance(event, SegmentClosed):
            if 0 < ahead < 1 << 31:
                self._miss(ahead)
                self._seq = seq
            return True
        if ahead >= 1 << 31:
            return False  # passed before: written again after a failed sync
        self._miss(ahead)
        self._seq = (seq + 1) & SEQUENCE_MASK
        if isinstance(event, str):
            self.broken.append(Broken(segment.path, "unknown", end - len(payload), end, event))
            return False
        self.events.append((self.writer, event))
        self._budget.take(event, len(payload))
        return False
