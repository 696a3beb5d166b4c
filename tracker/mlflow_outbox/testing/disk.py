"""A disk that fails by script, in place of the journal's ``SystemDisk``.

Everything that no script forbids goes to the real disk, so a reader finds what a crash would have left.

    disk = FailingDisk()
    disk.under(tracker)                                   # the runs that it starts from now on are written there
    disk.fail("write", at=3)                              # the third write from now: EIO, once
    disk.fail("write", error=errno.ENOSPC, times=None)    # a full disk, until clear()
    disk.fail("write", short=5)                           # the next write takes five bytes of what it is given
    disk.fail("datasync", when=lambda call: call.fd == 7)
    with disk.held("datasync") as entered: ...            # an fsync that takes as long as the block
    disk.cut_power(folder)                                # its files lose what was not synced
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, get_args

from mlflow_outbox.spool.disk import SystemDisk

if TYPE_CHECKING:
    from mlflow_outbox.tracker import MLflowTracker

Operation = Literal["create", "reopen", "write", "datasync", "truncate", "close", "sync_directory"]
#: Seconds after which a held call goes on by itself, so that a test that fails does not hang.
_LONGEST_HOLD: Final = 60.0


class Call(NamedTuple):
    """One call that was made: which, on what descriptor (-1 for a path), and how many bytes it was given."""

    operation: Operation
    fd: int
    size: int


@dataclasses.dataclass
class _Fault:
    operation: Operation
    skip: int
    times: int | None
    when: Callable[[Call], bool]
    run: Callable[[Call], int | None]


class FailingDisk(SystemDisk):
    """A real disk whose calls fail when a script says so; may be used from any thread.

    Attributes:
        calls: every call that was made, failed ones too, in order.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._durable: dict[tuple[int, int], int] = {}
        self._faults: list[_Fault] = []
        self._lock = threading.RLock()  # a signal handler may log while its own thread is in here

    def under(self, tracker: MLflowTracker) -> None:
        """Have a tracker write to this disk: the runs that it, or another one of its outbox, starts from now on.

        Copies of files are made on the machine's disk all the same.

        Args:
            tracker: one that is not disabled.

        Raises:
            ValueError: the tracker is disabled, so that it writes nothing.
        """
        outbox = tracker._outbox  # noqa: SLF001 - what a program has no business with, but its tests
        if outbox is None:
            msg = "the tracker is disabled and writes nothing; see the warning at its creation"
            raise ValueError(msg)
        outbox.disk = self

    def count(self, operation: Operation) -> int:
        """Return how often an operation was called so far."""
        return sum(call.operation == operation for call in self.calls)

    def clear(self) -> None:
        """Forget all scripts: the disk is well again."""
        with self._lock:
            self._faults.clear()

    def fail(
        self,
        operation: Operation,
        *,
        error: int = errno.EIO,
        short: int | None = None,
        at: int = 1,
        times: int | None = 1,
        when: Callable[[Call], bool] = lambda _: True,
    ) -> None:
        """Let calls of one operation fail.

        Args:
            operation: which.
            error: the errno that they fail with.
            short: for "write": take this many bytes and succeed, as a full disk does; None fails with ``error``.
            at: ordinal, from now and among the calls that ``when`` accepts, of the first call that fails; from 1.
            times: how many calls fail; None means all until ``clear()``.
            when: which calls are meant.

        Raises:
            ValueError: there is no such operation.
        """

        def run(_: Call) -> int | None:
            if short is not None:
                return short
            raise OSError(error, os.strerror(error))

        self._add(_Fault(operation, at - 1, times, when, run))

    @contextlib.contextmanager
    def held(self, operation: Operation, *, error: int | None = None) -> Iterator[threading.Event]:
        """Hold the calls of one operation for as long as the block lasts; yields an event that is set when one came.

        Args:
            operation: which.
            error: the errno that they fail with afterwards; None lets them succeed.

        Raises:
            ValueError: there is no such operation.
        """
        entered, go_on = threading.Event(), threading.Event()

        def run(_: Call) -> int | None:
            entered.set()
            go_on.wait(_LONGEST_HOLD)
            if error is not None:
                raise OSError(error, os.strerror(error))
            return None

        fault = _Fault(operation, 0, None, lambda _: True, run)
        self._add(fault)
        try:
            yield entered
        finally:
            with self._lock:
                self._faults = [other for other in self._faults if other is not fault]
            go_on.set()

    def cut_power(self, folder: Path) -> None:
        """Cut each file of a directory to what it held when it was last synced; names are kept.

        Args:
            folder: where the files are, such as a run's; what is in directories in it, as copies are, stays.
        """
        for path in folder.iterdir():
            found = path.lstat()
            if stat.S_ISREG(found.st_mode):
                os.truncate(path, self._durable.get((found.st_dev, found.st_ino), 0))

    def _add(self, fault: _Fault) -> None:
        if fault.operation not in get_args(Operation):
            msg = f"there is no operation {fault.operation!r}; use one of {', '.join(get_args(Operation))}"
            raise ValueError(msg)
        with self._lock:
            self._faults.append(fault)

    def _meet(self, operation: Operation, fd: int, size: int = 0) -> int | None:
        call = Call(operation, fd, size)
        with self._lock:
            self.calls.append(call)
            fault = self._due(call)
        return None if fault is None else fault.run(call)

    def _due(self, call: Call) -> _Fault | None:
        for fault in self._faults:
            if fault.operation != call.operation or not fault.when(call):
                continue
            if fault.skip > 0:
                fault.skip -= 1
                continue
            if fault.times is not None:
                fault.times -= 1
                if fault.times <= 0:
                    self._faults.remove(fault)
            return fault
        return None

    # -- the calls of SystemDisk

    def create(self, path: Path) -> int:
        """Create a segment file."""
        self._meet("create", -1)
        return super().create(path)

    def reopen(self, path: Path) -> int:  # type: ignore[override] # of one that has no script, it is a function
        """Open a complete segment, to sync it."""
        self._meet("reopen", -1)
        return SystemDisk.reopen(path)

    def write(self, fd: int, data: bytes) -> int:  # type: ignore[override] # the journal only writes bytes
        """Write, all of it or as the script says."""
        short = self._meet("write", fd, len(data))
        return os.write(fd, data if short is None else data[:short])

    def datasync(self, fd: int) -> None:  # type: ignore[override] # the journal only has descriptors
        """Make a file's data durable."""
        found = os.fstat(fd)  # before: what is written meanwhile may not be taken along
        self._meet("datasync", fd)
        SystemDisk.datasync(fd)
        self._durable[found.st_dev, found.st_ino] = found.st_size

    def truncate(self, fd: int, length: int) -> None:
        """Cut a file to a length in bytes."""
        self._meet("truncate", fd, length)
        SystemDisk.truncate(fd, length)

    def close(self, fd: int) -> None:
        """Close a descriptor; a scripted error comes after the descriptor is gone, as in Linux."""
        SystemDisk.close(fd)
        self._meet("close", fd)

    def sync_directory(self, path: Path) -> None:
        """Make the names in a directory durable."""
        self._meet("sync_directory", -1)
        SystemDisk.sync_directory(path)
