"""All outboxes that this process has open: one for each directory, worker kind and settings.

Each is seen to at the exit of the interpreter, one after the other, and at forks.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from typing import TYPE_CHECKING

from mlflow_outbox import pool, stopwatch
from mlflow_outbox.living import Living
from mlflow_outbox.outbox import Outbox

if TYPE_CHECKING:
    from mlflow_outbox.destination import Destination
    from mlflow_outbox.settings import Settings, WorkerKind
    from mlflow_outbox.spool.directory import OutboxDirectory

#: All outboxes of this process that are in use.
_outboxes: Living[Outbox] = Living()
_shared: weakref.WeakValueDictionary[tuple[object, ...], Outbox] = weakref.WeakValueDictionary()
_shared_lock = threading.RLock()
#: Journals outlive the tracker that a script dropped; so do their outboxes, until the exit.
_kept: list[Outbox] = []


def shared(directory: OutboxDirectory, destination: Destination, settings: Settings, worker: WorkerKind) -> Outbox:
    """Return this process's outbox for a directory, made at the first call, and for one that took its place."""
    key = (directory.place, worker, settings, destination.secret_uri)
    with _shared_lock:
        outbox = _shared.get(key)
        if outbox is None:
            outbox = _shared[key] = Outbox(directory, destination, settings, worker)
            _outboxes.add(outbox)
            _kept.append(outbox)
            if worker != "none":
                pool.leave_at_end(_at_exit)
        return outbox


def in_use(directory: OutboxDirectory) -> Outbox | None:
    """Return an outbox that this process has opened at a directory, if any, and rather one that it delivers."""
    found = [outbox for outbox in _outboxes.members() if outbox.directory.place == directory.place]
    return max(found, key=lambda outbox: outbox.worker_kind != "none", default=None)


def _at_exit() -> None:
    outboxes = _outboxes.members()
    if not outboxes:
        return
    deadline = stopwatch.seconds() + max(outbox.settings.exit_timeout for outbox in outboxes)
    for outbox in outboxes:
        deadline = _leave(outbox, deadline)


def _leave(outbox: Outbox, deadline: float) -> float:
    """Let an outbox deliver until a deadline, and return the deadline of the next one."""
    try:
        outbox.at_exit(deadline)
    except (KeyboardInterrupt, SystemExit):  # ctrl-C at the exit, or one more SIGTERM, means: do not wait, but say
        return _leave(outbox, 0.0) if deadline else 0.0
    except Exception as error:  # noqa: BLE001 - one outbox's trouble is not the others'; counted and said
        outbox.counters.add("exit_errors")
        outbox.counters.warn_once("exit", f"mlflow-outbox: {outbox.directory.path}, at the exit: {error!r}")
    return deadline


def _after_fork_in_parent() -> None:
    for outbox in _outboxes.members():
        outbox.has_forked()


def _after_fork_in_child() -> None:
    global _shared_lock  # noqa: PLW0603 - the child's own: the lock may be held by a thread that is not there
    _shared_lock = threading.RLock()
    for outbox in _outboxes.members():
        outbox.forked()


atexit.register(_at_exit)
os.register_at_fork(after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
