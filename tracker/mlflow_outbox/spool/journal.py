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

An exception that a signal handler raises (KeyboardInterrupt, a TimeoutError) can arrive after any of the journal's
calls, between the write and the count above all. So what belongs together is changed by assignments alone, which
nothing interrupts, and after such an exception the journal trusts nothing but the file: before its next event it reads
back what lies behind the last frame that it counted. The number of a frame that was written is never given twice, and
an event that waits in memory is not written twice.

When the disk fails
-------------------
A write that fails or is short sends the event to a ring in memory, ``memory_bytes`` large. While the ring holds
anything, new events queue behind it (order is kept) and the disk is tried again by the background sync and, at most
every 50 ms, by a call. A full ring refuses the newest event and counts it.

A failed fsync means that the kernel has dropped pages it could not write and will not say so again (Rebello et al.,
ATC 2020), so the same descriptor is never synced a second time: the segment is left, a new one is begun, and the
payloads since the last good sync, which are kept in memory for this, are written again under their old sequence
numbers. A reader that has seen them already skips them by number. When the new segment cannot be synced either, the
next try waits, longer each time, up to a minute: a dying disk must not be filled with copies.

The closing frame of a segment counts as no event: it carries the number that the next event will have.

Segment files are called ``<writer>-<ordinal>.log``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
import weakref
import zlib
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple, Protocol

import msgspec

from mlflow_outbox.counters import Counters
from mlflow_outbox.errors import OutboxUnusable
from mlflow_outbox.settings import Settings
from mlflow_outbox.spool import frame
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox.spool.disk import SystemDisk
from mlflow_outbox.spool.events import Event, SegmentClosed, decode, encode
from mlflow_outbox.spool.snapshot import SnapshotStore
from mlflow_outbox.spool.writer import boot_id

#: After these the descriptor is not worth another try; after others (a full disk above all) it is.
_SEGMENT_GONE: Final = frozenset({errno.EIO, errno.EBADF, errno.EROFS, errno.ESTALE})
#: After these the segment is kept, so that a full disk is not filled with headers.
_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
#: Seconds between two tries of a logging call at a disk that failed; a full disk answers at once, a dying one may not.
_RETRY_DISK: Final = 0.05
#: Seconds before the second try at a disk that cannot sync; doubled for each further one, up to the last.
_RETRY_SYNC: Final = (0.5, 60.0)

#: Modules through which an error of the disk comes.
_OWN_FRAMES: Final = frozenset({"mlflow_outbox", "os", "posixpath", "genericpath", "contextlib", "pathlib"})

