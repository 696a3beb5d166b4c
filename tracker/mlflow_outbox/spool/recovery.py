"""What a reader does with the bytes of a segment, intact or not.

Policy
------
A segment is read from its header on, frame by frame. Where no intact frame begins:

* **At the end of a segment whose writer may still be alive** the reader stops and comes back later. A writer appends
  a frame with one write, so what is there is a frame on its way.
* **A later intact frame exists.** Everything up to it is *corrupt*: the bytes are reported, to be set aside as they
  are, and reading goes on behind them. An intact frame is one whose CRC, started from this segment's random seed, is
  right and whose number is not absurd: a stale block of another file, zeros, or the inside of a payload do not pass.
  (What another machine writes over a network can come in another order; ``window`` waits for that.)
* **No later intact frame exists and the writer is gone.** The rest is *torn*: what a power cut or a full disk left of
  the last write. It is reported too, and the segment is at its end.

Numbers rise by one. A number that was passed already is a frame that was written again after a failed sync: it is
skipped. A number that is too high means that frames are *missing*: they are counted, then reading goes on.

This code does not guess: it never repairs a frame, never shortens or rewrites a file, and never declares bytes
damaged while their writer may still be writing them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Literal, NamedTuple

from mlflow_outbox.spool.frame import (
    LONG_MARK,
    LONG_OVERHEAD,
    MAX_PAYLOAD,
    SEQUENCE_MASK,
    SHORT_OVERHEAD,
    Frame,
    unpack,
)

#: A number further ahead than this is taken for damage, not for a gap; no segment holds as many frames.
_MAX_AHEAD: Final = 1 << 28


class Damage(NamedTuple):
    """Bytes of a segment that hold no intact frame."""

    kind: Literal["corrupt", "torn"]
    start: int
    end: int


class Cut(NamedTuple):
    """The data ends here in the middle of something that may be a frame; more bytes are needed to tell."""

    offset: int


def frames(
    data: bytes, offset: int, seed: int, *, next_seq: int, final: bool, complete: bool = True
) -> Iterator[Frame | Damage | Cut]:
    """Yield the frames of a piece of a segment, and what is wrong with it, in order.

    Args:
        data: bytes of the segment from some frame boundary on.
        offset: where in data to begin.
        seed: the segment's seed.
        next_seq: number that the next frame should have; used to tell a frame from accidental bytes after damage.
        final: the segment's writer is gone, nothing will be appended.
        complete: data reaches to the segment's present end; otherwise a frame may be cut off by the end of data.
    """
    size = len(data)
    while offset < size:
        found = unpack(data, offset, seed)
        if found is not None:
            yield found
            next_seq = found.seq + 1
            offset = found.end
            continue
        if not complete and _may_be_cut(data, offset):
            yield Cut(offset)
            return
        later = _next_intact(data, offset + 1, seed, next_seq)
        if later is not None:
            yield Damage("corrupt", offset, later)
            offset = later
        elif not complete:
            yield Cut(offset)
            return
        elif final:
            yield Damage("torn", offset, size)
            return
        else:
            return


def _may_be_cut(data: bytes, offset: int) -> bool:
    """Return whether the frame at offset claims to reach beyond data."""
    rest = len(data) - offset
    if rest < LONG_OVERHEAD:
        return True
    length = int.from_bytes(data[offset + 8 : offset + 10], "little")
    if length == LONG_MARK:
        length = int.from_bytes(data[offset + 10 : offset + 14], "little")
        return length <= MAX_PAYLOAD and offset + LONG_OVERHEAD + length > len(data)
    return offset + SHORT_OVERHEAD + length > len(data)


def _next_intact(data: bytes, offset: int, seed: int, next_seq: int) -> int | None:
    """Return the first offset at which an intact frame with a plausible number begins, or None."""
    last = len(data) - SHORT_OVERHEAD
    while offset < last:
        # Zeros are never a frame, and file systems leave long runs of them: skip them at once.
        if data[offset] == 0 and data[offset : offset + 4096].count(0) == min(4096, len(data) - offset):
            offset += 4096 - SHORT_OVERHEAD - 4
            continue
        seq = int.from_bytes(data[offset + 4 : offset + 8], "little")
        # A little behind is plausible too: frames written again after a failed sync.
        if (seq - next_seq + 65536) & SEQUENCE_MASK <= _MAX_AHEAD and unpack(data, offset, seed) is not None:
            return offset
        offset += 1
    return None
