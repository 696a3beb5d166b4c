"""The journal: how one process writes the events of one run.

Invariants
----------
* ``append`` makes one ``write(2)`` and returns; when it returned True the event is in the page cache (or, with the disk
  failing, in bounded memory) and survives any death of the process.
* A segment file has one writer, is only appended to, and is cut back to a frame boundary when a write was short.
  Sequence numbers rise by one from frame to frame and from segment to segment of a writer.
* No call made by a user waits for an fsync (except at ``sync="always"``, whose meaning that is), for SQLite, for the
  network, or for another process.

Threads, signals, forks
-----------------------
One re-entrant lock per journal orders the threads. A signal handler or a ``__del__`` can interrupt ``append`` inside
the lock in its own thread; such a nested call must neither wait nor disturb the sequence, so it writes to a journal
of its own: another writer of the same run, made on demand. A forked child drops the inherited descriptor and goes on
as a new writer too. So whatever happens, each sequence of numbers has exactly one author.

An exception that a signal handler raises (KeyboardInterrupt) can arrive between the write and the count. The journal
then asks the file how long it is, so that the number of a frame that was written is never given twice.

When the disk fails
-------------------
A write that fails or is short sends the event to a ring in memory, ``memory_bytes`` large. While the ring holds
anything, new events queue behind it (order is kept) and the disk is tried again by the background sync and, at most
every 50 ms, by a call. A full ring refuses the newest event and counts it.

A failed fsync means that the kernel has dropped pages it could not write and will not say so again (Rebello et al.,
ATC 2020),
so the same descriptor is never synced a second time: the segment is retired, a new one is begun, and the payloads
since the last good sync, which are kept in memory for this, are written again under their old sequence numbers. A
reader that has seen them already skips them by number.

The closing frame of a segment counts as no event: it carries the number that the next event will have.

Segment files are called ``<writer>-<ordinal>.log``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
import threading
import time
import weakref
import zlib
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple, Protocol

from mlflow_outbox.counters import Counters
from mlflow_outbox.errors import OutboxUnusable
from mlflow_outbox.settings import Settings
from mlflow_outbox.spool import frame
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox.spool.disk import SystemDisk
from mlflow_outbox.spool.events import Event, SegmentClosed, encode
from mlflow_outbox.spool.snapshot import SnapshotStore

#: After these the descriptor is not worth another try; after others (a full disk above all) it is.
_SEGMENT_GONE: Final = frozenset({errno.EIO, errno.EBADF, errno.EROFS, errno.ESTALE})
#: Seconds between two tries of a logging call at a disk that failed; a full disk answers at once, a dying one may not.
_RETRY_DISK: Final = 0.05

_short = frame._SHORT.pack  # noqa: SLF001 - the logging call inlines frame.pack: a call less is a tenth of its time
_crc_pack = frame._CRC.pack  # noqa: SLF001 - as above
_crc32 = zlib.crc32
_ESCAPE: Final = 0xFFFF


class RunIdentity(NamedTuple):
    """The run that a journal's events belong to; ``remote`` when its id is one that MLflow gave."""

    run_id: str
    experiment: str
    remote: bool = False


class Registry(Protocol):
    """Whoever looks after open journals in the background: syncs them and empties their memory."""

    def watch(self, journal: Journal) -> None:
        """Look after a journal from now on."""
        ...


class Retired(NamedTuple):
    """A segment that is full but not yet synced: its descriptor and the payloads in it since the last sync."""

    fd: int
    payloads: list[bytes]
    first_seq: int


