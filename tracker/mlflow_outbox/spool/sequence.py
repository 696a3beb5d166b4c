"""One writer's events in their order: in its live segment, in segments that are complete but not synced, in memory.

* Sequence numbers rise by one from frame to frame and from segment to segment; each has exactly one author. The number
  of a frame that was written is never given twice, and an event that waits in memory is not written twice.
* While memory holds anything, new events queue behind it, so that order is kept.
* Payloads are kept until they are synced. When a sync fails the segment is left, a new one is begun, and they are
  written again under their old numbers; a reader that has seen them skips them by number. When later events lie in a
  segment already, the old ones get a segment to themselves, which the reader sorts before the others.
* An exception that a signal handler raises can arrive after any call. What belongs together is changed by assignments
  alone, and afterwards only the file is trusted: ``settle`` reads what lies behind the last frame that was counted.

Segment files are called ``<writer>-<ordinal>.log``. All of this happens under the lock of the journal whose sequence
it is, unless a method says otherwise.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Final, NamedTuple

from mlflow_outbox import stopwatch
from mlflow_outbox.counters import Counters
from mlflow_outbox.errors import OutboxUnusable
from mlflow_outbox.settings import Settings
from mlflow_outbox.spool import descriptors, frame
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox.spool.disk import SystemDisk, is_foreign
from mlflow_outbox.spool.identity import RunIdentity, new_writer
from mlflow_outbox.spool.ring import MemoryRing
from mlflow_outbox.spool.segment import Segment, TornFrame, is_closing
from mlflow_outbox.spool.syncer import Syncer
from mlflow_outbox.spool.writer import boot_id

#: After these the descriptor is not worth another try; after others (a full disk above all) it is.
_SEGMENT_GONE: Final = frozenset({errno.EIO, errno.EBADF, errno.EROFS, errno.ESTALE})
#: After these the segment is kept, so that a full disk is not filled with headers.
_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
#: Complete segments that may wait for a disk that is slow to sync, each with its descriptor and its events.
_MOST_RETIRED: Final = 16
#: Seconds between two tries of a logging call at a disk that failed; a full disk answers at once, a dying one may not.
_RETRY_DISK: Final = 0.05


class Means(NamedTuple):
    """What a writer works with; see ``Journal``, which is given it."""

    directory: OutboxDirectory
    run: RunIdentity
    settings: Settings
    counters: Counters
    disk: SystemDisk
    clock_ms: Callable[[], int]
    refuse: Callable[[], str | None]


class EventSequence:
    """What one writer has logged to one run.

    Args:
        means: the outbox, the run, and what else a writer works with.

    Attributes:
        writer: its id, new for each sequence.
        live: where the next event goes.
        ring: events that the disk has not taken.
        retired: segments that are complete, and neither synced nor closed yet.
        syncer: makes them durable.
        syncing: what a round is about to sync by its descriptor, which nobody else gives back then.
        suspect: an exception arrived in the middle; nothing but the file says what was written.
        unannounced: a segment was begun that the background or the worker was not told of.
        unsynced_names: a segment was begun whose name a power cut may take.
        step: bytes after which a logging call looks whether syncing keeps up.
    """

    def __init__(self, means: Means) -> None:
        self.writer = new_writer()
        self._directory, self._run, self._settings, self._counters, self._disk, self._clock_ms, self._refuse = means
        self._always = self._settings.sync == "always"
        #: What is being written cannot make room for what comes: it takes no large part of a small outbox.
        self._segment_bytes = min(self._settings.segment_bytes, max(4096, self._settings.outbox_bytes // 16))
        self.step = max(self._settings.memory_bytes // 4, 4096)
        self.live = self._place(0)
        self.ring = MemoryRing(self._settings.memory_bytes)
        self.retired: list[Segment] = []
        self.syncer = Syncer(self._disk, self._counters, self._run.run_id, wanted=self._settings.sync != "os")
        self.syncing: Segment | None = None
        self.suspect = False
        self.unannounced = False
        self.unsynced_names = False
        self.ordinal = 0
        self._newest_first = 0  # largest first number of the segments behind: the live one must be read last
        self._try_again = 0.0

    @property
    def is_clean(self) -> bool:
        """Whether nothing is left to write, sync or close."""
        return self.live.fd < 0 and not self.retired and not self.ring and not self.unsynced_names

    # -- writing

    def write(self, payload: bytes) -> bool:
        """Add one event, by the way that rotates, begins segments and waits for the disk; return whether it was kept.

        Raises:
            OSError: the disk did not take it; see ``keep``.
        """
        self.settle()
        if self.ring:
            if stopwatch.seconds() >= self._try_again:
                self.drain()
            if self.ring:
                return self._wait(payload)
        if self.live.fd >= 0 and self.live.offset >= self._segment_bytes:
            self.end(rotated=True)
            if self.ring:  # what the old segment may lose comes before this
                return self._wait(payload)
        if self.live.fd < 0:
            self._begin(self.live)
        self.refresh_limit()
        self.live.write(payload)
        if self._always:
            self.sync_now()
        return True

    def keep(self, payload: bytes, error: OSError) -> bool:
        """Keep an event in memory whose writing failed; return whether it was kept."""
        if self.settle() == payload:
            return True  # what failed came after the write
        self._counters.add("disk_errors")
        self._try_again = stopwatch.seconds() + _RETRY_DISK
        if isinstance(error, OutboxUnusable) or error.errno in _SEGMENT_GONE:
            self._retire()
        kept = self._wait(payload)
        self._counters.warn_once(
            "disk",
            f"mlflow-outbox: {self._directory.path} cannot be written ({error.strerror or error}); "
            f"up to {self._settings.memory_bytes} bytes of events per run wait in memory",
        )
        return kept

    def _wait(self, payload: bytes) -> bool:
        if self.ring.add(payload):
            return True
        self._counters.add("refused_disk")
        self._counters.warn_once(
            "refused_disk", "mlflow-outbox: the disk fails and the memory kept for that is full; events are refused"
        )
        return False

    def drain(self) -> None:
        """Write what waits in memory, as far as the disk takes it."""
        if not self.ring:
            return
        try:
            self._write_ring()
        except OSError as error:
            if is_foreign(error):
                raise
            self.suspect = True
            self.settle()
            self._counters.add("disk_errors")
            self._try_again = stopwatch.seconds() + _RETRY_DISK
            if isinstance(error, OutboxUnusable) or error.errno not in _NO_ROOM:
                self._retire()
            return
        self._counters.forget("disk")
        self._counters.forget("refused_disk")
        self.refresh_limit()

    def _write_ring(self) -> None:
        # A function, for Python 3.13.0 takes the jump at the end of a loop out of the "try" around it.
        while self.ring:
            if self.live.fd >= 0 and self.live.offset >= self._segment_bytes:
                self.end(rotated=True)  # which may put events of the old segment before these
            else:
                if self.live.fd < 0:
                    self._begin(self.live)
                self.live.write(self.ring.send(self.live.seq))
                self.ring.sent()

    def settle(self) -> bytes | None:
        """Find out what the file holds behind the last frame that was counted; return the event found there, if any.

        There is nothing to find unless an exception arrived in the middle.
        """
        if not self.suspect:
            return None
        payload = None
        if self.live.fd >= 0:
            try:
                payload = self.live.settle()
                if payload is not None and is_closing(payload):
                    payload = None
                    self._retire()
            except OSError as error:
                if is_foreign(error):
                    raise
                self._counters.add("torn_frames_left")
                self._retire()
                if not isinstance(error, TornFrame) and self.live.fd < 0 and not self.ring:
                    # What is there under the next number cannot be told: it is left out.
                    self.live = self._place(self.live.seq + 1)
        self.ring.settle(self.live.seq)
        self.suspect = False
        return payload

    def refresh_limit(self) -> None:
        """Set the offset at which the next logging call takes the slow path."""
        live = self.live
        if live.fd < 0 or self._always or self.ring or self.unannounced or self._refuse() is not None:
            live.limit = 0
            return
        if live.offset - live.synced > self._settings.memory_bytes and live.unsynced:
            # The disk does not keep up with syncing: what is held for a failed sync must not grow without bound.
            self._counters.add("unprotected_by_sync", len(live.unsynced))
            live.unsynced = []
        live.limit = self._segment_bytes
        if self._settings.sync != "os":
            live.limit = min(live.limit, live.offset + self.step)

    # -- segments

    def _place(self, seq: int) -> Segment:
        return Segment(self._disk, seq, remember=self._settings.sync != "os", shared=self._directory.network)

    def _begin(self, segment: Segment) -> None:
        run = self._run
        folder = self._directory.make_run(run.run_id)
        path = folder / f"{self.writer}-{self.ordinal:06d}.log"
        header = frame.SegmentHeader(
            run_id=run.run_id,
            experiment=run.experiment,
            writer=self.writer,
            ordinal=self.ordinal,
            first_seq=segment.seq & frame.SEQUENCE_MASK,
            seed=frame.new_seed(),
            created_ms=self._clock_ms(),
            remote=run.remote,
            host=os.uname().nodename,
            boot_id=boot_id(),
            pid=os.getpid(),
        )
        # Before the file: what interrupts its creation must not leave a name in the way.
        self.ordinal, self.unannounced, self.unsynced_names = self.ordinal + 1, True, True
        segment.begin(path, header)
        if self._always:
            self.syncer.names(folder, self._directory.runs)

    def end(self, *, rotated: bool) -> None:
        """Close the live segment with its last frame; one that was removed is replaced before, while that can be told.

        Args:
            rotated: this writer goes on in its next segment.
        """
        if self.live.is_removed:  # by somebody: a worker removes none that is not closed
            self.replace()
            if rotated or self.live.fd < 0 or self.ring:
                return
        if not self.live.end(rotated=rotated):
            self._counters.add("segments_not_closed")
        self._retire()

    def _retire(self) -> None:
        """Leave the segment; it is synced and closed in the background, or here where no background does."""
        if self.live.fd < 0:
            return
        if self.live.is_removed:  # before there is a later one: a reader that has passed these numbers never goes back
            self.replace()
            return
        if self.live.tainted:
            self._leave_and_rewrite(again=False)
            return
        old, newest, place = self.live, self._newest(), self._place(self.live.seq)
        retired = [*self.retired, old]
        self.retired, self._newest_first, self.live = retired, newest, place
        if old is self.syncing:
            return  # the next round closes it
        if len(retired) > _MOST_RETIRED:
            old.close()
            self.retired = retired[:-1]
            self._counters.add("unprotected_by_sync", len(old.unsynced))
        elif self._settings.sync != "interval":
            self.flush_retired()
        elif descriptors.are_many():
            old.lay_by()

    def _newest(self) -> int:
        return max(self._newest_first, self.live.first_seq)

    def flush_retired(self) -> None:
        """Sync and close complete segments here and now."""
        while self.retired:
            old = self.retired[0]
            good = self.syncer.segment(old)
            old.close()
            self.retired = self.retired[1:]  # last: what is interrupted here is done again
            if not good:
                self._rewrite(old.unsynced, old.first_unsynced)

    def replace(self) -> None:
        """Leave the live segment if it was removed, or if its sync failed and another may be tried by now."""
        if self.live.is_removed:
            self._counters.add("segments_removed")
            self._leave_and_rewrite()
        elif self.live.tainted and self.syncer.may_try():
            self._leave_and_rewrite()

    # -- what became of a sync

    def sync_now(self) -> None:
        """Make the live segment durable before the call returns; twice at most, so that it always does return."""
        for _ in range(2):
            self.replace()  # a file without a name can be synced, and keeps nothing
            live = self.live
            if live.tainted or live.fd < 0 or live.offset <= live.synced:
                break
            if self.syncer.data(live.fd):
                live.synced, live.unsynced = live.offset, []
                return
            live.tainted = True
        if self.live.tainted:
            self._counters.add("acknowledged_unsynced")

    def finish(self, old: Segment, *, synced: bool) -> None:
        """Close a complete segment; write again what it may lose.

        Args:
            old: one of ``retired``.
            synced: whether it is durable.
        """
        old.close()
        self.retired = [other for other in self.retired if other is not old]
        if not synced:
            self._rewrite(old.unsynced, old.first_unsynced)

    def sync_failed(self, segment: Segment) -> None:
        """Leave a segment that could not be synced, be it live or complete by now, and write its events again."""
        self.settle()  # a call that was interrupted meanwhile may have written one that is not counted
        if segment is self.live:
            segment.tainted = True
            if self.syncer.may_try():
                self._leave_and_rewrite()
        elif segment in self.retired:
            self.finish(segment, synced=False)

    def _leave_and_rewrite(self, *, again: bool = True) -> None:
        """Leave the segment without another sync, and write again what may be lost with it."""
        old, newest, place = self.live, self._newest(), self._place(self.live.seq)
        self._newest_first, self.live = newest, place
        if old.fd >= 0 and old is not self.syncing:
            old.close()
        self._rewrite(old.unsynced, old.first_unsynced, again=again)

    def _rewrite(self, payloads: list[bytes], first_seq: int, *, again: bool = False) -> None:
        """Write payloads again under their old numbers, into a new segment; count those that cannot be.

        Args:
            payloads: events that a segment holds, but perhaps not after a power cut.
            first_seq: number of the first.
            again: even if the disk fails so often that it should be left alone for a while.
        """
        if not payloads:
            return
        if not again and not self.syncer.may_try():
            self._counters.add("unsynced_not_rewritten", len(payloads))
            return
        live = self.live
        if live.fd >= 0 or live.seq > first_seq + len(payloads) or self._newest_first > first_seq:
            self._write_aside(payloads, first_seq)
            return
        ring, place = self.ring.behind(payloads), self._place(first_seq)
        self.ring, self.live = ring, place
        self._counters.add("rewritten_after_sync_error", len(payloads))
        self.drain()  # what the disk does not take now waits in memory

    def _write_aside(self, payloads: list[bytes], first_seq: int) -> None:
        """Write old events to a segment of their own, which is complete with them; the live one goes on."""
        aside = self._place(first_seq)
        try:
            self._begin(aside)
            self._write_all(aside, payloads)
        except OSError as error:
            if is_foreign(error):
                raise
            self._counters.add("unsynced_not_rewritten", len(payloads) - (aside.seq - first_seq))
            self._cut(aside)
        finally:
            if aside.fd >= 0:
                self.retired = [*self.retired, aside]  # the next round syncs it, for no call is to wait for that
        self._counters.add("rewritten_after_sync_error", aside.seq - first_seq)
        if self._settings.sync != "interval":
            self.flush_retired()

    def _write_all(self, segment: Segment, payloads: list[bytes]) -> None:
        for payload in payloads:  # a function for the reason given in _write_ring
            segment.write(payload)

    def _cut(self, segment: Segment) -> None:
        if segment.fd < 0:
            return
        try:
            segment.settle()
        except OSError:
            self._counters.add("torn_frames_left")
