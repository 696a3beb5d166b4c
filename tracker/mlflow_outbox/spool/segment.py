"""A segment file as its writer holds it: begun with a header, appended to frame by frame, ended by a closing frame.

A segment has one writer, is only appended to, and is cut back to a frame boundary when a write was short. What belongs
together (descriptor, offset, next number) changes by assignments alone, which no signal handler can interrupt; so after
an exception the file behind ``offset`` tells what was written and not counted.

The closing frame counts as no event: it carries the number that the next event will have.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from mlflow_outbox.spool import descriptors, frame
from mlflow_outbox.spool.disk import SystemDisk, is_foreign, is_there, short_write
from mlflow_outbox.spool.events import SegmentClosed, decode, encode


class TornFrame(OSError):
    """Raised when a file ends with the beginning of a frame; what it holds is known, then."""


class Segment:
    """The place in a writer's sequence where it writes; a file once it was begun.

    Args:
        disk: the system calls.
        seq: number of the next event.
        remember: whether payloads are kept until they are synced, to write them again when that fails.
        shared: other machines see the file too; a worker of one of them may take a silent writer for gone, and file it.

    Attributes:
        fd: the file's descriptor; -1 before it was begun and after it was closed.
        seed: of the frames' CRCs.
        seq: number of the next event, not wrapped.
        first_seq: number of the first event.
        offset: bytes that were written and counted.
        limit: offset at which a logging call takes the slow path; 0 makes it do so at once.
        synced: offset up to which the segment is known to be durable.
        unsynced: payloads since then, always the last of the segment.
        tainted: a sync of it failed.
        laid_by: the descriptor was given back before it was synced.
    """

    __slots__ = (
        "_disk", "_path", "_remember", "_shared", "fd", "first_seq", "laid_by", "limit", "offset", "seed", "seq",
        "synced", "tainted", "unsynced",
    )  # fmt: skip

    def __init__(self, disk: SystemDisk, seq: int, *, remember: bool, shared: bool = False) -> None:
        self._disk = disk
        self._path = Path()
        self._remember = remember
        self._shared = shared
        self.fd = -1
        self.seed = 0
        self.seq = self.first_seq = seq
        self.offset = self.limit = self.synced = 0
        self.unsynced: list[bytes] = []
        self.tainted = self.laid_by = False

    @property
    def path(self) -> Path:
        """Where the file was begun."""
        return self._path

    @property
    def is_open(self) -> bool:
        """Whether its descriptor was not given back yet."""
        return descriptors.holds(self.fd, self._path)

    @property
    def is_removed(self) -> bool:
        """Whether the file has lost its name, or was filed meanwhile; not where its whole outbox was moved."""
        try:
            return self.fd >= 0 and (os.fstat(self.fd).st_nlink == 0 or (self._shared and self._is_filed()))
        except OSError as error:
            if is_foreign(error):
                raise
            return True

    def _is_filed(self) -> bool:
        try:
            return not is_there(self._path) and is_there(self._path.parent.parent)
        except OSError as error:  # the file server is away
            if is_foreign(error):
                raise
            return False

    @property
    def first_unsynced(self) -> int:
        """Number of the first event that is not known to be durable."""
        return self.seq - len(self.unsynced)

    def begin(self, path: Path, header: frame.SegmentHeader) -> None:
        """Create the file.

        Raises:
            OSError: the disk did not take it; nothing is left of it.
        """
        data = frame.pack_header(header)
        size, self._path = len(data), path
        fd = descriptors.opened(self._disk.create, path)
        try:
            if self._disk.write(fd, data) != size:
                raise short_write()
        except BaseException:  # raised again, for the writer to count: of such a file nobody would know
            try:  # noqa: SIM105 - as in close: nothing may raise before the file is gone
                os.unlink(path)
            except OSError:
                pass
            try:  # noqa: SIM105 - as in close
                descriptors.close(self._disk.close, fd, path)
            except OSError:
                pass
            raise
        self.fd, self.seed, self.offset = fd, header.seed, size

    def write(self, payload: bytes) -> None:
        """Append one event.

        Raises:
            OSError: the disk did not take it; ``settle`` removes what it took of it.
        """
        data = frame.pack(payload, self.seq & frame.SEQUENCE_MASK, self.seed)
        written = self._disk.write(self.fd, data)
        if written != len(data):
            written += self._disk.write(self.fd, data[written:])  # says why: no room, or a file that is large enough
        if written != len(data):
            raise short_write()
        self.seq += 1  # no call between this and the next line: nothing can interrupt here
        self.offset += written
        if self._remember:
            self.unsynced.append(payload)

    def settle(self) -> bytes | None:
        """Look behind the last frame that was counted: count an event, cut off the beginning of one; return the event.

        A closing frame is returned too, and not counted.

        Raises:
            TornFrame: the beginning of one cannot be cut off.
            OSError: the file cannot be read.
        """
        tail = self._tail()
        found = frame.unpack(tail, 0, self.seed)
        if found is None:
            if tail:
                self._cut_off()
            return None
        if not is_closing(found.payload):
            self.seq += 1  # as in write
            self.offset += found.end
            if self._remember:
                self.unsynced.append(found.payload)
        return found.payload

    def _cut_off(self) -> None:
        try:
            self._disk.truncate(self.fd, self.offset)
        except OSError as error:
            if is_foreign(error):
                raise
            raise TornFrame(error.errno, "the beginning of an event cannot be cut off") from error

    def _tail(self) -> bytes:
        if os.fstat(self.fd).st_size <= self.offset:
            return b""
        return os.pread(self.fd, frame.MAX_PAYLOAD + frame.LONG_OVERHEAD, self.offset)

    def end(self, *, rotated: bool) -> bool:
        """Write the closing frame; return False when the disk failed, and the reader takes its writer for dead.

        Args:
            rotated: the same writer goes on in its next segment.
        """
        closing = frame.pack(encode(SegmentClosed(rotated)), self.seq & frame.SEQUENCE_MASK, self.seed)
        try:
            written = self._disk.write(self.fd, closing)
            if 0 < written < len(closing):
                self._disk.truncate(self.fd, self.offset)
        except OSError as error:
            if is_foreign(error):
                raise
            return False
        return True

    def lay_by(self) -> None:
        """Give the descriptor back, before the file was synced."""
        self.laid_by = True
        self.close()

    def close(self) -> None:
        """Give the descriptor back, once; it is gone whatever the disk says."""
        try:
            descriptors.close(self._disk.close, self.fd, self._path)
        except OSError as error:
            if is_foreign(error):
                raise


def is_closing(payload: bytes) -> bool:
    """Return whether a payload is that of a closing frame."""
    try:
        return isinstance(decode(payload), SegmentClosed)
    except msgspec.DecodeError:
        return False
