"""What a test has left behind in its process: descriptors, threads, and processes that nobody waits for."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

#: prctl: who loses its parent becomes a child of this process, instead of vanishing out of its sight.
_PR_SET_CHILD_SUBREAPER: Final = 36
#: Seconds in which what is ending has ended, on a busy machine.
_PATIENCE: Final = 15.0


class Standing(NamedTuple):
    """What a process has.

    Attributes:
        descriptors: numbers, each with what it is.
        threads: names with idents.
        children: process ids, each with its command.
        temporary: names in the directory for temporary files.
    """

    descriptors: frozenset[str]
    threads: frozenset[str]
    children: frozenset[str]
    temporary: frozenset[str]

    def beyond(self, before: Standing) -> list[str]:
        """Return what was not there before."""
        return sorted(now for mine, its in zip(self, before, strict=True) for now in mine - its)


def standing(temporary: Path) -> Standing:
    """Return what this process has.

    Args:
        temporary: directory for temporary files.
    """
    descriptors = set()
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one that lists
            descriptors.add(f"descriptor {entry}: {os.readlink(f'/proc/self/fd/{entry}')}")
    return Standing(
        frozenset(descriptors),
        frozenset(f"thread {thread.name} {thread.ident}" for thread in threading.enumerate()),
        frozenset(_children()),
        frozenset(f"file {name}" for name in os.listdir(temporary)),
    )


def _children() -> Iterator[str]:
    for thread in Path("/proc/self/task").iterdir():
        names: list[str] = []
        with contextlib.suppress(OSError):  # a thread that has just ended
            names = (thread / "children").read_text().split()
        for name in names:
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{name}/cmdline").read_bytes()
                if command:  # a zombie has none
                    yield f"process {name}: {command.replace(bytes(1), b' ')[:300].decode(errors='replace')}"
                else:
                    _reap(int(name))


def _reap(pid: int) -> None:
    """Let a child go that has ended: an orphan, for whom nobody else waits."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


@contextlib.contextmanager
def nothing_left(temporary: Path, unless: Callable[[], bool]) -> Iterator[None]:
    """Check that what is done meanwhile leaves nothing behind.

    Args:
        temporary: an empty directory for temporary files.
        unless: whether it failed: a traceback holds on to all that it tells of.

    Raises:
        AssertionError: something was left, and did not go within a time.
    """
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    before = standing(temporary)
    try:
        yield
        deadline, pause, never = time.monotonic() + _PATIENCE, 0.001, threading.Event()
        while (left := standing(temporary).beyond(before)) and time.monotonic() < deadline and not unless():
            if pause > 0.01:  # not at once: most tests leave nothing, and to collect takes a tenth of a second
                gc.collect()
            never.wait(pause)
            pause = min(2 * pause, 0.5)
        assert [] == left or unless(), f"I8: left behind: {left}"
    finally:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
