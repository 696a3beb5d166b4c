"""How long logging calls took and whether one raised: counted in memory that a killed child leaves behind.

Every call of ``oracle.log_event`` is counted, in whichever process it is made. A child counts in memory that it shares
with the test's process (a SIGKILL takes nothing of it, and no system call is made that a fault could hit); a process
that it forks counts in a part of its own. ``row`` adds up what a test and all its children counted.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from mlflow_outbox.spool.syncer import Syncer

T = TypeVar("T")

#: 8-byte words of one process: those of ``Tally``, in that order.
_WORDS: Final = 8
#: Processes of one child; what it forks beyond that shares the last part, and may count too little.
_PARTS: Final = 8
_CHILD_BYTES: Final = 8 * _WORDS * _PARTS
#: Children of one test: the memory is only taken when it is touched.
_CHILDREN: Final = 1 << 17
_NS: Final = 1_000_000  # in a millisecond


class Tally(NamedTuple):
    """What was counted.

    Attributes:
        calls: logging calls that returned.
        over_1_ms: that took longer than a millisecond by the clock.
        over_50_ms: that took longer than 50 ms by the clock, without the time that the thread was ready to run and the
            machine, busy with the other tests, had no processor for it, and at "always" without the disk's syncs, for
            which such a call is meant to wait.
        over_1_s: that took longer than a second by the clock.
        used_1_ms: that used more than a millisecond of the processor, which a busy machine does not stretch.
        raised: that raised.
        slowest_us: the longest one, by the clock.
    """

    calls: int = 0
    over_1_ms: int = 0
    over_50_ms: int = 0
    over_1_s: int = 0
    used_1_ms: int = 0
    raised: int = 0
    slowest_us: int = 0

    def with_(self, other: Tally) -> Tally:
        """Return what both counted."""
        sums = map(sum, zip(self[:-1], other[:-1], strict=True))
        return Tally(*sums, slowest_us=max(self.slowest_us, other.slowest_us))

    def check(self, paused: int = 0) -> None:
        """Check that the calls were a guest's.

        Args:
            paused: calls that the test itself held up, with SIGSTOP.

        Raises:
            AssertionError: a call raised or waited.
        """
        assert 0 == self.raised, f"I5: {self.raised} logging calls raised"
        assert self.over_1_s <= paused, f"I5: a logging call took more than a second: {self}"
        if self.calls >= 1000:  # of fewer, it would be the slowest one
            assert self.over_50_ms <= self.calls / 1000, f"I5: more than 0.1 % of the calls took 50 ms: {self}"


class _Counts:
    """The words that this process counts in."""

    def __init__(self) -> None:
        self._memory = memoryview(bytearray(_CHILD_BYTES)).cast("Q")
        self._part = 0
        self.lock = threading.RLock()  # a signal handler or ``__del__`` may log in the middle of a count

    def move(self, path: str, child: int) -> None:
        """Count in shared memory from now on."""
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            shared = mmap.mmap(fd, _CHILD_BYTES * _CHILDREN)
        finally:
            os.close(fd)
        self._memory = memoryview(shared)[child * _CHILD_BYTES : (child + 1) * _CHILD_BYTES].cast("Q")

    def forked(self) -> None:
        """Count in a part of one's own, in a forked process. The last word of the first part says which are taken."""
        self.lock = threading.RLock()
        taken = self._memory[_WORDS - 1] = self._memory[_WORDS - 1] + 1
        self._part = min(taken, _PARTS - 1)

    def add(self, took: int, used: int, excused: int, *, raised: bool) -> None:
        """Count one call, in nanoseconds: by the clock, of the processor, and of waiting that is not its fault."""
        first = self._part * _WORDS
        over = (1, took > _NS, took - excused > 50 * _NS, took > 1000 * _NS, used > _NS, raised)
        with self.lock:
            for index, one in enumerate(over, first):
                self._memory[index] += one
            self._memory[first + 6] = max(self._memory[first + 6], took // 1000)

    def taken(self) -> Tally:
        """Return what this process has counted since the last time, and begin anew."""
        with self.lock:
            found = _total(self._memory)
            self._memory[:] = memoryview(bytes(_CHILD_BYTES)).cast("Q")
        return found


def _total(memory: memoryview) -> Tally:
    found = Tally()
    for first in range(0, len(memory), _WORDS):
        if memory[first]:
            found = found.with_(Tally(*memory[first : first + len(Tally._fields)]))
    return found


class SharedCounts:
    """Memory in which the children of a test count."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("manners")
        os.ftruncate(self._fd, _CHILD_BYTES * _CHILDREN)
        self._memory = mmap.mmap(self._fd, _CHILD_BYTES * _CHILDREN)
        self._children = 0

    def place(self) -> tuple[str, int]:
        """Return where the next child counts, for ``count_in``."""
        self._children += 1
        return f"/proc/{os.getpid()}/fd/{self._fd}", self._children - 1

    def taken(self) -> Tally:
        """Return what the children have counted since the last time; all of them have ended."""
        used = self._children * _CHILD_BYTES
        with memoryview(self._memory) as whole, whole[:used] as part, part.cast("Q") as words:
            found = _total(words)
        self._memory[:used] = bytes(used)
        self._children = 0
        return found

    def close(self) -> None:
        """Give the memory back."""
        self._memory.close()
        os.close(self._fd)


_counts = _Counts()
os.register_at_fork(after_in_child=_counts.forked)


def count_in(path: str, child: int) -> None:
    """Count this process's calls in shared memory from now on."""
    _counts.move(path, child)


def own() -> Tally:
    """Return what this process has counted since the last time."""
    return _counts.taken()


def counted(log: Callable[[], T], times: list[tuple[float, float]] | None = None) -> T:
    """Make one logging call and count it.

    Args:
        log: the call.
        times: where the seconds that it took, by the clock and of the processor, are added.
    """
    raised = True
    excused = _waited_ns() + _synced_ns()
    started, used = time.perf_counter_ns(), time.thread_time_ns()
    try:
        result = log()
        raised = False
    except Exception:
        raise  # counted below; what a signal handler raises is none of these, and is not the call's
    except BaseException:
        raised = False
        raise
    finally:
        took, used = time.perf_counter_ns() - started, time.thread_time_ns() - used
        _counts.add(took, used, _waited_ns() + _synced_ns() - excused if took > _NS else 0, raised=raised)
        if times is not None:
            times.append((took / 1e9, used / 1e9))
    return result


class _Schedule:
    """The file in which the kernel counts what one thread of one process has run and waited.

    Attributes:
        of: the process and the thread.
    """

    def __init__(self, of: tuple[int, int]) -> None:
        self.of = of
        self._fd = -1
        with contextlib.suppress(OSError):
            self._fd = os.open(f"/proc/self/task/{of[1]}/schedstat", os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def waited_ns(self) -> int:
        """Return how long the thread has been ready to run without a processor; 0 where the kernel does not say."""
        try:
            return int(os.pread(self._fd, 80, 0).split()[1])
        except OSError:
            return 0


_threads = threading.local()


def _waited_ns() -> int:
    of = os.getpid(), threading.get_native_id()
    if getattr(_threads, "schedule", None) is None or _threads.schedule.of != of:
        _threads.schedule = _Schedule(of)
    return int(_threads.schedule.waited_ns())


def _synced_ns() -> int:
    return getattr(_threads, "synced", 0)


def excuse_syncs() -> None:
    """Let the calls of this process, which log at "always", wait for the disk's syncs as long as these take."""
    for name in ("data", "names", "copies"):
        setattr(Syncer, name, _timed(getattr(Syncer, name)))


def _timed(sync: Callable[..., T]) -> Callable[..., T]:
    def timed(*arguments: Any) -> T:
        started = time.perf_counter_ns()
        try:
            return sync(*arguments)
        finally:
            _threads.synced = _synced_ns() + time.perf_counter_ns() - started

    return timed


def forget_peak() -> None:
    """Let ``peak_kib`` begin anew at what this process has now, to bound what comes."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _status_and_lanes() -> tuple[dict[str, str], set[str]]:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    lanes = {thread.name for thread in threading.enumerate() if thread.name.startswith("mlflow-outbox-lane-")}
    return dict(line.split(":", 1) for line in lines), lanes


def standing() -> dict[str, Any]:
    """Return what this process has taken of the machine: for reports early and late in a trouble.

    Of its threads those that last; ``lanes`` are those that send a run at that moment.
    """
    seen: tuple[str, set[str]] | None = None
    status, lanes = _status_and_lanes()
    while seen != (status["Threads"], lanes):  # one begins or ends between the two counts
        seen = status["Threads"], lanes
        time.sleep(0.01)
        status, lanes = _status_and_lanes()
    return {
        "peak_kib": int(status["VmHWM"].split()[0]),
        "kib": int(status["VmRSS"].split()[0]),
        "threads": int(status["Threads"]) - len(lanes),
        "lanes": len(lanes),
        "descriptors": len(os.listdir("/proc/self/fd")),
    }
