"""Rounds of syncing: what one writer has written so far is made durable, and no logging call waits for it.

A round first notes, alone with the writer's events, what is dirty; then it syncs without that, since an fsync can take
seconds; and last, alone again, it notes what has become of it. Names come last: they are of files whose data is there.

A durable event must not name a copied file that is not durable. So copies come first in a round; and since a sync
takes along what was written while it waited, an event whose copy came too late for a round goes to another segment
than the one that the round syncs, and than one that is lent to another process, which may sync it at any time. A copy
that the program has no descriptor left for is tried again with each round; that all other events are durable is worth
more meanwhile. So are copies and names to which a round did not come because something was raised in the middle of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from mlflow_outbox.ending import is_stuck
from mlflow_outbox.spool.segment import Segment
from mlflow_outbox.spool.sequence import EventSequence
from mlflow_outbox.spool.snapshot import SnapshotStore

T = TypeVar("T")


class Alone(Protocol):
    """Does some work on a writer's events while nobody else touches them."""

    def __call__(self, work: Callable[[], T]) -> T:
        """Return what the work returns."""
        ...


class _Dirt(NamedTuple):
    """What one round has to make durable."""

    segment: Segment
    offset: int
    number: int
    events: int
    is_dirty: bool
    copies: list[tuple[SnapshotStore, str]]
    names: bool
    retired: list[Segment]


class SyncRound:
    """Makes one writer's events durable; one round at a time, of whichever thread asks.

    Args:
        sequence: the events.
        folders: where the names of their files are, the innermost first.
    """

    def __init__(self, sequence: EventSequence, *folders: Path) -> None:
        self._sequence = sequence
        self._folders = folders
        self._lock = threading.RLock()  # a signal handler may ask for a round in the middle of one
        self._running = False
        #: The one that another process may sync at any time.
        self._lent: Segment | None = None
        self._copies: list[tuple[SnapshotStore, str]] = []

    @property
    def is_clean(self) -> bool:
        """Whether no copied file waits for the next round."""
        return not self._copies

    @property
    def is_behind(self) -> bool:
        """Whether so much was written since the last round that the next one should not be late."""
        live = self._sequence.live
        return live.offset - live.synced >= self._sequence.step

    @property
    def steady_segment(self) -> str:
        """The live segment, as ``<run>/<file name>``, if all but what it gets from now on is durable; else nothing."""
        sequence, live = self._sequence, self._sequence.live
        pending = sequence.retired or sequence.ring or sequence.unsynced_names or sequence.unannounced
        if pending or sequence.suspect or self._copies or live.fd < 0 or live.tainted or not live.synced:
            return ""
        return f"{live.path.parent.name}/{live.path.name}"

    def lend(self) -> str:
        """Return the steady segment, for another process to sync from now on, or nothing; see ``steady_segment``."""
        name, live = self.steady_segment, self._sequence.live
        if not name:
            return ""
        self._lent = live  # first this, then another look: who adds a copy looks in the opposite order
        return name if name == self.steady_segment else ""

    def add_copy(self, store: SnapshotStore, sha256: str) -> None:
        """Leave a copied file to the next round; to be called alone with the events, before the one that names it."""
        self._copies.append((store, sha256))
        if self._sequence.live in (self._sequence.syncing, self._lent):
            self._sequence.end(rotated=True)

    def run(self, alone: Alone, prepare: Callable[[], None]) -> None:
        """Make durable what there is, as far as the disk takes it; return at once in the middle of a round.

        So does a call at the end of the interpreter that has stopped the background in the middle of one.

        Args:
            alone: gets the events for a moment.
            prepare: called with it before anything is noted, to write what waits.
        """
        if is_stuck(self._lock):
            return
        with self._lock:
            if self._running:
                return
            self._running = True
            try:
                self._sync(alone, prepare)
            finally:
                self._running = False
                if self._sequence.syncing is not None:  # something was raised in the middle
                    alone(self._let_go)

    def _sync(self, alone: Alone, prepare: Callable[[], None]) -> None:
        def note() -> _Dirt:
            prepare()
            return self._note()

        dirt = alone(note)
        syncer = self._sequence.syncer
        done: list[tuple[SnapshotStore, str]] = []
        named = not dirt.names
        try:
            done += syncer.copies(dirt.copies)
            for old in dirt.retired:
                self._finish(alone, old)
            if dirt.is_dirty:
                self._sync_live(alone, dirt)
            named = named or syncer.names(*self._folders)
        finally:
            if not named:
                self._sequence.unsynced_names = True
            if done:
                alone(lambda: self._forget(done))

    def _forget(self, done: list[tuple[SnapshotStore, str]]) -> None:
        kept = {id(copy) for copy in done}
        self._copies = [copy for copy in self._copies if id(copy) not in kept]

    def _note(self) -> _Dirt:
        sequence = self._sequence
        live, copies, names = sequence.live, self._copies[:], sequence.unsynced_names
        is_dirty = live.fd >= 0 and live.offset > live.synced and not live.tainted
        dirt = _Dirt(live, live.offset, live.seq, len(live.unsynced), is_dirty, copies, names, sequence.retired[:])
        sequence.unsynced_names = False
        sequence.syncing = live if is_dirty else None
        return dirt

    def _finish(self, alone: Alone, old: Segment) -> None:
        """Sync and close a complete segment; listed until it is closed, for a fork to close."""
        synced = self._sequence.syncer.segment(old)
        if synced is None:  # the program has no descriptor left for it: the next round finds one
            return
        self._with_what_is_written_again(alone, lambda: self._sequence.finish(old, synced=synced), old.seq)

    def _with_what_is_written_again(self, alone: Alone, work: Callable[[], None], number: int) -> None:
        """Do some work on the events, and sync the segments that it makes for old ones: the round may be the last.

        Args:
            alone: gets the events for a moment.
            work: what is done with them then.
            number: of the first event that is not old: what it names may not be durable yet.
        """
        sequence = self._sequence

        def made() -> list[Segment]:
            before = sequence.retired
            work()
            return [segment for segment in sequence.retired if segment not in before and segment.seq <= number]

        for segment in alone(made):
            self._finish(alone, segment)

    def _sync_live(self, alone: Alone, dirt: _Dirt) -> None:
        segment = dirt.segment
        held = segment.unsynced

        def failed() -> None:
            self._let_go()
            self._sequence.sync_failed(segment)

        if not self._sequence.syncer.data(segment.fd):
            self._with_what_is_written_again(alone, failed, dirt.number)
            return

        def note() -> None:
            segment.synced = max(segment.synced, dirt.offset)
            if held is segment.unsynced:
                del held[: dirt.events]
            self._let_go()

        alone(note)

    def _let_go(self) -> None:
        """Need the segment's descriptor no more; close one that was replaced meanwhile, which nobody else would."""
        sequence, segment = self._sequence, self._sequence.syncing
        if segment is not None and segment is not sequence.live and segment not in sequence.retired:
            segment.close()
        sequence.syncing = None
