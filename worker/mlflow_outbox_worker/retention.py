"""What becomes of a run's files once they are delivered: kept for the retention time, then reclaimed.

Order is everything here. A segment is moved or deleted only after the ledger that says it is delivered is in the
database's main file and synced (``Ledger.checkpoint``): SQLite may lose the end of its write-ahead log in a power cut
without a word, and a ledger that goes back in time must still find the segments it then asks for. And it is recorded
first, unlinked second: a kill in between leaves a file too many, never a record too few.

Of a run that is gone the ledger keeps only what its ids need (``retired``); that is no matter of order, for the ledger
never asks for files of a run that is done.

A file is only ever deleted by its exact name and only if its segment is one that the cursor has passed. Nothing is
deleted by age or by a directory's name alone, and nothing that is being written.

The copies of logged files that are delivered (``snapshots``) are filed with the segments of a run that goes on, while
nobody is in the middle of logging a file to it; of thousands some at a time, for a call that logs one waits meanwhile.
They are looked at once more before they are deleted: the ledger may have been lost since, and then their events are
delivered again.

A disk can be so full that there is no room to make the directory for a run that is to be filed. Then its segments,
which are delivered, are not kept but deleted, as ``room`` would do with them a moment later.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from mlflow_outbox import stopwatch
from mlflow_outbox.counters import Counters
from mlflow_outbox.spool import provisional, reserve, snapshot
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox.spool.disk import is_being_written, is_there
from mlflow_outbox.spool.private import check_no_link
from mlflow_outbox.spool.reader import RunReader
from mlflow_outbox.spool.window import Cursor, unread
from mlflow_outbox.spool.writer import has_left
from mlflow_outbox_worker.ledger import Ledger
from mlflow_outbox_worker.records import RunRecord
from mlflow_outbox_worker.removal import NO_ROOM, remove_run, sweep
from mlflow_outbox_worker.requeue import MOVED
from mlflow_outbox_worker.snapshots import passed_copies

#: Seconds for which an id that MLflow can name itself is remembered after its run was reclaimed: a month.
_REMEMBERED: Final = 30 * 24 * 3600.0
#: Seconds for which copies are moved at once, of the five that a call that logs a file waits for that, and the pause
#: after which the others follow. A rename takes 10 ms and more on some file systems of the network.
_HELD: Final = 1.0
_PAUSE: Final = 0.02
#: Runs retired in one transaction: milliseconds.
_AT_ONCE: Final = 100


def passed_segments(reader: RunReader, cursors: Mapping[str, Cursor]) -> list[Path]:
    """Return the segments that the cursors of a run have passed, so that nobody reads or writes them any more.

    Args:
        reader: of the run's directory.
        cursors: how far each of its writers was delivered.
    """
    return [
        segment.path
        for writer, held in reader.segments().items()
        if writer in cursors
        for segment in held[: len(held) - len(unread(held, cursors[writer]))]
    ]


def file_passed(
    directory: OutboxDirectory,
    ledger: Ledger,
    record: RunRecord,
    passed: Sequence[Path],
    counters: Counters,
    *,
    copies: bool,
) -> bool:
    """Move segments that its cursors have passed, and copies that are delivered, to ``delivered``: the run goes on.

    Args:
        directory: the outbox.
        ledger: says what is delivered, and is made durable first.
        record: of the run, as the ledger has it.
        passed: from ``passed_segments``.
        counters: counts what there was no room to keep.
        copies: whether there are copies to move; which, is found out when nobody can log one. They stay as long as
            somebody does.

    Returns:
        False when the ledger could not be made durable first.

    Raises:
        OSError: a file could not be moved.
    """
    if not ledger.checkpoint():
        return False
    target = _made(directory, directory.delivered / record.run_id)
    _move(passed, target, directory, counters)
    if not copies:
        return True
    source = directory.run(record.run_id)
    while True:
        with snapshot.alone(source / "files") as alone:
            if not alone:
                return True
            free = passed_copies(
                source / "files", RunReader(source), record.cursors, lambda: ledger.dead_letters(record.run_id)
            )
            whole = _move_for_a_while(free, target and _made(directory, target / "files"), directory, counters)
            for name in filter(snapshot.is_draft, os.listdir(source / "files")):
                os.unlink(source / "files" / name)  # its writer died, for nobody else is there
        if whole:
            return True
        time.sleep(_PAUSE)


def file_run(
    directory: OutboxDirectory, ledger: Ledger, run_id: str, cursors: dict[str, Cursor], counters: Counters
) -> bool:
    """Move a run that is wholly delivered to ``delivered``; return False when something new has come in meanwhile.

    Args:
        directory: the outbox.
        ledger: says what is delivered, and is made durable first.
        run_id: the run.
        cursors: how far each of its writers was delivered.
        counters: counts what there was no room to keep.

    Returns:
        False too when there is no room to file it and a person may still send its dead letters.

    Raises:
        OSError: a file could not be moved.
    """
    if not ledger.checkpoint():
        return False
    files = directory.run(run_id) / "files"
    if not files.is_dir():
        return bool(_file_run(directory, ledger, run_id, cursors, counters, files=False))
    while True:
        with snapshot.alone(files) as alone:  # else a file is being logged, and its event comes next
            filed = _file_run(directory, ledger, run_id, cursors, counters, files=True) if alone else False
        if filed is not None:
            return filed
        time.sleep(_PAUSE)


def _file_run(
    directory: OutboxDirectory,
    ledger: Ledger,
    run_id: str,
    cursors: dict[str, Cursor],
    counters: Counters,
    *,
    files: bool,
) -> bool | None:
    """File a run; return None when a part of its copies was moved."""
    source = directory.run(run_id)
    reader = RunReader(source)
    for writer, held in reader.segments().items():
        cursor = cursors.get(writer)
        if cursor is None or any(is_being_written(segment.path) for segment in held):
            return False
        if not has_left(held[-1].path, held[-1].header):
            return False
        last, *later = unread(held, cursor)
        if later or last.header.ordinal != cursor.ordinal:
            return False  # begun since, perhaps closed already: a run that was resumed for a moment
        if last.path.stat().st_size > cursor.offset:
            return False
    if reader.bad_headers():
        return False  # a person may want to look; doctor names it
    paths = [segment.path for held in reader.segments().values() for segment in held]
    target = _made(directory, directory.delivered / run_id)
    if target is None:
        if run_id in ledger.dead_letter_counts():
            return False
        _delete(paths, directory, counters)
        paths = []
        # Copied files are never deleted here: a run that goes on just now may name one that is among them.
        target = _made(directory, directory.delivered / run_id) if files else None
    if target is not None:
        if files and not _move_content(source / "files", target / "files", directory, counters):
            return None
        for path in paths:
            os.rename(path, target / path.name)
    with contextlib.suppress(OSError):  # a writer began a new segment in it, or logs a first file: it stays
        os.rmdir(source)
    return True


def _move_content(source: Path, target: Path, directory: OutboxDirectory, counters: Counters) -> bool:
    names = os.listdir(source)
    check_no_link(target)
    with contextlib.suppress(FileExistsError):
        os.mkdir(target, 0o700)
    for name in filter(snapshot.is_draft, names):
        os.unlink(source / name)  # its writer died, for nobody else is there
    copies = [source / name for name in names if not snapshot.is_draft(name)]
    if not _move_for_a_while(copies, target, directory, counters):
        return False
    with contextlib.suppress(OSError):
        os.rmdir(source)
    return True


def reclaim(
    directory: OutboxDirectory,
    ledger: Ledger,
    *,
    before_ms: int,
    failed: Callable[[OSError], None],
    dry_run: bool = False,
) -> list[str]:
    """Delete delivered and verified runs whose verification is older than a time; return their ids.

    What is left of runs whose deletion was begun goes too.

    Args:
        directory: the outbox.
        ledger: of its worker; says which runs are done, and when they were verified.
        before_ms: wall-clock milliseconds; runs verified before it go.
        failed: told of each run that cannot be deleted; the others are all the same.
        dry_run: only return what would go.

    Raises:
        LedgerUnavailable: the ledger cannot be read now.
        OSError: what is there cannot be listed.
    """
    old = [run_id for run_id, verified_ms in reclaimable(directory, ledger) if verified_ms < before_ms]
    if dry_run:
        return old
    sweep(directory, failed)
    gone = []
    for run_id in old:
        try:
            remove_run(directory.delivered / run_id)
        except OSError as error:
            failed(error)
        else:
            gone.append(run_id)
    return gone


def reclaim_parts(
    directory: OutboxDirectory,
    ledger: Ledger,
    *,
    before_ms: int,
    failed: Callable[[OSError], None],
    dry_run: bool = False,
) -> int:
    """Delete segments and copies that were filed before a time of runs that go on; return how many bytes they have.

    Args:
        directory: the outbox.
        ledger: of its worker.
        before_ms: wall-clock milliseconds.
        failed: told of each file that cannot be deleted.
        dry_run: only return what would go.

    Raises:
        LedgerUnavailable: the ledger cannot be read now.
        OSError: what is there cannot be listed.
    """
    size = 0
    for path, found in filed_parts(directory, ledger):
        if max(found.st_mtime, found.st_ctime) * 1000 < before_ms:  # the latter is when it was moved there
            try:
                if not dry_run:
                    os.unlink(path)
            except OSError as error:
                failed(error)
            else:
                size += found.st_size
    return size


def retire(directory: OutboxDirectory, ledger: Ledger, *, now: float) -> int:
    """Give back what the ledger holds of done runs of which nothing is on disk; return how many there were.

    Args:
        directory: the outbox.
        ledger: of its worker.
        now: wall-clock seconds since the epoch.

    Raises:
        LedgerUnavailable: the ledger cannot be used now.
    """
    if not (directory.runs.is_dir() and directory.delivered.is_dir()):
        return 0  # nothing can be told of any run

    def is_gone(run_id: str) -> bool:
        return not any(is_there(parent / run_id) for parent in (directory.runs, directory.delivered))

    letters = ledger.dead_letter_counts()
    ids = [
        record.run_id
        for record in ledger.records()
        if record.state == "done"
        and record.verified_at_ms
        and record.run_id not in letters
        and not provisional.is_room(record.run_id)  # what an experiment made offline is called, only a room says
        and is_gone(record.run_id)
    ]
    number = 0
    for start in range(0, len(ids), _AT_ONCE):
        number += ledger.retire(ids[start : start + _AT_ONCE], is_gone)
    if not ledger.meta(MOVED):
        ledger.expire(now - _REMEMBERED, is_gone)
    if number:
        ledger.checkpoint()  # which gives the space back; if somebody reads just now, the next one does
    return number


def filed_parts(directory: OutboxDirectory, ledger: Ledger) -> list[tuple[Path, os.stat_result]]:
    """Return the filed segments of runs that go on, and the copies filed with them that may go.

    Raises:
        LedgerUnavailable: the ledger cannot be read now.
        OSError: what is there cannot be listed.
    """
    result = []
    for run_id in directory.delivered_ids():
        if not directory.run(run_id).exists():
            continue
        with contextlib.suppress(FileNotFoundError), os.scandir(directory.delivered / run_id) as entries:
            result += [
                (Path(entry.path), entry.stat(follow_symlinks=False))
                for entry in entries
                if entry.name.endswith(".log")
            ]
        record = ledger.record(run_id)
        if record is None:
            continue
        reader, copies = RunReader(directory.run(run_id)), directory.delivered / run_id / "files"
        letters = functools.partial(ledger.dead_letters, run_id)
        for path in passed_copies(copies, reader, record.cursors, letters):
            with contextlib.suppress(FileNotFoundError):
                result.append((path, os.stat(path, follow_symlinks=False)))
    return result


def reclaimable(directory: OutboxDirectory, ledger: Ledger) -> list[tuple[str, int]]:
    """Return the ids of the runs that may be deleted, with the wall-clock ms at which each was verified."""
    letters = ledger.dead_letter_counts()
    found = []
    for run_id in directory.delivered_ids():
        record = ledger.record(run_id)
        if record is None or record.state != "done" or not record.verified_at_ms:
            continue
        if directory.run(run_id).exists():
            continue  # it goes on
        if run_id in letters:
            continue  # a person may still send them, and then the file that one names must be there
        found.append((run_id, record.verified_at_ms))
    return found


def _made(directory: OutboxDirectory, target: Path) -> Path | None:
    """Return a directory in which something is filed, made if need be; None when the disk has no room for it."""
    check_no_link(target)
    try:
        os.mkdir(target, 0o700)
    except OSError as error:  # for want of room too: not every file system says so, and SFTP then says that it exists
        if target.is_dir():
            return target
        # There may be bytes and no inode, or none for this user.
        if error.errno not in NO_ROOM and reserve.free(directory.path) >= reserve.LOW:
            raise
        return None
    return target


def _move(paths: Sequence[Path], target: Path | None, directory: OutboxDirectory, counters: Counters) -> None:
    """Move files that are delivered; without a target they are deleted."""
    if target is None:
        _delete(paths, directory, counters)
        return
    for path in paths:
        os.rename(path, target / path.name)


def _move_for_a_while(
    paths: Sequence[Path], target: Path | None, directory: OutboxDirectory, counters: Counters
) -> bool:
    """Move copies, or delete them, for as long as whoever logs one may be kept waiting; return whether that was all."""
    over = stopwatch.seconds() + _HELD
    done = 0
    while done < len(paths) and (not done or stopwatch.seconds() < over):
        some = paths[done : done + 1] if target is not None else paths[done:]
        _move(some, target, directory, counters)
        done += len(some)
    return done == len(paths)


def _delete(paths: Sequence[Path], directory: OutboxDirectory, counters: Counters) -> None:
    for path in paths:
        os.unlink(path)
    gave_way(directory, len(paths), counters)


def gave_way(directory: OutboxDirectory, number: int, counters: Counters) -> None:
    """Count, and say once, that something was deleted before its retention time because there was no room for it.

    Args:
        directory: the outbox.
        number: how many runs or segments.
        counters: counts them.
    """
    counters.add("reclaimed_early", number)
    counters.warn_once(
        "reclaimed_early",
        f"mlflow-outbox: the disk or the budget of {directory.path} has no room: what was delivered is deleted "
        "before its retention time; nothing undelivered ever is",
    )
