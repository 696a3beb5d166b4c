"""Runs of which only the end is on disk: what came first was delivered, kept for the retention time, reclaimed.

Where it was delivered to nothing is missing. Sent anywhere else, or packed for it, such a run would arrive without its
name, its params and its first points, and look whole.

Of a program whose segments are gone in part the others tell, by their numbers. One of which all are gone leaves
nothing on disk; then the run lacks the event with which it began, unless it began in MLflow, and its outbox's ledger,
as long as there is one, knows how far each program was delivered.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from mlflow_outbox.errors import LedgerUnavailable
from mlflow_outbox.spool import provisional
from mlflow_outbox.spool.events import RunStarted
from mlflow_outbox.spool.listing import SegmentFile, first_event
from mlflow_outbox.spool.reader import RunReader
from mlflow_outbox.spool.window import Cursor
from mlflow_outbox_worker.ledger import Ledger
from mlflow_outbox_worker.records import RunRecord


def lost_beginnings(runs: Mapping[str, tuple[Path, ...]], ledgers: Collection[Path] = ()) -> dict[str, int]:
    """Return how many events are not on disk any more of the runs that have lost some; a whole run is not named.

    Args:
        runs: the directories of each run, by run id; what cannot be read is passed over.
        ledgers: directories of the ledgers of the outboxes that the runs are in.

    Returns:
        the runs, each with 0 when nobody knows how many.
    """
    known: dict[str, list[RunRecord]] = {run_id: [] for run_id in runs}
    asked = [run_id for run_id in runs if not provisional.is_room(run_id)]  # each outbox has rooms of the same names
    for path in ledgers:
        with (
            contextlib.suppress(LedgerUnavailable),  # what is on disk tells most of it
            contextlib.closing(Ledger.open(path, read_only=True)) as ledger,
        ):
            for run_id in asked:
                record = ledger.record(run_id)
                known[run_id] += [record] if record is not None else []
    found = {}
    for run_id, folders in runs.items():
        with contextlib.suppress(OSError):
            held = RunReader(*folders).complete_segments()
            lost = sum(segments[0].header.first_seq for segments in held.values())
            lost += sum(cursor.seq for writer, cursor in _delivered(known[run_id]).items() if writer not in held)
            if held and (lost or not _has_beginning(run_id, held.values(), known[run_id])):
                found[run_id] = lost
    return found


def _delivered(records: Sequence[RunRecord]) -> dict[str, Cursor]:
    """Return how far each writer was delivered, by the ledger that says most of it."""
    result: dict[str, Cursor] = {}
    for record in records:
        for writer, cursor in record.cursors.items():
            if writer not in result or cursor.seq > result[writer].seq:
                result[writer] = cursor
    return result


def _has_beginning(run_id: str, written: Iterable[list[SegmentFile]], records: Sequence[RunRecord]) -> bool:
    """Return whether the event with which a run began is on disk, or was never there."""
    if provisional.is_room(run_id):
        return True
    began_here = any(record.remote_id not in {"", run_id} for record in records)
    for first, *_ in written:
        if first.header.remote and not began_here:
            return True  # it began in MLflow, and a program went on with it
        if first.header.first_seq != 0:
            continue
        event = first_event(first)
        if event is None or (isinstance(event, RunStarted) and not event.resumed):
            return True  # damaged perhaps, which is counted and named otherwise
    return False
