"""The journal: how one process writes the events of one run.

Invariants
----------
* ``append`` makes one ``write(2)`` and returns; when it returned True the event is in the page cache (or, with the disk
  failing, in bounded memory) and survives any death of the process.
* No call made by a user waits for an fsync (except at ``sync="always"``, whose meaning that is), for SQLite, for the
  network, or for another process.
* What is written, in which order and under which numbers, is the ``EventSequence``'s business (see ``sequence``); the
  journal decides who may touch it.

Threads, signals, forks
-----------------------
One re-entrant lock per journal orders the threads. A signal handler or a ``__del__`` can interrupt ``append`` inside
the lock in its own thread; such a nested call must neither wait nor disturb the sequence, so it writes to a journal
of its own: another writer of the same run, made on demand. So does a thread that waits for the lock in vain
(``_PATIENCE``). A forked child drops the inherited descriptors and goes on
as a new writer too, and so does the last thread of an interpreter that ends, where another one was stopped inside the
lock (``ending``). So whatever happens, each sequence of numbers has exactly one author.

An exception that a signal handler raises (KeyboardInterrupt, a TimeoutError) can arrive after any of the journal's
calls, between the write and the count above all. The journal then marks its sequence as suspect, by assignments alone,
and the sequence reads back what it wrote before the next event.

When the disk fails
-------------------
A write that fails or is short sends the event to a ring in memory, ``memory_bytes`` large. While the ring holds
anything, new events queue behind it and the disk is tried again by the background sync and, at most every 50 ms, by a
call. A full ring refuses the newest event and counts it.
"""

from __future__ import annotations

import os
import threading
import time
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeVar

from mlflow_outbox.counters import Counters
from mlflow_outbox.ending import is_stuck
from mlflow_outbox.living import Living
from mlflow_outbox.settings import Settings
from mlflow_outbox.spool import frame
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox.spool.disk import SystemDisk, is_foreign, short_write
from mlflow_outbox.spool.events import Event, RunStarted, encode
from mlflow_outbox.spool.identity import RunIdentity
from mlflow_outbox.spool.notices import Notices
from mlflow_outbox.spool.ring import MemoryRing
from mlflow_outbox.spool.sequence import EventSequence, Means
from mlflow_outbox.spool.snapshot import Hold, SnapshotStore
from mlflow_outbox.spool.sync_round import SyncRound

if TYPE_CHECKING:
    from mlflow_outbox.spool.registry import Registry

T = TypeVar("T")

_short = frame._SHORT.pack  # noqa: SLF001 - the logging call inlines frame.pack: a call less is a tenth of its time
_crc_pack = frame._CRC.pack  # noqa: SLF001 - as above
_crc32 = zlib.crc32
_ESCAPE: Final = 0xFFFF
#: Seconds after which a call leaves a lock to the thread that has it, which may wait for this one: it says a warning,
#: for which it needs the program's log handler, and that logs to the run just now.
_PATIENCE: Final = 5.0
_OVERHEAD: Final = frame.SHORT_OVERHEAD


