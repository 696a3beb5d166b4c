"""What waits in an outbox: how much, since when, why, and who delivers it. Reads only, and disturbs nobody.

Events are counted by their numbers, never read: a backlog of millions takes as long as the last segment of each
writer. For the age of the oldest, one frame of each writer is read.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from mlflow_outbox.counters import described
from mlflow_outbox.errors import LedgerUnavailable, OutboxUnusable
from mlflow_outbox.spool.events import decode
from mlflow_outbox.spool.frame import SEQUENCE_MASK, unpack, wanted
from mlflow_outbox.spool.listing import SegmentFile
from mlflow_outbox.spool.reader import RunReader
from mlflow_outbox.spool.tally import refused
from mlflow_outbox.spool.window import Cursor, unread
from mlflow_outbox_worker.backlog import counted, left
from mlflow_outbox_worker.host_lease import worker_of
from mlflow_outbox_worker.lease import Holder
from mlflow_outbox_worker.ledger import Ledger
from mlflow_outbox_worker.notes import DestinationNote, Pace, destination_note, noted_pace
from mlflow_outbox_worker.records import RunRecord
from mlflow_outbox_worker.retired import Totals

if TYPE_CHECKING:
    from mlflow_outbox.settings import Settings
    from mlflow_outbox.spool.directory import OutboxDirectory

#: Bytes read for the first frame behind a cursor; a longer one is read in a second go.
_PEEK: Final = 4096


@dataclasses.dataclass(frozen=True)
class RunSurvey:
    """What waits of one run.

    Attributes:
        pending, parked: events that wait for the destination, or for a person.
        waiting_bytes: bytes of segments that they take.
        oldest_ms: wall-clock time of the oldest of them in ms; 0 when nothing waits.
        unreadable: segments whose beginning is damaged or of a newer version, so that nothing in them is delivered, or
            that the disk does not give; what waits is counted as one event then.
    """

    run_id: str
    experiment: str
    record: RunRecord | None
    pending: int
    parked: int
    dead: int
    waiting_bytes: int
    oldest_ms: int
    unreadable: int = 0

    @property
    def waiting(self) -> int:
        """Events that wait, parked or not."""
        return self.pending + self.parked

    @property
    def state(self) -> str:
        """One word for how it stands: "parked", "waiting", "dead letters", "done" or "sent"."""
        if self.parked or (self.record is not None and self.record.state == "parked"):
            return "parked"
        if self.pending:
            return "waiting"
        if self.dead:
            return "dead letters"
        return "done" if self.record is not None and self.record.state == "done" else "sent"


@dataclasses.dataclass(frozen=True)
class OutboxSurvey:
    """What waits in one outbox.

    Attributes:
        runs: every run with something on disk that is not filed as delivered, and every run with dead letters.
        holder: who delivers; None when nobody does.
        note: how the destination stood when a worker last noted it.
        pace: how fast events arrived lately; None when it is not known.
        delivered: events that have arrived, of all runs that the ledger knows or has known.
        refused: events that programs refused or lost lately, by reason.
        unread: why the ledger could not be read, so that everything counts as waiting; "" when it could.
        unlisted: why the runs could not be listed, so that what waits is counted as one event; "" when they could.
    """

    path: Path
    destination: str
    runs: list[RunSurvey]
    holder: Holder | None
    note: DestinationNote
    pace: Pace | None
    delivered: int
    at_ms: int
    refused: Mapping[str, int]
    unread: str = ""
    unlisted: str = ""

    @property
    def pending(self) -> int:
        """Events that wait for the destination."""
        return sum(run.pending for run in self.runs) + bool(self.unlisted)

    @property
    def parked(self) -> int:
        """Events that wait for a person."""
        return sum(run.parked for run in self.runs)

    @property
    def dead(self) -> int:
        """Dead letters."""
        return sum(run.dead for run in self.runs)

    @property
    def unreadable(self) -> int:
        """Segments that cannot be read at all; the list of all runs counts as one."""
        return sum(run.unreadable for run in self.runs) + bool(self.unlisted)

    @property
    def waiting_bytes(self) -> int:
        """Bytes of segments that all waiting events take."""
        return sum(run.waiting_bytes for run in self.runs)

    @property
    def oldest_seconds(self) -> float:
        """Age of the oldest waiting event; 0 when nothing waits."""
        oldest = min((run.oldest_ms for run in self.runs if run.oldest_ms), default=0)
        return max(0.0, (self.at_ms - oldest) / 1000) if oldest else 0.0

    @property
    def last_error(self) -> str:
        """What keeps events from arriving: of the destination, else of the run that failed last; "" for nothing."""
        if self.note.state != "ok":
            return self.note.reason
        failed = [run.record for run in self.runs if run.record is not None and run.record.reason]
        return max(failed, key=lambda record: record.failed_at_ms).reason if failed else ""

    @property
    def rate(self) -> float:
        """Events that arrive in a second at present; 0 when none do or it is not known."""
        return self.pace.rate(self.at_ms) if self.pace is not None and self.holder is not None else 0.0

    @property
    def eta_seconds(self) -> float | None:
        """When everything will have arrived at this rate; None when that cannot be told."""
        return self.pending / self.rate if self.pending and self.rate else None


def survey(directory: OutboxDirectory, settings: Settings, *, now_ms: int | None = None) -> OutboxSurvey:
    """Look at an outbox.

    Args:
        directory: the outbox.
        settings: where its ledger is.
        now_ms: wall-clock milliseconds since the epoch; None is now.
    """
    records: dict[str, RunRecord] = {}
    letters: Mapping[str, int] = {}
    note, pace, unread, unlisted, retired = DestinationNote("ok"), None, "", "", Totals()
    try:
        ledger = Ledger.open(directory.ledger_in(settings.ledger_dir), read_only=True)
        records, retired = counted(ledger)
        letters = ledger.dead_letter_counts()
        note, pace = destination_note(ledger), noted_pace(ledger)
    except (LedgerUnavailable, OutboxUnusable) as error:
        unread = str(error)
    parked = note.state == "parked"
    try:
        on_disk = directory.run_ids()
    except OSError as error:  # the other outboxes of a machine are shown all the same
        on_disk, unlisted = [], described(error)
    runs = [_run(directory, run_id, records.get(run_id), letters.get(run_id, 0), parked=parked) for run_id in on_disk]
    runs += [
        RunSurvey(
            run_id, records[run_id].experiment if run_id in records else "", records.get(run_id), 0, 0, number, 0, 0
        )
        for run_id, number in letters.items()
        if run_id not in set(on_disk)
    ]
    return OutboxSurvey(
        path=directory.path,
        destination=directory.destination.uri,
        runs=runs,
        holder=worker_of(directory),
        note=note,
        pace=pace,
        delivered=retired.delivered + sum(record.delivered for record in records.values()),
        at_ms=time.time_ns() // 1_000_000 if now_ms is None else now_ms,
        refused=refused(directory.path),
        unread=unread,
        unlisted=unlisted,
    )


def _run(directory: OutboxDirectory, run_id: str, record: RunRecord | None, dead: int, *, parked: bool) -> RunSurvey:
    reader = RunReader(directory.run(run_id))
    cursors = record.cursors if record is not None else {}
    try:
        segments = reader.complete_segments()
        ends = reader.next_numbers(cursors, segments)
    except OSError:  # something waits there, perhaps; how much the disk does not tell
        experiment = record.experiment if record is not None else ""
        return RunSurvey(run_id, experiment, record, 1, 0, dead, 0, 0, len(reader.bad_headers()) or 1)
    some = left(ends, record, parked=parked)
    waiting_bytes = oldest = 0
    experiment = next((held[0].header.experiment for held in segments.values()), record.experiment if record else "")
    if some.pending or some.parked:
        for writer, held in segments.items():
            cursor = cursors.get(writer, Cursor())
            if writer not in ends or not 0 < (ends[writer] - cursor.seq) & SEQUENCE_MASK < 1 << 31:
                continue
            rest = [(s, cursor.offset if s.header.ordinal == cursor.ordinal else 0) for s in unread(held, cursor)]
            waiting_bytes += sum(max(0, _size(segment.path) - max(offset, segment.body)) for segment, offset in rest)
            first = next(filter(None, (_time_of(segment, max(offset, segment.body)) for segment, offset in rest)), 0)
            oldest = min(oldest or first, first or oldest)
    return RunSurvey(
        run_id, experiment, record, some.pending, some.parked, dead, waiting_bytes, oldest, len(reader.bad_headers())
    )


def _time_of(segment: SegmentFile, offset: int) -> int:
    """Return when the event at an offset was logged, or when its segment was begun; 0 when no event is there."""
    try:
        fd = os.open(segment.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        data = os.pread(fd, _PEEK, offset)
        end = wanted(data, 0)
        if end > len(data):
            data = os.pread(fd, end, offset)
    except OSError:
        return segment.header.created_ms
    finally:
        os.close(fd)
    frame = unpack(data, 0, segment.header.seed)
    if frame is None:
        return segment.header.created_ms if data else 0
    try:
        return int(getattr(decode(frame.payload), "time_ms", 0))  # a closing frame has none: look at the next segment
    except msgspec.DecodeError:
        return segment.header.created_ms


def _size(path: Path) -> int:
    try:
        return os.stat(path, follow_symlinks=False).st_size
    except OSError:
        return 0
