"""Programs of many processes: those that ``multiprocessing`` starts, for a pool as a rule, may end without a word.

A pool that is left ends its processes by a signal, and in one that was forked Python runs no handlers of ``atexit``;
from 3.13 on those that it has registered itself, and ours was registered where ``import mlflow`` was. So what such a
process logs is delivered by a process that outlives it, where no other one delivers, and it waits at its end as any
program does, if it comes to that. One that was forked from a program which uses the outbox needs neither: the program
delivers.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any, Final

from mlflow_outbox.outbox import HANDLER_OF
from mlflow_outbox.remainder import say_what_is_left

if TYPE_CHECKING:
    from mlflow_outbox.plugin.base import Base
    from mlflow_outbox.settings import WorkerKind

#: Ways to start a process after which it ends by ``os._exit``.
_FORKED: Final = frozenset({"fork", "forkserver"})
#: Among what a process does at its end: after it has waited for its own children.
_LATE: Final = -100


def is_member() -> bool:
    """Return whether ``multiprocessing``, or what is built on it as joblib is, has started this process."""
    processes: Any = sys.modules.get("multiprocessing.process")
    return processes is not None and processes.parent_process() is not None


def worker_for(kind: WorkerKind) -> WorkerKind:
    """Return what delivers for this process, where the settings say ``kind``."""
    return "process" if kind == "thread" and is_member() else kind


def wait_at_end(store: Base) -> None:
    """Have a process that ends without its handlers of ``atexit`` wait for delivery, and say what is left.

    Args:
        store: made in this process.
    """
    if is_member() and not _has_handlers():
        importlib.import_module("multiprocessing.util").Finalize(None, _wait, args=(store,), exitpriority=_LATE)


def _has_handlers() -> bool:
    import multiprocessing

    if multiprocessing.get_start_method(allow_none=True) not in _FORKED:
        return True
    # Newer ones run those that the process itself has registered.
    return hasattr(importlib.import_module("multiprocessing.popen_fork"), "atexit") and os.getpid() == HANDLER_OF


def _wait(store: Base) -> None:
    outbox = store.outbox
    if outbox.worker_kind == "none" or not store.journals.wrote():
        return
    result = outbox.flush(outbox.settings.exit_timeout, settled=True)
    say_what_is_left(outbox, result.pending, result.parked)
