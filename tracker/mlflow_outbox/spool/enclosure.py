"""An event and the copied file that it names: both are kept, or neither.

The copy is there before its event, is held for it against workers until the event is written (``snapshot``), and goes
again when the event is refused: what no event names would take room for nothing. Of a file for which there is no room
the worker is told how much it needs (``demand``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from mlflow_outbox.errors import ArtifactRefused
from mlflow_outbox.interrupts import forward
from mlflow_outbox.spool import demand
from mlflow_outbox.spool.events import Event
from mlflow_outbox.spool.snapshot import NO_ROOM, Hold, Snapshot, SnapshotStore

if TYPE_CHECKING:
    from mlflow_outbox.settings import SyncLevel
    from mlflow_outbox.spool.journal import Journal


def append_enclosing(
    journal: Journal,
    sync: SyncLevel,
    size: int,
    copy: Callable[[SnapshotStore, Hold], Snapshot],
    event: Callable[[Snapshot], Event],
) -> bool:
    """Copy a file and write the event that names it; return whether both are kept, as ``Journal.append`` does.

    Args:
        journal: of the run. What it refuses it has counted.
        sync: the sync level.
        size: of the file in bytes.
        copy: copies it.
        event: returns the event, given the copy.

    Raises:
        ArtifactRefused: it cannot be copied.
    """
    if not journal.takes(size):
        return False
    try:
        store = store_of(journal, sync)
        with store.held() as hold:
            kept = copy(store, hold)
            if sync == "interval":
                journal.sync_later(store, kept.sha256)
            if not journal.append(event(kept)):
                hold.discard(kept.sha256)
                return False
            journal.keep_held(hold)
    except BaseException as error:  # raised again
        journal.takes_back(size)
        if isinstance(error, ArtifactRefused) and error.reason == NO_ROOM:
            demand.tell(journal.directory.path, size)
        raise
    return True


def store_of(journal: Journal, sync: SyncLevel) -> SnapshotStore:
    """Return where the files of a journal's run are copied to.

    Raises:
        ArtifactRefused: the run's directory cannot be made.
    """
    try:
        folder = journal.directory.make_run(journal.run.run_id)
    except OSError as error:
        forward(error)
        msg = f"the outbox has no room for files: {error.strerror or error}"
        raise ArtifactRefused(NO_ROOM, msg) from None
    return SnapshotStore(folder, durable=sync == "always", keeps_free=journal.keeps_free)