class Journal:
    """Appends one process's events of one run to its own segment files.

    Args:
        directory: the outbox.
        run: whose events these are.
        settings: sync level, segment size, memory.
        counters: where losses are counted.
        registry: what looks after the journal in the background; None leaves that to the caller.
        wake: called when a segment was opened, or an event refused for want of room, to let the worker know.
        disk: the system calls.
        clock_ms: wall-clock milliseconds since the epoch, for the segment header.
        refuse: why new events are refused, or None; given the size in bytes of a file that is to be copied, if any.
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
        refuse: Callable[..., str | None] = lambda *_: None,
    ) -> None:
        self.run = run
        self.directory = directory
        self._settings = settings
        self._counters = counters
        self._registry = registry
        self._wake = wake
        self._refuse = refuse
        self._means = Means(directory, run, settings, counters, disk or SystemDisk(), clock_ms, refuse)
        self._write = self._means.disk.write
        self._always = settings.sync == "always"
        self._remember = settings.sync != "os"  # what a failed sync may take is kept for writing it again
        self._beginning = b""  # of the run, while there is no room for it; a forked child's too
        self._reset()
        _journals.add(self)

    def _reset(self) -> None:
        """Begin as a new writer; in a forked child, locks, unsynced events and ``descriptors`` are the parent's."""
        self._lock = threading.RLock()
        self._busy = False
        self._nested: Journal | None = None
        self._closed = False
        self._notices = Notices(self.directory, self._counters, self._registry, self._wake)
        self._holds: list[Hold] = []
        self._sequence = EventSequence(self._means)
        self._round = SyncRound(self._sequence, self.directory.run(self.run.run_id), self.directory.runs)

    def __repr__(self) -> str:
        live = self._sequence.live
        state = "closed" if live.fd < 0 else f"at byte {live.offset} of segment {self._sequence.ordinal}"
        return f"<Journal of run {self.run.run_id}, {live.seq} events, {state}, {len(self._sequence.ring)} in memory>"

    @property
    def writer(self) -> str:
        """The id of this writer among those of the run."""
        return self._sequence.writer

    @property
    def events(self) -> int:
        """Number of events that this writer has written to its segments."""
        return self._sequence.live.seq

    @property
    def in_memory(self) -> int:
        """Number of events that the disk has not taken yet."""
        return len(self._sequence.ring) + (self._nested.in_memory if self._nested else 0)

    @property
    def keeps_free(self) -> int:
        """Bytes of the disk that no copied file may take: below them its events are refused."""
        return self._settings.free_bytes

    @property
    def is_idle(self) -> bool:
        """Whether nothing is left to sync, write or close."""
        return self._sequence.is_clean and self._round.is_clean and (self._nested is None or self._nested.is_idle)

    @property
    def steady_segment(self) -> str:
        """The live segment, as ``<run>/<file name>``, if only what it gets is left to be synced; else nothing."""
        nested = self._nested is not None and not self._nested.is_idle
        if self._settings.sync != "interval" or self._closed or self._busy or self._holds or nested:
            return ""
        return self._round.steady_segment

    def lend(self) -> str:
        """Return the steady segment, for another process to sync from now on, or nothing; see ``steady_segment``."""
        return self._round.lend() if self.steady_segment else ""

    # -- appending

    def append(self, event: Event) -> bool:
        """Write one event; return whether it was kept, on disk or (the disk failing) in memory.

        Raises nothing but what a signal handler raises meanwhile.
        """
        payload = encode(event)
        lock = self._lock
        # Not `with`, which costs 80 ns more, and not before `try`, where an exception would leave the lock held.
        try:
            if not lock.acquire(False):  # noqa: FBT003 - by name it takes longer
                lock = self._awaited()
                if lock is None:
                    return self._append_nested(event)
            if self._busy:
                return self._append_nested(event)
            self._busy = True
            try:
                live = self._sequence.live
                length = len(payload)
                if live.offset >= live.limit or length >= _ESCAPE:
                    return self._append_slowly(payload, event)
                seq = live.seq
                body = _short(seq & 0xFFFFFFFF, length) + payload
                written = self._write(live.fd, _crc_pack(_crc32(body, live.seed)) + body)
                if written != length + _OVERHEAD:
                    raise short_write()
                live.seq = seq + 1  # no call between the two: nothing can interrupt here
                live.offset += written
                if self._remember:
                    live.unsynced.append(payload)
                return True
            except BaseException as error:  # raised again, unless it is the disk's: then ``keep`` counts it
                sequence = self._sequence
                sequence.suspect, sequence.live.limit = True, 0
                if isinstance(error, OSError) and not is_foreign(error):
                    return self._keep(payload, error)
                raise
            finally:
                self._busy = False
        finally:
            try:  # noqa: SIM105 - free where contextlib.suppress costs a microsecond
                lock.release()
            except (RuntimeError, AttributeError):  # it never had the lock: it waited in vain, or was interrupted
                pass

    def _awaited(self) -> Any:
        """Wait for the lock, and return it; None where the thread that has it does not let go of it."""
        self._outlive()
        lock = self._lock
        return lock if lock.acquire(timeout=_PATIENCE) else None

    def _outlive(self) -> None:
        """Become a new writer if another thread was stopped for good inside the lock."""
        if is_stuck(self._lock):
            lost = self.in_memory
            self._reset()
            self._give_up(lost)

    def _append_slowly(self, payload: bytes, event: Event) -> bool:
        if len(payload) > frame.MAX_PAYLOAD:
            self._counters.add("refused_too_large")
            self._counters.warn_once(
                ("too large", self.run.run_id),
                f"mlflow-outbox: an event of {len(payload)} bytes was refused, the most is {frame.MAX_PAYLOAD}",
            )
            return False
        if self._is_full(self._refuse()):
            if type(event) is RunStarted and not self.events:
                self._beginning = payload  # without it what comes later would be a run without a name, not a whole one
            return False
        self._closed = False
        if self._beginning and self._sequence.ring.add(self._beginning):  # which is written first
            self._beginning = b""
        kept = self._sequence.write(payload)
        self._notices.begun(self, self._sequence)
        if self._sequence.ring or self._round.is_behind:
            self._notices.watch(self)
        return kept

    def takes(self, size: int) -> bool:
        """Return whether a file may be copied for an event that is to come; one that may not is counted as refused.

        Args:
            size: of the file in bytes.
        """
        return not self._is_full(self._refuse(size))

    def takes_back(self, size: int) -> None:
        """Let a file that ``takes`` has counted, and that could not be copied, take no room from the next ones."""
        self._refuse(-size)

    def _is_full(self, reason: str | None) -> bool:
        if reason is not None:
            self._notices.full(self, reason)
        return reason is not None

    def _keep(self, payload: bytes, error: OSError) -> bool:
        kept = self._sequence.keep(payload, error)
        self._notices.begun(self, self._sequence)
        self._notices.watch(self)
        return kept

    def _append_nested(self, event: Event) -> bool:
        return self._nested_journal().append(event)

    def _nested_journal(self) -> Journal:
        if self._nested is None:
            made = Journal(**self._means._asdict(), registry=self._registry, wake=self._wake)
            if self._nested is None:  # no call between the two: all threads have the same one
                self._nested = made
        return self._nested

    # -- syncing

    def sync(self) -> None:
        """Make what was appended so far survive a power cut, as far as the disk takes it; called in the background."""
        self._outlive()
        with self._lock:
            if self._busy:
                return  # called by what interrupted an append of this very thread
        self._round.run(self._alone, self._prepare)
        if self._nested is not None:
            self._nested.sync()
        self._let_go()

    def _prepare(self) -> None:
        """Write what waits, and leave what is complete, removed or broken."""
        sequence = self._sequence
        sequence.settle()
        sequence.drain()
        sequence.replace()
        if self._always:
            sequence.sync_now()
        sequence.refresh_limit()
        self._end_closed()

    def _end_closed(self) -> None:
        """End the segment after ``close``, unless events still wait for it."""
        sequence = self._sequence
        if self._closed and sequence.live.fd >= 0 and not sequence.ring:
            sequence.end(rotated=False)
        self._notices.begun(self, self._sequence)

    def sync_later(self, store: SnapshotStore, sha256: str) -> None:
        """Make a copied file survive a power cut with the next background sync; before its event is appended."""
        self._outlive()
        with self._lock:
            if self._busy:
                self._nested_journal().sync_later(store, sha256)
                return
            self._alone(lambda: self._round.add_copy(store, sha256))
        self._notices.watch(self)

    def keep_held(self, hold: Hold) -> None:
        """Keep workers from a run's copies while events wait in memory, of which one may name what the hold is for."""
        if self.in_memory:
            self._holds.append(hold.handed_on())

    def _let_go(self) -> None:
        while self._holds and not self.in_memory:
            try:
                hold = self._holds.pop()
            except IndexError:  # another thread has just let go of the last one
                return
            hold.let_go()

    def _alone(self, work: Callable[[], T]) -> T:
        """Do some work on the sequence under the lock; an exception in the middle makes the sequence suspect."""
        with self._lock:
            self._busy = True
            try:
                return work()
            except BaseException:  # raised again, and so counted by whoever asked; here only the sequence is marked
                self._sequence.suspect, self._sequence.live.limit = True, 0
                raise
            finally:
                self._busy = False

    # -- the end

    def close(self) -> None:
        """Mark the segment as complete, sync it and give its descriptor back; a later append begins a new segment."""
        self._outlive()
        with self._lock:
            self._closed = True  # what this cannot do now, because the disk fails, the background does later
            if self._busy:
                return
            self._alone(self._close)
        self._notices.hurry()
        if self._nested is not None:
            self._nested.close()
        self._let_go()

    def leave(self) -> None:
        """Have the background do what ``close`` does; for a finalizer, which must neither take a lock nor wait."""
        self._closed = True
        self._notices.hurry()
        if self._nested is not None:
            self._nested.leave()

    def _close(self) -> None:
        sequence = self._sequence
        sequence.settle()
        sequence.drain()
        sequence.replace()
        self._end_closed()
        if self._notices.is_unattended:
            sequence.flush_retired()

    def release(self) -> None:
        """Give up what could not be written: count it, so that nothing vanishes without a word."""
        self._outlive()
        with self._lock:
            lost, self._sequence.ring = len(self._sequence.ring), MemoryRing(self._settings.memory_bytes)
        self._give_up(lost)
        if self._nested is not None:
            self._nested.release()
        self._let_go()

    def _give_up(self, lost: int) -> None:
        if lost:
            self._counters.add("lost_in_memory", lost)
            self._counters.warn_once(
                ("lost", self.run.run_id),
                f"mlflow-outbox: the disk never took {lost} events of run {self.run.run_id}; they are lost",
            )


#: All journals of this process, so that a forked child can let go of them.
_journals: Living[Journal] = Living()


def _after_fork_in_child() -> None:
    for journal in _journals.members():
        journal._reset()  # noqa: SLF001 - one class with its fork handler


os.register_at_fork(after_in_child=_after_fork_in_child)
