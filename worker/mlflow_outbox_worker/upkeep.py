"""What a worker does beside delivery: what is delivered is filed, and what was kept long enough is reclaimed.

None of it may hold up delivery. What cannot be moved or deleted is counted, said once, and tried again later; the
other runs are seen to all the same.

* A run that is delivered and read back is filed whole. Of one that goes on the segments that its cursors have passed
  are filed as it goes, also while there is more to send, at a rate at which the checkpoint that comes before costs
  nothing; and the copies of its files that are delivered, once there is nothing more to send. So all that is
  delivered of it, but the segment that is being written, is there to make room.
* A run that nobody has ended is looked at again each hour, for its programs may have ended since, and nothing else
  would ask; so is one of which nobody can tell whether they live, such as one that was killed in a container: after a
  day of silence they count as ended (``writer``).
* Where the ledger cannot be brought into its main file just now (somebody reads it), something new has come in
  meanwhile, or a file cannot be moved, the next try comes after a pause, doubled each time up to minutes.
* Runs go when the retention time has passed since they were read back, segments and copies of runs that go on when it
  has passed since they were filed. Where there is no room they go earlier (``room``). What the ledger holds of a run
  goes after its files, whoever has deleted these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from mlflow_outbox.counters import Counters, printable
from mlflow_outbox.errors import LedgerUnavailable
from mlflow_outbox.settings import Settings
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox.spool.reader import RunReader
from mlflow_outbox.spool.writer import has_left, is_far
from mlflow_outbox_worker.courier import Turn
from mlflow_outbox_worker.ledger import Ledger, LedgerCorrupt
from mlflow_outbox_worker.retention import (
    file_passed,
    file_run,
    passed_segments,
    reclaim,
    reclaim_parts,
    retire,
)
from mlflow_outbox_worker.room import Room
from mlflow_outbox_worker.snapshots import copies_to_file

#: Seconds between two rounds of reclaiming what is past retention.
_RECLAIM: Final = 300.0
#: Seconds between two filings of segments of one run: a checkpoint takes milliseconds.
_FILE: Final = 5.0
#: Seconds between two looks at a run at rest whose programs may have ended without a word.
_LOOK: Final = 3600.0
#: Seconds after a filing that failed, at first and at most.
_AGAIN: Final = 1.0
_AGAIN_MOST: Final = 300.0


class Upkeep:
    """Files and reclaims what was delivered of one outbox; ``file`` may be called by several lanes for different runs.

    Args:
        directory: the outbox; None when nothing of it may be moved or deleted.
        settings: the retention time.
        counters: counts what could not be moved as "filing_errors", what could not be deleted as "reclaim_errors".
        room: told of what was filed.
        now_ms: wall-clock milliseconds since the epoch.
        clock: seconds of a clock that never goes back.
    """

    def __init__(
        self,
        directory: OutboxDirectory | None,
        settings: Settings,
        counters: Counters,
        room: Room,
        *,
        now_ms: Callable[[], int],
        clock: Callable[[], float],
    ) -> None:
        self._directory = directory
        self._settings = settings
        self._counters = counters
        self._room = room
        self._now_ms = now_ms
        self._clock = clock
        self._next_reclaim = float("-inf")
        self._reclaim_pause = 0.0
        #: By run: when it may be filed again, and the pause that was made after a failure.
        self._filings: dict[str, tuple[float, float]] = {}

    def __repr__(self) -> str:
        return f"<Upkeep of {str(self._directory.path) if self._directory else 'nothing'!r}>"

    def begin(self) -> None:
        """Begin anew, with another ledger."""
        self._next_reclaim = float("-inf")
        self._filings.clear()

    # -- reclaiming

    def reclaim(self, ledger: Ledger) -> None:
        """Delete what is past retention, and what the ledger holds of runs that are gone, if it is time to look.

        Raises:
            LedgerUnavailable: the ledger cannot be used now.
        """
        now = self._clock()
        if self._directory is None or now < self._next_reclaim:
            return
        self._next_reclaim = now + _RECLAIM
        errors = self._counters["reclaim_errors"]
        before_ms = self._now_ms() - int(self._settings.retention * 1000)
        try:
            reclaim(self._directory, ledger, before_ms=before_ms, failed=self._stays)
            reclaim_parts(self._directory, ledger, before_ms=before_ms, failed=self._stays)
            retire(self._directory, ledger, now=self._now_ms() / 1000)
        except OSError as error:
            self._stays(error)
        if self._counters["reclaim_errors"] == errors:
            self._reclaim_pause = 0.0
        else:
            self._reclaim_pause = min(_RECLAIM, self._reclaim_pause * 2 or _AGAIN)
            self._next_reclaim = now + self._reclaim_pause

    def _stays(self, error: OSError) -> None:
        self._counters.add("reclaim_errors")
        self._counters.warn_once(
            "reclaim_errors", f"mlflow-outbox: what was delivered cannot be deleted: {printable(str(error), 300)}"
        )

    # -- filing

    def file(self, ledger: Ledger, turn: Turn) -> float:
        """File what a turn has shown to be delivered.

        Returns:
            seconds after which there is something to file; 0 for nothing.

        Raises:
            LedgerCorrupt: the ledger is to be opened anew.
        """
        record, directory = turn.record, self._directory
        if directory is None or not record.remote_id:
            return 0.0
        done = record.state == "done" and any(folder.is_dir() for folder in turn.reader.paths)
        done = done and (not directory.network or all(_have_left(turn.reader)))
        passed = [] if done else passed_segments(turn.reader, record.cursors)
        now = self._clock()
        due, pause = self._filings.get(record.run_id, (now, 0.0))
        looks = not done and turn.progress != "more"
        if now < due and looks:
            return due - now  # which copies are delivered is only looked for when they may be filed
        copies = copies_to_file(directory, ledger, record, turn.reader) if looks else []
        rests = turn.progress == "idle" and record.state != "done" and not record.ended
        later = _LOOK if rests or (turn.progress == "idle" and any(_are_far(turn.reader))) else 0.0
        if not done and not passed and not copies:
            return later
        if now < due:
            return due - now
        try:
            if done:
                filed = file_run(directory, ledger, record.run_id, record.cursors, self._counters)
            else:
                filed = file_passed(directory, ledger, record, passed, self._counters, copies=bool(copies))
        except LedgerCorrupt:
            raise
        except (LedgerUnavailable, OSError) as error:
            self._counters.add("filing_errors")
            self._counters.warn_once(
                "filing_errors", f"mlflow-outbox: what was delivered cannot be filed: {printable(str(error), 300)}"
            )
            filed = False
        if not filed:
            pause = min(_AGAIN_MOST, pause * 2 or _AGAIN)
            self._filings[record.run_id] = now + pause, pause
            return pause
        self._room.filed()
        if done:
            self._filings.pop(record.run_id, None)
            return 0.0
        self._filings[record.run_id] = now + _FILE, 0.0
        return _FILE if copies else later  # they stay where they are while one is being logged


def _have_left(reader: RunReader) -> Iterator[bool]:
    """Yield of each writer of a run whether it has left its last segment."""
    for held in reader.segments().values():
        yield has_left(held[-1].path, held[-1].header)


def _are_far(reader: RunReader) -> Iterator[bool]:
    """Yield of each writer of a run whether only time tells that its program has ended; none for one that is filed."""
    for held in reader.segments().values():
        yield is_far(held[-1].path, held[-1].header)
