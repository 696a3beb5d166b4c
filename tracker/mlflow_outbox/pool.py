"""Programs of many processes: those that ``multiprocessing`` starts, for a pool as a rule, may end without a word.

A pool that is left ends its processes by a signal, and in one that was forked Python runs no handlers of ``atexit``;
from 3.13 on those that it has registered itself, and ours was registered where the program imported us. So a process
that has opened an outbox itself waits at its end as any program does, if it comes to that; and what one logs through
``outbox+`` is delivered by a process that outlives it, where no other one delivers. One that was forked from a program
which uses the outbox needs neither: the program delivers.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from mlflow_outbox.settings import WorkerKind

#: Ways to start a process after which it ends by ``os._exit``.
_FORKED: Final = frozenset({"fork", "forkserver"})
#: Among what a process does at its end: after it has waited for its own children.
_LATE: Final = -100
#: The process that has our handler of ``atexit``: Python 3.13 takes it from one that ``multiprocessing`` forks later.
_HANDLER_OF: Final = os.getpid()
#: The process that does at its end what the handler would.
_leaving = 0


def is_member() -> bool:
    """Return whether ``multiprocessing``, or what is built on it as joblib is, has started this process."""
    processes: Any = sys.modules.get("multiprocessing.process")
    return processes is not None and processes.parent_process() is not None


def worker_for(kind: WorkerKind) -> WorkerKind:
    """Return what delivers for this process through ``outbox+``, where the settings say ``kind``."""
    return "process" if kind == "thread" and is_member() else kind


def leave_at_end(handler: Callable[[], None]) -> None:
    """Have a process that ends without its handlers of ``atexit`` call ours; to be asked for again changes nothing."""
    global _leaving  # noqa: PLW0603 - one process at a time
    if _leaving == os.getpid() or not is_member() or _has_handlers():
        return
    _leaving = os.getpid()
    importlib.import_module("multiprocessing.util").Finalize(None, _leave, args=(handler,), exitpriority=_LATE)


def _has_handlers() -> bool:
    import multiprocessing

    if multiprocessing.get_start_method(allow_none=True) not in _FORKED:
        return True
    # Newer ones run those that the process itself has registered.
    return _is_newer() and os.getpid() == _HANDLER_OF


def _is_newer() -> bool:
    """Return whether this is a Python that takes the handlers of its program from a process that it forks: 3.13."""
    return hasattr(importlib.import_module("multiprocessing.popen_fork"), "atexit")


def _leave(handler: Callable[[], None]) -> None:
    # Else the interpreter itself exits, and has called it. A newer Python comes here after the end of the main thread,
    # and has nothing to call.
    if threading.main_thread().is_alive() or _is_newer():
        handler()
