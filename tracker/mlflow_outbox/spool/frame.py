"""Framing: how events and headers lie in a segment file.

Layout
------
A segment is a header followed by frames, all integers little-endian::

    segment   header block | the same header block again | frames
    header    magic (8 bytes, b"MLFLOBX1") | length (u32) | CRC-32 of the map (u32) | MessagePack map
    frame     CRC-32 (u32) | sequence number (u32) | length (u16) | payload
    long      CRC-32 (u32) | sequence number (u32) | 0xFFFF | length (u32) | payload of 65,535 bytes or more

The header lies there twice because everything behind it hangs on it: a single damaged sector or bit costs at most the
frames in it, never the segment.

The CRC of a frame covers everything behind it (sequence number, length, payload) and starts from the segment's
*seed*, a random number in the header. A frame of another segment, of another run or of a former life of the disk
block therefore never passes, however intact it is. A payload is never empty, so a run of zeros (what file systems
leave after a power cut) is no frame.

A plain metric event of a four-letter key takes 38 bytes: 10 of framing, 28 of MessagePack.

Sequence numbers count the events of one writer in one run, across its segments, from 0, and wrap at 2**32. A reader
knows from them that nothing between two frames is missing, and recognises a frame that was written twice.
"""

from __future__ import annotations

import os
import struct
import zlib
from typing import Final, NamedTuple

import msgspec

from mlflow_outbox.errors import CorruptSegment, NewerFormat

MAGIC: Final = b"MLFLOBX1"
FORMAT_VERSION: Final = 1

#: Bytes; a longer payload is never written and never allocated for. Files go to ``files/``, so events stay small.
MAX_PAYLOAD: Final = 16 * 1024 * 1024
#: Bytes; a header is a few hundred.
MAX_HEADER: Final = 64 * 1024

_SHORT: Final = struct.Struct("<IH")  # behind the CRC: sequence number, length
_LONG: Final = struct.Struct("<IHI")  # behind the CRC: sequence number, 0xFFFF, length
_CRC: Final = struct.Struct("<I")
_FRAME: Final = struct.Struct("<IIH")
_PREFIX: Final = struct.Struct("<8sII")
#: In place of the length of a short frame: this one is long.
LONG_MARK: Final = 0xFFFF
#: Bytes before the payload of a short frame, and before that of a long one.
SHORT_OVERHEAD: Final = _FRAME.size
LONG_OVERHEAD: Final = _FRAME.size + 4
SEQUENCE_MASK: Final = 0xFFFFFFFF

_short = _SHORT.pack
_crc_pack = _CRC.pack
_crc32 = zlib.crc32
_frame_unpack = _FRAME.unpack_from
_length_unpack = _CRC.unpack_from


class SegmentHeader(msgspec.Struct):
    """Who wrote a segment, and to which run its events belong.

    Attributes:
        run_id: the run's id in the outbox.
        experiment: name of the run's experiment, in every segment, so that any of them can be delivered alone.
        writer: random hex id of one process's journal for this run.
        ordinal: number of this segment among the writer's, from 0.
        first_seq: sequence number of the first frame.
        seed: start value of every CRC in this segment.
        created_ms: wall-clock milliseconds since the epoch.
        remote: the run id is one that MLflow gave; the run exists there already.
        host, boot_id, pid: the writing process.
        version: format version; a larger one is left untouched.
    """

    run_id: str
    experiment: str
    writer: str
    ordinal: int
    first_seq: int
    seed: int
    created_ms: int
    remote: bool = False
    host: str = ""
    boot_id: str = ""
    pid: int = 0
    version: int = FORMAT_VERSION


class Frame(NamedTuple):
    """One frame read back: its sequence number, its payload, and the offset just behind it."""

    seq: int
    payload: bytes
    end: int


def pack(payload: bytes, seq: int, seed: int) -> bytes:
    """Return the frame that holds payload.

    Args:
        payload: 1 to MAX_PAYLOAD bytes.
        seq: sequence number, 0 to 2**32 - 1.
        seed: the segment's seed.
    """
    length = len(payload)
    body = _short(seq, length) + payload if length < LONG_MARK else _LONG.pack(seq, LONG_MARK, length) + payload
    return _crc_pack(_crc32(body, seed)) + body