_short = frame._SHORT.pack  # noqa: SLF001 - the logging call inlines frame.pack: a call less is a tenth of its time
_crc_pack = frame._CRC.pack  # noqa: SLF001 - as above
_crc32 = zlib.crc32
_ESCAPE: Final = 0xFFFF
_OVERHEAD: Final = frame.SHORT_OVERHEAD


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
    """A segment that is complete but not yet synced: its descriptor and the payloads in it since the last sync."""

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
        self._suspect = False  # an exception arrived in the middle: the file says what was written
        self._nested: Journal | None = None
        self._closed = False
        self.writer = os.urandom(8).hex()
        self._ordinal = 0
        self._fd = -1
        self._path: Path | None = None
        self._seed = 0
        self._seq = 0
        self._newest_first = 0  # largest first number of a segment: the live one's, so that it is read last
        self._offset = 0
        self._limit = 0
        self._ring: deque[bytes] = deque()
        self._ring_bytes = 0
        self._draining: tuple[bytes, int] | None = None  # from the ring to the file: payload, and the number it gets
        self._try_again = 0.0
        self._sync_lock = threading.RLock()
        self._syncing = False
        self._synced = 0  # offset up to which the segment is known to be durable
        self._unsynced: list[bytes] = []  # always the tail of the sequence
        self._retired: list[Retired] = []
        self._tainted = False  # a sync of this segment failed
        self._sync_failures = 0
        self._sync_again = 0.0
        self._new_names = False
        self._copies: list[tuple[SnapshotStore, str]] = []

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
        # Not `with`, which costs 80 ns more, and not before `try`, where an exception would leave the lock held.
        try:
            lock.acquire()
            if self._busy:
                return self._append_nested(event)
            self._busy = True
            try:
                length = len(payload)
                if self._offset >= self._limit or length >= _ESCAPE or self._ring:
                    return self._append_slowly(payload)
                seq = self._seq
                body = _short(seq & 0xFFFFFFFF, length) + payload
                written = self._write(self._fd, _crc_pack(_crc32(body, self._seed)) + body)
                if written != length + _OVERHEAD:
                    raise _short_write()
                self._seq = seq + 1  # no call between the two: nothing can interrupt here
                self._offset += written
                if self._remember:
                    self._unsynced.append(payload)
                    if self._always:
                        self._sync_now()
                return True
            except BaseException as error:
                self._suspect, self._limit = True, 0
                if isinstance(error, OSError) and not _is_foreign(error):
                    return self._keep(payload, error)
                raise
            finally:
                self._busy = False
        finally:
            try:  # noqa: SIM105 - free where contextlib.suppress costs a microsecond
                lock.release()
            except RuntimeError:  # the exception came while this thread waited: it never had the lock
                pass

    def sync(self) -> None:
        """Make what was appended so far survive a power cut, as far as the disk takes it; called in the background."""
        with self._lock:
            if self._busy:
                return  # called by what interrupted an append of this very thread
        with self._sync_lock:
            if self._syncing:
                return
            self._syncing = True
            try:
                self._sync_all()
            finally:
                self._syncing = False
        if self._nested is not None:
            self._nested.sync()

    def _sync_all(self) -> None:
        with self._lock:
            self._busy = True
            try:
                self._settle()
                self._drain_ring()
                self._replace_segment()
                if self._always:
                    self._sync_now()
                self._refresh_limit()
                if self._closed and self._fd >= 0 and not self._ring:
                    self._end_segment(rotated=False)
                fd, offset, held = self._fd, self._offset, self._unsynced
                count = len(held)
                copies, self._copies = self._copies, []
                names, self._new_names = self._new_names, False
                dirty = fd >= 0 and offset > self._synced and not self._tainted
            except BaseException:
                self._suspect, self._limit = True, 0
                raise
            finally:
                self._busy = False
        # Copies first: a durable event must not name a file that is not. And all of it without the lock: an fsync can
        # take seconds, and a logging call must not wait for it.
        for store, sha256 in copies:
            try:
                store.sync(sha256)
            except OSError:
                self._counters.add("sync_errors")
        for old in self._retired[:]:
            self._finish(old)
        if dirty:
            good = self._datasync(fd)
            if good:
                self._synced_until(fd, offset, held, count)
            else:
                self._sync_failed(fd)
        if names:
            self._sync_names()

    def _replace_segment(self) -> None:
        """Leave the segment if it was removed, or if its sync failed and another may be tried by now."""
        removed = self._fd >= 0 and _is_unlinked(self._fd)
        if removed:
            self._counters.add("segments_removed")
        if removed or (self._tainted and time.monotonic() >= self._sync_again):
            self._leave_and_rewrite()

    def _finish(self, old: Retired) -> None:
        """Sync and close a complete segment; outside the lock, and listed until then, for a fork to close."""
        good = self._datasync(old.fd)
        with self._lock:
            self._busy = True
            try:
                self._retired = [other for other in self._retired if other is not old]
                self._close(old.fd)
                if not good:
                    self._rewrite(old.payloads, old.first_seq)
            except BaseException:
                self._suspect, self._limit = True, 0
                raise
            finally:
                self._busy = False

    def _synced_until(self, fd: int, offset: int, held: list[bytes], count: int) -> None:
        with self._lock:
            if fd == self._fd:
                self._synced = max(self._synced, offset)
                if held is self._unsynced:
                    del held[:count]

    def _sync_failed(self, fd: int) -> None:
        """Leave the segment whose sync failed, or that has been completed meanwhile, and write its events again."""
        with self._lock:
            self._busy = True
            try:
                if fd == self._fd:
                    self._tainted = True
                    if time.monotonic() >= self._sync_again:
                        self._leave_and_rewrite()
                    return
                for old in [other for other in self._retired if other.fd == fd]:
                    self._retired = [other for other in self._retired if other is not old]
                    self._close(old.fd)
                    self._rewrite(old.payloads, old.first_seq)
            except BaseException:
                self._suspect, self._limit = True, 0
                raise
            finally:
                self._busy = False

    def sync_later(self, store: SnapshotStore, sha256: str) -> None:
        """Make a copied file survive a power cut with the next background sync."""
        with self._lock:
            self._copies.append((store, sha256))
        if self._registry is not None:
            self._registry.watch(self)

    def close(self) -> None:
        """Mark the segment as complete, sync it and give its descriptor back; a later append begins a new segment."""
        with self._lock:
            self._closed = True  # what this cannot do now, because the disk fails, the background does later
            if self._busy:
                return
            self._busy = True
            try:
                self._settle()
                self._drain_ring()
                if self._fd >= 0 and not self._ring:
                    self._end_segment(rotated=False)
                if self._registry is None:
                    self._flush_retired()
            except BaseException:
                self._suspect, self._limit = True, 0
                raise
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
        if self._nested is not None:
            self._nested.release()

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
            if self._registry is not None:
                self._registry.watch(self)  # so that somebody looks whether there is room again
            return False
        self._settle()
        self._closed = False
        if self._ring:
            if time.monotonic() >= self._try_again:
                self._drain_ring()
            if self._ring:
                return self._remember_in_ring(payload)
        if self._fd >= 0 and self._offset >= self._settings.segment_bytes:
            self._rotate()
        if self._fd < 0:
            self._open_segment()
        self._refresh_limit()
        self._write_frame(payload)
        if self._always:
            self._sync_now()
        return True

    def _write_frame(self, payload: bytes) -> None:
        data = frame.pack(payload, self._seq & frame.SEQUENCE_MASK, self._seed)
        written = self._write(self._fd, data)
        if written != len(data):
            written += self._write(self._fd, data[written:])  # which says why: no room, or a file that is large enough
        if written != len(data):
            self._suspect = True
            self._settle()
            raise _short_write()
        self._seq += 1  # as in append
        self._offset += written
        if self._remember:
            self._unsynced.append(payload)

    def _settle(self) -> bytes | None:
        """Find out what the file holds behind the last frame that was counted; return the event found there, if any.

        An event is counted, the beginning of one is cut off, a closing frame ends the segment. There is nothing to
        find unless an exception arrived in the middle.
        """
        if not self._suspect:
            return None
        payload = None
        if self._fd >= 0:
            try:
                tail = self._tail()
                found = frame.unpack(tail, 0, self._seed)
                if found is None and tail:
                    self._disk.truncate(self._fd, self._offset)
                elif found is not None and _is_closing(found.payload):
                    self._retire_segment()
                elif found is not None:
                    payload = found.payload
                    self._seq += 1  # as in append
                    self._offset += found.end
                    if self._remember:
                        self._unsynced.append(payload)
            except OSError as error:
                if _is_foreign(error):
                    raise
                self._counters.add("torn_frames_left")
                self._retire_segment()
        if self._draining is not None:
            head, number = self._draining
            if self._ring and self._ring[0] is head and self._seq > number:
                self._ring.popleft()
            self._draining = None
        self._suspect = False
        return payload

    def _tail(self) -> bytes:
        """Return the bytes behind the last frame that was counted."""
        if os.fstat(self._fd).st_size <= self._offset or self._path is None:
            return b""
        fd = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            return os.pread(fd, frame.MAX_PAYLOAD + frame.LONG_OVERHEAD, self._offset)
        finally:
            os.close(fd)

    def _keep(self, payload: bytes, error: OSError) -> bool:
        if self._settle() == payload:
            return True  # what failed came after the write
        self._counters.add("disk_errors")
        self._counters.warn_once(
            "disk",
            f"mlflow-outbox: {self.directory.path} cannot be written ({error.strerror or error}); "
            f"up to {self._settings.memory_bytes} bytes of events per run wait in memory",
        )
        self._try_again = time.monotonic() + _RETRY_DISK
        if isinstance(error, OutboxUnusable) or error.errno in _SEGMENT_GONE:
            self._retire_segment()
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
            while self._ring:
                if self._fd >= 0 and self._offset >= self._settings.segment_bytes:
                    self._rotate()
                    continue  # which may have put events of the old segment before these
                if self._fd < 0:
                    self._open_segment()
                head = self._ring[0]
                self._draining = (head, self._seq)
                self._write_frame(head)
                self._ring.popleft()
                self._draining = None
                self._ring_bytes = self._ring_bytes - len(head) if self._ring else 0
        except OSError as error:
            if _is_foreign(error):
                raise
            self._suspect = True
            self._settle()
            self._counters.add("disk_errors")
            self._try_again = time.monotonic() + _RETRY_DISK
            if isinstance(error, OutboxUnusable) or error.errno not in _NO_ROOM:
                self._retire_segment()
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

    def _open_segment(self) -> None:
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
                first_seq=self._seq & frame.SEQUENCE_MASK,
                seed=seed,
                created_ms=self._clock_ms(),
                remote=run.remote,
                host=_host(),
                boot_id=boot_id(),
                pid=os.getpid(),
            )
        )
        newest = max(self._newest_first, self._seq)
        size = len(header)
        self._ordinal += 1  # before the file: what interrupts its creation must not leave a name in the way
        fd = self._disk.create(path)
        try:
            if self._write(fd, header) != size:
                raise _short_write()
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(path)
            self._close(fd)
            raise
        self._fd, self._path, self._seed, self._offset, self._synced = fd, path, seed, size, 0
        self._newest_first, self._tainted, self._new_names = newest, False, True
        if self._always:
            self._sync_names()
        if self._registry is not None:
            self._registry.watch(self)
        with contextlib.suppress(OSError):  # a worker that is not told finds the segment at its next full look
            self.directory.ring(run.run_id)
        if self._wake is not None:
            try:
                self._wake()
            except Exception as error:  # noqa: BLE001 - whatever keeps a worker from starting must not cost an event
                self._counters.add("worker_not_started")
                self._counters.warn_once(
                    "worker", f"mlflow-outbox: no worker could be started ({error!r}); events stay on disk"
                )

    def _rotate(self) -> None:
        self._end_segment(rotated=True)

    def _end_segment(self, *, rotated: bool) -> None:
        closing = frame.pack(encode(SegmentClosed(rotated)), self._seq & frame.SEQUENCE_MASK, self._seed)
        try:
            written = self._write(self._fd, closing)
            if 0 < written < len(closing):
                self._disk.truncate(self._fd, self._offset)
        except OSError as error:
            if _is_foreign(error):
                raise
            self._counters.add("segments_not_closed")  # the reader takes it for the segment of a writer that died
        self._retire_segment()

    def _retire_segment(self) -> None:
        """Leave the segment; it is synced and closed in the background, or here where no background does."""
        if self._fd < 0:
            return
        if self._tainted:
            self._leave_and_rewrite(again=False)
            return
        unsynced: list[bytes] = []
        retired = [*self._retired, Retired(self._fd, self._unsynced, self._seq - len(self._unsynced))]
        self._retired, self._unsynced, self._fd, self._limit = retired, unsynced, -1, 0
        if self._settings.sync != "interval":
            self._flush_retired()

    def _flush_retired(self) -> None:
        """Sync and close complete segments here and now."""
        while self._retired:
            old = self._retired[0]
            good = self._datasync(old.fd)
            self._retired = self._retired[1:]  # nothing between this and closing: never twice, hardly ever not
            self._close(old.fd)
            if not good:
                self._rewrite(old.payloads, old.first_seq)

    def _close(self, fd: int) -> None:
        try:  # noqa: SIM105 - contextlib.suppress makes calls, after which a signal handler could raise
            self._disk.close(fd)
        except OSError:
            pass  # the descriptor is gone all the same

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

    # -- syncing

    def _sync_now(self) -> None:
        """Make the segment durable before the call returns; twice at most, so that it always does return."""
        for _ in range(2):
            if self._tainted and time.monotonic() >= self._sync_again:
                self._leave_and_rewrite()
            if self._tainted or self._fd < 0 or self._offset <= self._synced:
                break
            if self._datasync(self._fd):
                self._synced, self._unsynced = self._offset, []
                return
            self._tainted = True
        if self._tainted:
            self._counters.add("acknowledged_unsynced")

    def _datasync(self, fd: int) -> bool:
        if self._settings.sync == "os":
            return True
        try:
            self._disk.datasync(fd)
        except OSError as error:
            if _is_foreign(error):
                raise
            self._sync_failures += 1
            first, most = _RETRY_SYNC
            pause = 0.0 if self._sync_failures == 1 else min(most, first * 2.0 ** min(self._sync_failures - 2, 10))
            self._sync_again = time.monotonic() + pause
            self._counters.add("sync_errors")
            self._counters.warn_once(
                "sync",
                f"mlflow-outbox: the disk could not sync a segment of run {self.run.run_id} "
                f"({error.strerror or error}); its last events are written again to a new one",
            )
            return False
        if self._sync_failures:
            self._sync_failures, self._sync_again = 0, 0.0
            self._counters.forget("sync")
        return True

    def _sync_names(self) -> None:
        try:
            self._disk.sync_directory(self.directory.run(self.run.run_id))
            self._disk.sync_directory(self.directory.runs)
        except OSError:
            self._counters.add("sync_errors")

    def _leave_and_rewrite(self, *, again: bool = True) -> None:
        """Leave the segment without another sync, and write again what may be lost with it."""
        fd, payloads = self._fd, self._unsynced
        first_seq = self._seq - len(payloads)
        unsynced: list[bytes] = []
        self._fd, self._limit, self._tainted, self._unsynced = -1, 0, False, unsynced
        if fd >= 0:
            self._close(fd)
        self._rewrite(payloads, first_seq, again=again)

    def _rewrite(self, payloads: list[bytes], first_seq: int, *, again: bool = False) -> None:
        """Write payloads again under their old numbers, into a new segment; count those that cannot be.

        Args:
            payloads: events that a segment holds, but perhaps not after a power cut.
            first_seq: number of the first.
            again: even if the disk fails so often that it should be left alone for a while.
        """
        if not payloads:
            return
        if not again and time.monotonic() < self._sync_again:
            self._counters.add("unsynced_not_rewritten", len(payloads))
            return
        if self._fd >= 0 or self._seq > first_seq + len(payloads) or self._newest_first > first_seq:
            # Later events are in a segment already; the old ones get a segment to themselves, sorted by first number.
            self._write_aside(payloads, first_seq)
            return
        ring = deque([*payloads, *self._ring])
        size = sum(map(len, ring))
        self._ring, self._ring_bytes, self._seq, self._draining = ring, size, first_seq, None
        self._counters.add("rewritten_after_sync_error", len(payloads))
        self._drain_ring()  # what the disk does not take now waits in memory

    def _write_aside(self, payloads: list[bytes], first_seq: int) -> None:
        held = (
            self._fd, self._path, self._seed, self._offset, self._synced, self._seq, self._limit, self._unsynced,
            self._tainted,
        )  # fmt: skip
        self._unsynced, self._fd, written = [], -1, 0
        try:
            self._seq = first_seq
            self._open_segment()
            for payload in payloads:
                self._write_frame(payload)
                written += 1
            if self._datasync(self._fd):
                self._counters.add("rewritten_after_sync_error", written)
            else:
                self._counters.add("unsynced_not_rewritten", written)
        except OSError:
            self._counters.add("unsynced_not_rewritten", len(payloads) - written)
        finally:
            aside = self._fd
            (
                self._fd, self._path, self._seed, self._offset, self._synced, self._seq, self._limit, self._unsynced,
                self._tainted,
            ) = held  # fmt: skip
            if aside >= 0:
                self._close(aside)


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


def _is_foreign(error: OSError) -> bool:
    """Return whether an OSError is no answer of the disk but what a signal handler raised, such as a TimeoutError."""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_globals.get("__name__", "").partition(".")[0] not in _OWN_FRAMES:
            return True
        trace = trace.tb_next
    return False


def _short_write() -> OSError:
    return OSError(errno.ENOSPC, "the disk is full: a write was short")


def _is_closing(payload: bytes) -> bool:
    try:
        return isinstance(decode(payload), SegmentClosed)
    except msgspec.DecodeError:
        return False


def _is_unlinked(fd: int) -> bool:
    try:
        return os.fstat(fd).st_nlink == 0
    except OSError:
        return True


def _host() -> str:
    return os.uname().nodename
