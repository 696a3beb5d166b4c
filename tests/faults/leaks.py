"""What a test has left behind in its process: descriptors, threads, files, and processes that nobody waits for.

Journals outlive a tracker that was dropped, so every outbox that a test has left open is closed first: that gives all
back. What MLflow's own client keeps for its next call (connections, engines) is given up too.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from mlflow_outbox import outboxes

#: prctl: who loses its parent becomes a child of this process, instead of vanishing out of its sight.
_PR_SET_CHILD_SUBREAPER: Final = 36
#: Seconds in which what is ending has ended, on a busy machine.
_PATIENCE: Final = 60.0
#: How the names of the product's threads and of its temporary directories begin.
_OURS: Final = "mlflow-outbox"
#: Processes of the nest, which live as long as the session.
_STAYING: Final = (b"multiprocessing.forkserver", b"multiprocessing.resource_tracker")
#: Temporary directories that this process has made.
_temporary: set[str] = set()


def _note_temporary(event: str, arguments: tuple[Any, ...]) -> None:
    if event in {"tempfile.mkdtemp", "tempfile.mkstemp"} and os.path.basename(arguments[0]).startswith(_OURS):
        _temporary.add(arguments[0])


sys.addaudithook(_note_temporary)


class Standing(NamedTuple):
    """What a process has.

    Attributes:
        descriptors: numbers, each with what it is.
        threads: the product's, with idents.
        children: process ids, each with its command.
        temporary: directories that the product made.
    """

    descriptors: frozenset[str]
    threads: frozenset[str]
    children: frozenset[str]
    temporary: frozenset[str]

    def beyond(self, before: Standing) -> list[str]:
        """Return what was not there before."""
        return sorted(now for mine, its in zip(self, before, strict=True) for now in mine - its)


def standing() -> Standing:
    """Return what this process has."""
    descriptors = set()
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one that lists
            what = os.readlink(f"/proc/self/fd/{entry}")
            if not what.endswith("/schedstat"):  # of ``manners``, one for each thread that logs
                descriptors.add(f"descriptor {entry}: {what}")
    threads = [thread for thread in threading.enumerate() if thread.name.startswith(_OURS)]
    return Standing(
        frozenset(descriptors),
        frozenset(f"thread {thread.name} {thread.ident}" for thread in threads),
        frozenset(_children()),
        frozenset(f"file {path}" for path in list(_temporary) if os.path.exists(path)),
    )


def _children() -> Iterator[str]:
    for thread in Path("/proc/self/task").iterdir():
        names: list[str] = []
        with contextlib.suppress(OSError):  # a thread that has just ended
            names = (thread / "children").read_text().split()
        for name in names:
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{name}/cmdline").read_bytes()
                if any(name in command for name in _STAYING):
                    continue
                if command:  # a zombie has none
                    yield f"process {name}: {command.replace(bytes(1), b' ')[:300].decode(errors='replace')}"
                else:
                    _reap(int(name))


def _reap(pid: int) -> None:
    """Let a child go that has ended: an orphan, for whom nobody else waits."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def _give_up() -> None:
    """Close what the test left open, and let MLflow's client give up what it keeps for its next call."""
    for each in list(outboxes._kept):
        each.close(0, each._journals.members())  # what waits in memory for a disk that fails is given up as well
    for name, forget in (
        ("mlflow.utils.request_utils", lambda module: module._cached_get_request_session.cache_clear()),
        ("mlflow.store.tracking.sqlalchemy_store", lambda module: _dispose(module.SqlAlchemyStore)),
    ):
        if name in sys.modules:
            forget(sys.modules[name])
    gc.collect()


def _dispose(store: Any) -> None:
    for engine in list(store._engine_map.values()):
        engine.dispose()


@contextlib.contextmanager
def nothing_left(unless: Callable[[], bool]) -> Iterator[None]:
    """Check that what is done meanwhile leaves nothing behind.

    Args:
        unless: whether it failed: a traceback holds on to all that it tells of.

    Raises:
        AssertionError: something was left, and did not go within a time.
    """
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    before = standing()
    try:
        yield
        deadline, pause, never = time.monotonic() + _PATIENCE, 0.01, threading.Event()
        while (left := standing().beyond(before)) and time.monotonic() < deadline and not unless():
            _give_up()  # not at once: most tests leave nothing
            never.wait(pause)
            pause = min(2 * pause, 0.5)
        assert [] == left or unless(), f"I8: left behind: {left}"
    finally:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