def unpack(data: bytes | bytearray, offset: int, seed: int, *, end: int | None = None) -> Frame | None:
    """Return the whole and intact frame at offset, or None when there is none.

    Never reads beyond ``end`` and allocates nothing but the payload, whatever the bytes say.

    Args:
        data: bytes of the segment.
        offset: where the frame should begin.
        seed: the segment's seed.
        end: number of valid bytes in data; None means all.
    """
    end = len(data) if end is None else end
    start = offset + SHORT_OVERHEAD
    if start >= end:
        return None
    crc, seq, length = _frame_unpack(data, offset)
    if length == LONG_MARK:
        start = offset + LONG_OVERHEAD
        if start >= end:
            return None
        (length,) = _length_unpack(data, offset + SHORT_OVERHEAD)
        if length < LONG_MARK or length > MAX_PAYLOAD:
            return None
    stop = start + length
    if length == 0 or stop > end:
        return None
    if _crc32(data[offset + 4 : stop], seed) != crc:
        return None
    return Frame(seq, bytes(data[start:stop]), stop)


def wanted(data: bytes | bytearray, offset: int) -> int:
    """Return where the frame at offset claims to end, or -1 when its head is cut off or makes no sense."""
    if offset + SHORT_OVERHEAD > len(data):
        return -1
    _, _, length = _frame_unpack(data, offset)
    if length != LONG_MARK:
        return offset + SHORT_OVERHEAD + length if length else -1
    if offset + LONG_OVERHEAD > len(data):
        return -1
    (length,) = _length_unpack(data, offset + SHORT_OVERHEAD)
    return offset + LONG_OVERHEAD + length if LONG_MARK <= length <= MAX_PAYLOAD else -1


def pack_header(header: SegmentHeader) -> bytes:
    """Return the bytes with which a segment begins: the header, twice."""
    body = msgspec.msgpack.encode(header)
    return (_PREFIX.pack(MAGIC, len(body), zlib.crc32(body)) + body) * 2


def unpack_header(data: bytes | bytearray) -> tuple[SegmentHeader, int]:
    """Return the header at the start of a segment and the offset of the first frame; either copy will do.

    Raises:
        CorruptSegment: the bytes hold no whole and intact header.
        NewerFormat: a newer version wrote the segment.
    """
    found = _header_at(data, 0)
    if found is not None:
        header, size = found
        return _supported(header), 2 * size
    at = data.find(MAGIC, 1, MAX_HEADER)
    while at > 0:
        found = _header_at(data, at)
        if found is not None:
            return _supported(found[0]), at + found[1]
        at = data.find(MAGIC, at + 1, MAX_HEADER)
    msg = f"the segment's header is damaged or cut off ({len(data)} bytes, beginning with {bytes(data[:8])!r})"
    raise CorruptSegment(msg)


def _header_at(data: bytes | bytearray, at: int) -> tuple[SegmentHeader, int] | None:
    if len(data) < at + _PREFIX.size:
        return None
    magic, length, crc = _PREFIX.unpack_from(data, at)
    if magic != MAGIC or length > MAX_HEADER:
        return None
    body = bytes(data[at + _PREFIX.size : at + _PREFIX.size + length])
    if len(body) != length or zlib.crc32(body) != crc:
        return None
    try:
        return msgspec.msgpack.decode(body, type=SegmentHeader), _PREFIX.size + length
    except (ValueError, RecursionError):  # no MessagePack, no UTF-8, a field that is not known and nested too deeply
        return None


def _supported(header: SegmentHeader) -> SegmentHeader:
    if header.version > FORMAT_VERSION:
        msg = (
            f"the segment has format version {header.version}, this is version {FORMAT_VERSION}; upgrade to deliver it"
        )
        raise NewerFormat(msg)
    return header


def new_seed() -> int:
    """Return a random seed for a segment's CRCs."""
    return int.from_bytes(os.urandom(4), "little")
