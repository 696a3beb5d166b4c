"""Sending delivered runs once more, to a server that was wiped or replaced: their delivery is forgotten.

The ledger forgets first, the files move second: a kill in between leaves a run that is found by the same command again.
Points, params and files that the server has after all do no harm: the run is found by its tag, and what it holds is not
doubled.

A server that lost runs may have other experiments by their ids, and lacks what was made there at the call. So whoever
goes on with such runs, when the command was ended before them, sends them as it would have (``begun``). What programs
log to the new server meanwhile has ids of that one, and is sent as ever.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Final

import msgspec

from mlflow_outbox.errors import LeaseHeld
from mlflow_outbox.settings import Settings
from mlflow_outbox.spool import provisional
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox.spool.frame import SEQUENCE_MASK
from mlflow_outbox.spool.private import check_no_link
from mlflow_outbox.spool.reader import RunReader
from mlflow_outbox.spool.window import Cursor
from mlflow_outbox_worker.copies import Copies
from mlflow_outbox_worker.host_lease import described
from mlflow_outbox_worker.ledger import Ledger
from mlflow_outbox_worker.snapshots import has_all_copies
from mlflow_outbox_worker.sources import Source

#: The worker's note that ids which MLflow gave may have become others.
MOVED: Final = "moved"
#: Under which it notes the models that MLflow has refused to make.
REFUSED: Final = "refused_model"
#: Its note on a run: the number behind the last event of each writer, up to which all is sent once more.
_AGAIN: Final = "again/"


def requeue(source: Source, filed: OutboxDirectory | None, run_ids: Collection[str], settings: Settings) -> None:
    """Let runs be sent from their beginning.

    Args:
        source: where they come from; its lease is held meanwhile.
        filed: the outbox whose delivered runs are brought back; None when nothing may be moved.
        run_ids: the runs.
        settings: where the ledger is.

    Raises:
        LeaseHeld: another worker delivers from the source.
        LedgerUnavailable: the ledger cannot be written.
        OSError: a file could not be moved.
    """
    lease = source.lease("command")
    if not lease.acquire():
        found = lease.other()
        who = described(found) if found is not None else "another worker"
        msg = f"{who} delivers {source.path}; end it first"
        if filed is None:  # what is held is the place, not the runs
            msg = f"another replay to the same place is under way, by {who}; repeat this one afterwards"
        raise LeaseHeld(msg)
    try:
        ledger = Ledger.open(source.ledger_in(settings.ledger_dir))
        with contextlib.closing(ledger):
            ledger.set_meta(MOVED, b"yes")
            for run_id in run_ids:
                letters, record = list(ledger.dead_letters(run_id)), ledger.record(run_id)
                known = record.cursors if record is not None else {}
                if letters and is_whole(RunReader(*source.everywhere(run_id)), known):  # else one may be the last copy
                    for letter in letters:
                        ledger.drop_dead_letter(letter.id)  # what is refused again comes again
                with contextlib.suppress(OSError):  # it cannot be read, and is named when its turn comes
                    ends = RunReader(*source.everywhere(run_id)).next_numbers(known)
                    ledger.set_meta(_AGAIN + run_id, msgspec.msgpack.encode(ends))
                ledger.forget(run_id)
                if filed is not None:
                    bring_back(filed, run_id)
            _forget_ids(source, ledger, run_ids)
    finally:
        lease.release()


def begun(source: Source, ledger: Ledger) -> frozenset[str]:
    """Return the runs of a source that were to be sent once more and have not been; none where everything is.

    Args:
        source: its lease is held.
        ledger: its ledger.

    Raises:
        LedgerUnavailable: the ledger could not be read.
        OSError: the disk does not tell which runs there are.
    """
    if source.again or not ledger.meta(MOVED):
        return frozenset()
    return frozenset(run_id for run_id in source.run_ids() if _is_begun(source, ledger, run_id))


def _is_begun(source: Source, ledger: Ledger, run_id: str) -> bool:
    """Return whether something of a run that was to be sent once more has not been."""
    note = ledger.meta(_AGAIN + run_id)
    if not note:
        return False
    with contextlib.suppress(OSError, ValueError, RecursionError):
        ends = msgspec.msgpack.decode(note, type=dict[str, int])
        record = ledger.record(run_id)
        cursors = record.cursors if record is not None else {}
        return any(
            0 < (ends[writer] - cursors.get(writer, Cursor()).seq) & SEQUENCE_MASK < 1 << 31
            for writer in RunReader(*source.folders(run_id)).segments()  # others were sent, and filed or reclaimed
            if writer in ends
        )
    return False


def _forget_ids(source: Source, ledger: Ledger, run_ids: Collection[str]) -> None:
    """Forget what has become of models and experiments; empty is as good as nothing."""
    names = [f"{kind}/{model}" for model in Copies(source).models for kind in ("model", REFUSED)]
    names += [f"experiment/{provisional.experiment_of(name)}" for name in run_ids if provisional.is_room(name)]
    for name in names:
        if ledger.meta(name):
            ledger.set_meta(name, b"")


def is_whole(reader: RunReader, cursors: Mapping[str, Cursor]) -> bool:
    """Return whether every segment of a run that its cursors have passed is still there, and every file they name.

    Args:
        reader: of all the run's directories.
        cursors: how far each of its writers was delivered.
    """
    segments = reader.segments()
    for writer, cursor in cursors.items():
        there = {segment.header.ordinal for segment in segments.get(writer, ())}
        if not there.issuperset(range(cursor.ordinal + 1)):
            return False
    return has_all_copies(reader)


def bring_back(directory: OutboxDirectory, run_id: str) -> None:
    """Move what was filed of a run to where it is delivered from.

    Raises:
        OSError: a file could not be moved.
    """
    source, target = directory.delivered / run_id, directory.run(run_id)
    if not source.is_dir():
        return
    check_no_link(source, source / "files", target, target / "files")
    for folder in (target, target / "files"):
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, 0o700)
    # Files before the segments that name them.
    for part in ("files", ""):
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(source / part):
                if part or name.endswith(".log"):
                    _bring_back(source / part / name, target / part / name)
    for folder in (source / "files", source):
        with contextlib.suppress(OSError):
            os.rmdir(folder)
    directory.ring(run_id)


def _bring_back(filed: Path, waiting: Path) -> None:
    """Move a file, unless it is there, and as long or longer: a later bundle may have brought more of it."""
    if _size(waiting) < _size(filed):
        os.rename(filed, waiting)
    else:
        os.unlink(filed)


def _size(path: Path) -> int:
    try:
        return os.stat(path, follow_symlinks=False).st_size
    except FileNotFoundError:
        return -1
