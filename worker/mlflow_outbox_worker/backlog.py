"""How much is left to deliver: numbers from the journals against cursors from the ledger. It only reads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from mlflow_outbox.outbox import FlushResult
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox.spool.frame import SEQUENCE_MASK
from mlflow_outbox.spool.reader import RunReader
from mlflow_outbox_worker.ledger import Ledger
from mlflow_outbox_worker.records import RunRecord
from mlflow_outbox_worker.retired import Totals

#: For every run, for every writer, the number that its next event will have.
Targets = dict[str, dict[str, int]]


class Left(NamedTuple):
    """What is left of one run, in events."""

    pending: int
    parked: int


def targets(
    directory: OutboxDirectory,
    records: Mapping[str, RunRecord],
    unread: dict[str, OSError],
    *,
    before: Targets | None = None,
    only: Iterable[str] | None = None,
    suspect: Callable[[str], object] = lambda _: None,
) -> Targets:
    """Return where runs on disk end: at present, or as it was found before, as far as they are still there.

    Args:
        directory: the outbox.
        records: what the ledger holds, by run id.
        unread: gets the runs that the disk does not let be read now, which are left out, and why.
        before: what was returned some time ago; what ``unread`` holds by then is looked at again.
        only: these runs; None means all.
        suspect: told of each of which something could not be read, which ``unreadable`` looks at again.

    Raises:
        OSError: the disk does not tell which runs or segments there are.
    """
    result: Targets = {} if before is None else _remaining(directory, before, records)
    looked_at = [*unread] if before is not None else directory.run_ids() if only is None else only
    unread.clear()
    for run_id in looked_at:
        record, reader = records.get(run_id), RunReader(directory.run(run_id))
        try:
            result[run_id] = reader.next_numbers(record.cursors if record is not None else None)
        except OSError as error:
            unread[run_id] = error
        if run_id in unread or reader.bad_headers():
            suspect(run_id)
    return result


def _remaining(directory: OutboxDirectory, ends: Targets, records: Mapping[str, RunRecord]) -> Targets:
    """Return ends without those of writers of which neither the ledger, read before, nor the disk knows any more.

    They were delivered, read back, reclaimed and retired since the ends were read.
    """
    result: Targets = {}
    for run_id, run_ends in ends.items():
        record = records.get(run_id)
        known = record.cursors.keys() if record is not None else set[str]()
        there = set[str]() if run_ends.keys() <= known else _writers(directory.run(run_id))
        result[run_id] = {writer: end for writer, end in run_ends.items() if writer in known or writer in there}
    return result


def unreadable(directory: OutboxDirectory, run_ids: Iterable[str]) -> int:
    """Return how many segments of some runs cannot be read, so that nothing in them is delivered."""
    number = 0
    for run_id in run_ids:
        reader = RunReader(directory.run(run_id))
        try:
            reader.segments()
        except OSError:  # the run's directory itself: at least one
            number += 1
        number += len(reader.bad_headers())
    return number


def _writers(folder: Path) -> set[str]:
    """Return the writers of which a segment is in a run's directory."""
    try:
        return {name.partition("-")[0] for name in os.listdir(folder)}
    except FileNotFoundError:
        return set()


def left(ends: Mapping[str, int], record: RunRecord | None, *, parked: bool) -> Left:
    """Return what is left of a run up to its ends."""
    events = 0
    for writer, end in ends.items():
        cursor = record.cursors.get(writer) if record is not None else None
        behind = (end - (cursor.seq if cursor is not None else 0)) & SEQUENCE_MASK
        events += behind if behind < 1 << 31 else 0
    return Left(0, events) if parked or (record is not None and record.state == "parked") else Left(events, 0)


def counted(ledger: Ledger) -> tuple[dict[str, RunRecord], Totals]:
    """Return what a ledger holds by run id, and what was counted of retired runs: each run is in one of them.

    Args:
        ledger: a worker may use it meanwhile.

    Raises:
        LedgerUnavailable: it cannot be read now.
    """
    before = ledger.totals()
    while True:
        records = {record.run_id: record for record in ledger.records()}
        totals = ledger.totals()
        if totals == before:
            return records, totals
        before = totals  # some were retired in between


def total(
    ends: Targets, records: Iterable[RunRecord], retired: Totals, letters: Mapping[str, int], *, parked: bool
) -> FlushResult:
    """Return the sums over all runs.

    Args:
        ends: from ``targets``.
        records: what the ledger holds.
        retired: what was counted of runs that are gone.
        letters: how many dead letters each run has now: one that was sent again or dropped is none any more.
        parked: the whole destination waits for a person.
    """
    by_id = {record.run_id: record for record in records}
    parts = [left(run_ends, by_id.get(run_id), parked=parked) for run_id, run_ends in ends.items()]
    return FlushResult(
        delivered=retired.delivered + sum(record.delivered for record in by_id.values()),
        pending=sum(part.pending for part in parts),
        parked=sum(part.parked for part in parts),
        dead=sum(letters.values()),
    )
