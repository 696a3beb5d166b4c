"""Which copies of a run's logged files are delivered, so that nothing asks for them any more.

A copy lies in ``files`` under the digest of its content (``mlflow_outbox.spool.snapshot``), and any number of events
may name it. It is delivered when none does that is behind the cursors, and no dead letter, which may be sent again.
This can be told while nobody is in the middle of logging a file to the run: its event would come after its copy. The
lock that says so is one of this machine's. On a network file system it is relied on only for runs that no other
machine has written to since it started; what two machines log to one run stays until the run has ended.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

import msgspec

from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox.spool.disk import is_there
from mlflow_outbox.spool.events import decode, digest_of
from mlflow_outbox.spool.reader import RunReader
from mlflow_outbox.spool.snapshot import is_digest
from mlflow_outbox.spool.window import Cursor, Window
from mlflow_outbox.spool.writer import boot_id
from mlflow_outbox_worker.ledger import Ledger
from mlflow_outbox_worker.records import DeadLetter, RunRecord

#: Events looked at in one go.
_WINDOW: Final = 100_000


def passed_copies(
    files: Path, reader: RunReader, cursors: Mapping[str, Cursor], letters: Callable[[], Iterable[DeadLetter]]
) -> list[Path]:
    """Return the copies of logged files that no event names which is still to be delivered, or may be sent again.

    Args:
        files: the directory of the copies.
        reader: of the run's directory; new, so that it sees what is there now.
        cursors: how far each of its writers was delivered.
        letters: returns its dead letters, of which there may be very many; asked only where there are copies.

    Raises:
        LedgerUnavailable: they cannot be read now.
        OSError: a file could not be read.
    """
    if files.is_symlink():  # what is there is somebody else's, and nothing of it is to go
        return []
    with contextlib.suppress(FileNotFoundError):
        names = set(filter(is_digest, os.listdir(files)))
        if names:
            return [files / name for name in sorted(names - _named(reader, cursors, letters(), names))]
    return []


def _named(
    reader: RunReader, cursors: Mapping[str, Cursor], letters: Iterable[DeadLetter], copies: set[str]
) -> set[str]:
    """Return which copies are named behind the cursors and by dead letters; all where that cannot be told."""
    try:
        found = {digest_of(decode(letter.payload)) for letter in letters}
    except msgspec.DecodeError:  # a newer version's
        return copies
    for window in _windows(reader, cursors):
        if window.broken:
            return copies
        found.update(digest_of(event) for _, event in window.events)
    return copies if reader.bad_headers() else found


def has_all_copies(reader: RunReader) -> bool:
    """Return whether all files that the events of a run name are there.

    Args:
        reader: of all the run's directories.
    """
    events = (event for window in _windows(reader, {}) for _, event in window.events)
    return all(is_there(reader.file(digest)) for digest in filter(is_digest, map(digest_of, events)))


def _windows(reader: RunReader, cursors: Mapping[str, Cursor]) -> Iterator[Window]:
    more = True
    while more:
        window = reader.window(cursors, points=_WINDOW, items=_WINDOW)
        yield window
        cursors, more = window.cursors, window.more


def copies_to_file(directory: OutboxDirectory, ledger: Ledger, record: RunRecord, reader: RunReader) -> list[Path]:
    """Return the copies of a run that goes on that are delivered and can be filed, as it seems without a lock.

    Args:
        directory: the outbox.
        ledger: of its worker.
        record: of the run.
        reader: of the run's directory.

    Raises:
        LedgerUnavailable: the ledger cannot be read now.
        OSError: a file could not be read.
    """
    files = directory.run(record.run_id) / "files"
    if not files.is_dir():
        return []
    if directory.network and not all(held[-1].header.boot_id == boot_id() != "" for held in reader.segments().values()):
        return []
    return passed_copies(files, reader, record.cursors, lambda: ledger.dead_letters(record.run_id))