class Journal:
    """Appends one process's events of one run to its own segment files.

    Args:
        directory: the outbox.
        run: whose events these are.
        settings: sync level, segment size, memory.
        counters: where losses are counted.
        registry: what looks after the journal in the background; None leaves that to the caller.
        wake: called when a segment was opened, to let the worker know.
        disk: the system calls.
        clock_ms: wall-clock milliseconds since the epoch, for the segment header.
    """

    def __init__(
        self,
        directory: OutboxDirectory,
        run: RunIdentity,
        settings: Settings,
        counters: Counters,
        *,
        registry: Registry | None = None,
        wake: Callable[[], None] | None = None,
        disk: SystemDisk | None = None,
        clock_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        refuse: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.run = run
        self.directory = directory
        self._settings = settings
        self._counters = counters
        self._registry = registry
        self._wake = wake
        self._disk = disk or SystemDisk()
        self._write = self._disk.write
        self._clock_ms = clock_ms
        self._refuse = refuse
        self._always = settings.sync == "always"
        self._remember = settings.sync != "os"  # what a failed sync may take is kept for writing it again
        self._reset()
        _journals.add(self)

    def _reset(self) -> None:
        self._lock = threading.RLock()
        self._busy = False
        self._nested: Journal | None = None
        self.writer = secrets.token_hex(8)
        self._ordinal = 0
        self._fd = -1
        self._path: Path | None = None
        self._seed = 0
        self._seq = 0
        self._offset = 0
        self._limit = 0
        self._synced = 0  # offset up to which the segment is known to be durable
        self._unsynced: list[bytes] = []
        self._retired: list[Retired] = []
        self._new_names = False
        self._copies: list[tuple[SnapshotStore, str]] = []
        self._ring: deque[bytes] = deque()
        self._ring_bytes = 0
        self._try_again = 0.0

    def __repr__(self) -> str:
        state = "closed" if self._fd < 0 else f"at byte {self._offset} of segment {self._ordinal}"
        return f"<Journal of run {self.run.run_id}, {self._seq} events, {state}, {len(self._ring)} in memory>"

    @property
    def events(self) -> int:
        """Number of events that this writer has written to its segments."""
        return self._seq

    @property
    def in_memory(self) -> int:
        """Number of events that the disk has not taken yet."""
        return len(self._ring) + (self._nested.in_memory if self._nested else 0)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is left to sync, write or close."""
        clean = self._fd < 0 and not self._retired and not self._ring and not self._new_names and not self._copies
        return clean and (self._nested is None or self._nested.is_idle)

    def append(self, event: Event) -> bool:
        """Write one event; return whether it was kept, on disk or (the disk failing) in memory.

        Raises nothing but what a signal handler raises meanwhile.
        """
        payload = encode(event)
        lock = self._lock
        lock.acquire()
        try:
            if self._busy:
                return self._append_nested(event)
            self._busy = True
            try:
                length = len(payload)
                if self._offset >= self._limit or length >= _ESCAPE or self._ring:
                    return self._append_slowly(payload)
                seq = self._seq
                body = _short(seq & 0xFFFFFFFF, length) + payload
                data = _crc_pack(_crc32(body, self._seed)) + body
                written = self._write(self._fd, data)
                self._seq = seq + 1
                self._offset += written
                if written != len(data):
                    self._seq = seq
                    return self._cut_short(payload, written)
                if self._remember:
                    self._unsynced.append(payload)
                    if self._always:
                        self._sync_now()
                return True
            except OSError as error:
                return self._keep(payload, error)
            except BaseException:
                self._interrupted()
                raise
            finally:
                self._busy = False
        finally:
            lock.release()

    def sync(self) -> None:
        """Make everything appended so far survive a power cut, as far as the disk takes it; called in the background."""
        with self._lock:
            if self._busy:
                return
            self._busy = True
            try:
                self._drain_ring()
                self._refresh_limit()
                fd, offset, payloads = self._fd, self._offset, self._unsynced
                first_seq = self._seq - len(payloads)
                retired, self._retired = self._retired, []
                names, self._new_names = self._new_names, False
                copies, self._copies = self._copies, []
                dirty = fd >= 0 and offset > self._synced
                removed = fd >= 0 and _is_unlinked(fd)
                if dirty or removed:
                    self._unsynced = []
            finally:
                self._busy = False
        # Copies first: a durable event must not name a file that is not. And all of it without the lock: an fsync can take seconds,
        # and a logging call must not wait for it.
        for store, sha256 in copies:
            try:
                store.sync(sha256)
            except OSError:
                self._counters.add("sync_errors")
        for old in retired:
            if not self._datasync(old.fd):
                self._rewrite(old.payloads, old.first_seq)
            with contextlib.suppress(OSError):
                self._disk.close(old.fd)
        if removed:
            self._counters.add("segments_removed")
            self._retire_and_rewrite(fd, payloads, first_seq)
        elif dirty:
            if self._datasync(fd):
                self._synced = max(self._synced, offset) if fd == self._fd else self._synced
            else:
                self._retire_and_rewrite(fd, payloads, first_seq)
        if names:
            self._sync_names()
        if self._nested is not None:
            self._nested.sync()

    def sync_later(self, store: SnapshotStore, sha256: str) -> None:
        """Make a copied file survive a power cut with the next background sync."""
        with self._lock:
            self._copies.append((store, sha256))
        if self._registry is not None:
            self._registry.watch(self)

    def close(self) -> None:
        """Mark the segment as complete, sync it and give its descriptor back; a later append begins a new segment."""
        with self._lock:
            if self._busy:
                return
            self._busy = True
            try:
                self._drain_ring()
                if self._fd >= 0:
                    self._end_segment(rotated=bool(self._ring))
            finally:
                self._busy = False
        if self._nested is not None:
            self._nested.close()

    def release(self) -> None:
        """Give up what could not be written: count it, so that nothing vanishes without a word."""
        with self._lock:
            lost, self._ring, self._ring_bytes = len(self._ring), deque(), 0
        if lost:
            self._counters.add("lost_in_memory", lost)
            self._counters.warn_once(
                ("lost", self.run.run_id),
                f"mlflow-outbox: the disk never took {lost} events of run {self.run.run_id}; they are lost",
            )

    # -- the slow paths; all of them under the lock with _busy set, unless they say otherwise

    def _append_slowly(self, payload: bytes) -> bool:
        if len(payload) > frame.MAX_PAYLOAD:
            self._counters.add("refused_too_large")
            self._counters.warn_once(
                ("too large", self.run.run_id),
                f"mlflow-outbox: an event of {len(payload)} bytes was refused, the most is {frame.MAX_PAYLOAD}",
            )
            return False
        reason = self._refuse()
        if reason is not None:
            self._counters.add("refused_full")
            self._counters.warn_once("full", f"mlflow-outbox: new events are refused: {reason}")
            return False
        if self._ring:
            if time.monotonic() >= self._try_again:
                self._drain_ring()
            if self._ring:
                return self._remember_in_ring(payload)
        try:
            if self._fd >= 0 and self._offset >= self._settings.segment_bytes:
                self._rotate()
            if self._fd < 0:
                self._open_segment()
            self._refresh_limit()
        except OSError as error:
            return self._keep(payload, error)
        try:
            self._write_frame(payload)
        except OSError as error:
            return self._keep(payload, error)
        return True

    def _write_frame(self, payload: bytes) -> None:
        data = frame.pack(payload, self._seq & frame.SEQUENCE_MASK, self._seed)
        written = self._write(self._fd, data)
        self._offset += written
        if written != len(data):
            self._cut_back(written)
            msg = "the disk is full: a write was short"
            raise OSError(errno.ENOSPC, msg)
        self._seq += 1
        if self._remember:
            self._unsynced.append(payload)
            if self._always:
                self._sync_now()

    def _cut_short(self, payload: bytes, written: int) -> bool:
        self._cut_back(written)
        return self._keep(payload, OSError(errno.ENOSPC, "the disk is full: a write was short"))

    def _cut_back(self, written: int) -> None:
        """Take the beginning of a frame off the file again, or leave the segment for good when that fails too."""
        try:
            self._disk.truncate(self._fd, self._offset - written)
            self._offset -= written
        except OSError:
            self._counters.add("torn_frames_left")
            self._abandon_segment()

    def _keep(self, payload: bytes, error: OSError) -> bool:
        self._counters.add("disk_errors")
        self._counters.warn_once(
            "disk",
            f"mlflow-outbox: {self.directory.path} cannot be written ({error.strerror or error}); "
            f"up to {self._settings.memory_bytes} bytes of events per run wait in memory",
        )
        self._try_again = time.monotonic() + _RETRY_DISK
        if isinstance(error, OutboxUnusable) or error.errno in _SEGMENT_GONE:
            self._abandon_segment()
        return self._remember_in_ring(payload)

    def _remember_in_ring(self, payload: bytes) -> bool:
        if self._ring_bytes + len(payload) > self._settings.memory_bytes:
            self._counters.add("refused_disk")
            self._counters.warn_once(
                "refused_disk", "mlflow-outbox: the disk fails and the memory kept for that is full; events are refused"
            )
            return False
        self._ring.append(payload)
        self._ring_bytes += len(payload)
        if self._registry is not None:
            self._registry.watch(self)
        return True

    def _drain_ring(self) -> None:
        if not self._ring:
            return
        try:
            if self._fd < 0:
                self._open_segment()
            while self._ring:
                if self._offset >= self._settings.segment_bytes:
                    self._rotate()
                    self._open_segment()
                self._write_frame(self._ring[0])
                self._ring_bytes -= len(self._ring.popleft())
        except OSError as error:
            self._counters.add("disk_errors")
            self._try_again = time.monotonic() + _RETRY_DISK
            if isinstance(error, OutboxUnusable) or error.errno != errno.ENOSPC:
                self._abandon_segment()
            return
        self._counters.forget("disk")
        self._counters.forget("refused_disk")
        self._refresh_limit()

    def _refresh_limit(self) -> None:
        """Set the offset at which the next append takes the slow path."""
        if self._fd < 0 or self._refuse() is not None:
            self._limit = 0
            return
        if self._offset - self._synced > self._settings.memory_bytes and self._unsynced:
            # The disk does not keep up with syncing: what is held for a failed sync must not grow without bound.
            self._counters.add("unprotected_by_sync", len(self._unsynced))
            self._unsynced = []
        self._limit = self._settings.segment_bytes
        if self._remember:
            self._limit = min(self._limit, self._offset + max(self._settings.memory_bytes, 4096))

    def _open_segment(self, *, first_seq: int | None = None) -> None:
        run = self.run
        folder = self.directory.make_run(run.run_id)
        path = folder / f"{self.writer}-{self._ordinal:06d}.log"
        seed = frame.new_seed()
        header = frame.pack_header(
            frame.SegmentHeader(
                run_id=run.run_id,
                experiment=run.experiment,
                writer=self.writer,
                ordinal=self._ordinal,
                first_seq=(self._seq if first_seq is None else first_seq) & frame.SEQUENCE_MASK,
                seed=seed,
                created_ms=self._clock_ms(),
                remote=run.remote,
                host=_host(),
                boot_id=_boot_id(),
                pid=os.getpid(),
            )
        )
        fd = self._disk.create(path)
        self._ordinal += 1
        try:
            if self._write(fd, header) != len(header):
                msg = "the disk is full: a header was cut short"
                raise OSError(errno.ENOSPC, msg)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(path)
            with contextlib.suppress(OSError):
                self._disk.close(fd)
            raise
        self._fd, self._path, self._seed, self._offset, self._synced = fd, path, seed, len(header), 0
        self._new_names = True
        if self._always:
            self._sync_names()
        if self._registry is not None:
            self._registry.watch(self)
        with contextlib.suppress(OSError):  # a worker that is not told finds the segment at its next full look
            self.directory.ring(run.run_id)
        if self._wake is not None:
            self._wake()

    def _rotate(self) -> None:
        self._end_segment(rotated=True)

    def _end_segment(self, *, rotated: bool) -> None:
        closing = frame.pack(encode(SegmentClosed(rotated)), self._seq & frame.SEQUENCE_MASK, self._seed)
        try:
            written = self._write(self._fd, closing)
            if 0 < written < len(closing):
                self._disk.truncate(self._fd, self._offset)
        except OSError:
            self._counters.add("segments_not_closed")  # the reader takes it for the segment of a writer that died
        payloads, self._unsynced = self._unsynced, []
        self._retired.append(Retired(self._fd, payloads, self._seq - len(payloads)))
        self._fd, self._limit = -1, 0
        if self._registry is None or self._settings.sync != "interval":
            self._flush_retired()

    def _flush_retired(self) -> None:
        """Sync and close full segments here and now, where no background sync does."""
        retired, self._retired = self._retired, []
        for old in retired:
            if self._settings.sync != "os" and not self._datasync(old.fd):
                self._rewrite(old.payloads, old.first_seq)
            with contextlib.suppress(OSError):
                self._disk.close(old.fd)

    def _abandon_segment(self) -> None:
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                self._disk.close(self._fd)
        self._fd, self._limit = -1, 0
        self._unsynced = []

    def _append_nested(self, event: Event) -> bool:
        if self._nested is None:
            self._nested = Journal(
                self.directory,
                self.run,
                self._settings,
                self._counters,
                registry=self._registry,
                wake=self._wake,
                disk=self._disk,
                clock_ms=self._clock_ms,
                refuse=self._refuse,
            )
        return self._nested.append(event)

    def _interrupted(self) -> None:
        """Find out whether the frame that an exception interrupted was written, and count it if so."""
        if self._fd < 0:
            return
        try:
            size = os.fstat(self._fd).st_size
        except OSError:
            self._abandon_segment()
            return
        if size > self._offset:
            self._seq += 1
            self._offset = size
            self._unsynced = []  # its payload is not at hand, and the list must stay the tail of the sequence

    # -- syncing

    def _sync_now(self) -> None:
        payloads, self._unsynced = self._unsynced, []
        if self._datasync(self._fd):
            self._synced = self._offset
            return
        self._abandon_segment()
        self._rewrite(payloads, self._seq - len(payloads))

    def _datasync(self, fd: int) -> bool:
        if self._settings.sync == "os":
            return True
        try:
            self._disk.datasync(fd)
        except OSError as error:
            self._counters.add("sync_errors")
            self._counters.warn_once(
                "sync",
                f"mlflow-outbox: the disk could not sync a segment of run {self.run.run_id} "
                f"({error.strerror or error}); its last events are written again to a new one",
            )
            return False
        return True

    def _sync_names(self) -> None:
        try:
            self._disk.sync_directory(self.directory.run(self.run.run_id))
            self._disk.sync_directory(self.directory.runs)
        except OSError:
            self._counters.add("sync_errors")

    def _retire_and_rewrite(self, fd: int, payloads: list[bytes], first_seq: int) -> None:
        """Leave a segment whose sync failed, and write again what may be lost with it. Takes the lock itself."""
        with self._lock:
            if fd != self._fd:
                return  # rotated meanwhile; its own sync will find the same error
            self._busy = True
            try:
                payloads = payloads + self._unsynced
                self._abandon_segment()
                self._rewrite(payloads, first_seq)
            finally:
                self._busy = False

    def _rewrite(self, payloads: list[bytes], first_seq: int) -> None:
        """Write payloads again under their old numbers, into a new segment; count those that cannot be."""
        if not payloads:
            return
        with self._lock:
            behind = self._seq - (first_seq + len(payloads))
            seq, fd = self._seq, self._fd
            if fd >= 0 or behind > 0:
                # Later events are in a segment already; the old ones get a segment to themselves, sorted by first number.
                self._write_aside(payloads, first_seq)
                return
            self._seq = first_seq
            try:
                self._open_segment()
                for payload in payloads:
                    self._write_frame(payload)
            except OSError:
                self._counters.add("unsynced_not_rewritten", len(payloads) - (self._seq - first_seq))
                self._abandon_segment()
                self._seq = seq
            else:
                self._counters.add("rewritten_after_sync_error", len(payloads))
                self._refresh_limit()

    def _write_aside(self, payloads: list[bytes], first_seq: int) -> None:
        held = (self._fd, self._path, self._seed, self._offset, self._synced, self._seq, self._limit, self._unsynced)
        self._unsynced = []
        written = 0
        try:
            self._seq = first_seq
            self._open_segment()
            for payload in payloads:
                self._write_frame(payload)
                written += 1
            aside = self._fd
            self._datasync(aside)
            with contextlib.suppress(OSError):
                self._disk.close(aside)
            self._counters.add("rewritten_after_sync_error", written)
        except OSError:
            self._counters.add("unsynced_not_rewritten", len(payloads) - written)
        finally:
            self._fd, self._path, self._seed, self._offset, self._synced, self._seq, self._limit, self._unsynced = held


#: All journals of this process, so that a forked child can let go of them.
_journals: weakref.WeakSet[Journal] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    """Make every journal a new writer: the inherited descriptors, locks and unsynced events are the parent's."""
    for journal in list(_journals):
        fds = [journal._fd, *(old.fd for old in journal._retired)]  # noqa: SLF001 - one class with its fork handler
        for fd in fds:
            if fd >= 0:
                with contextlib.suppress(OSError):
                    os.close(fd)
        journal._reset()  # noqa: SLF001 - as above


os.register_at_fork(after_in_child=_after_fork_in_child)


def _is_unlinked(fd: int) -> bool:
    try:
        return os.fstat(fd).st_nlink == 0
    except OSError:
        return True


def _host() -> str:
    return socket.gethostname()


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
