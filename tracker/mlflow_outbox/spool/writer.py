"""Does the writer of a segment live? What can be told without touching its file.

=============  ===========================================================================================
writing        a process of this machine holds the segment's lock, however long it has logged nothing
died           no process holds it and it was written under this machine's present boot, on a local file system
silent         another machine wrote it, or an earlier boot, or the file system is a network's, where locks
               say nothing: only the time since its last change tells, and that is an estimate
=============  ===========================================================================================

A clock of a file server may be wrong, so on a network file system a segment counts as left only when this process has
itself seen it unchanged for the time in question, or when its last change is ten times as long ago. On any other the
clock of this machine is believed, but for a frame that is there in part: its writer may be in the middle of it, by a
clock that jumped or that is another one's, so this process must have seen the segment unchanged for a second.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from pathlib import Path
from typing import Final, Literal, NamedTuple

from mlflow_outbox import stopwatch
from mlflow_outbox.spool.disk import is_being_written
from mlflow_outbox.spool.events import SegmentClosed, encode
from mlflow_outbox.spool.filesystem import is_network
from mlflow_outbox.spool.frame import SHORT_OVERHEAD, SegmentHeader, unpack

#: Segments of network file systems whose size this process remembers, and gaps in them.
_REMEMBERED: Final = 10_000
#: Seconds in which the rest of a frame follows its beginning, and by which the kernel's times are rounded at most.
_MOMENT: Final = 1.0
#: Where ``/proc/<pid>/stat`` has the ticks at which a process began, behind its name.
_STARTED: Final = 19
#: Times the settling time after which the clock of a file server is believed.
_SURELY: Final = 10
#: Seconds without a change after which a writer has left of which neither a lock nor a process tells.
_LONG: Final = 24 * 3600.0
#: The last event of a writer that does not go on in another segment, of one that does, and the bytes of their frames.
_CLOSED: Final = encode(SegmentClosed(rotated=False))
_ROTATED: Final = encode(SegmentClosed(rotated=True))
_CLOSING: Final = SHORT_OVERHEAD + len(_CLOSED)


class WriterState(NamedTuple):
    """What is known of a segment's writer.

    Attributes:
        kind: see the module's table.
        idle: seconds since the segment last changed, by the clocks of this machine and of the file system.
    """

    kind: Literal["writing", "died", "silent"]
    idle: float


def writer_state(path: Path, header: SegmentHeader, *, now: float | None = None) -> WriterState:
    """Return what is known of the writer of a segment.

    Args:
        path: the segment.
        header: its header.
        now: wall-clock seconds since the epoch; None is now.
    """
    if is_being_written(path):
        return WriterState("writing", _idle(path, now))
    ours = header.boot_id != "" and header.boot_id == boot_id()
    if ours and not is_network(path.parent):
        return WriterState("died", _idle(path, now))
    return WriterState("silent", _idle(path, now))


def is_gone(path: Path, header: SegmentHeader, settle: float) -> bool:
    """Return whether a segment's writer counts as gone, so that nothing will be appended.

    Args:
        path: the segment.
        header: its header.
        settle: seconds without a change after which a silent writer counts as gone.
    """
    state = writer_state(path, header)
    if state.kind != "silent":
        return state.kind == "died"
    if not is_network(path.parent):
        return state.idle > settle
    return state.idle > _SURELY * settle or _unchanged(path) > settle


def may_go_on(path: Path, header: SegmentHeader, settle: float) -> bool:
    """Return whether the rest of the last frame may still come, of a segment whose writer counts as gone.

    Args:
        path: the segment.
        header: its header.
        settle: as for ``is_gone``.
    """
    return writer_state(path, header).kind == "silent" and _unchanged(path) < min(_MOMENT, settle)


def may_come(path: Path, header: SegmentHeader, offset: int, settle: float) -> bool:
    """Return whether what is missing at an offset of a segment may still come, although there is more behind it.

    What another machine writes to a file system of the network can arrive in another order than it was written in, a
    piece at a time. This process must have known the gap for half of the time in which a silent writer counts as gone,
    so that a flush, which is as patient as that, does not give up for it.

    Args:
        path: the segment.
        header: its header.
        offset: where no intact frame begins.
        settle: as for ``is_gone``.
    """
    if header.boot_id == boot_id() != "" or not is_network(path.parent) or _idle(path, None) > _SURELY * settle:
        return False
    now = stopwatch.seconds()
    since = _gaps.setdefault((path, offset), now)
    while len(_gaps) > _REMEMBERED:
        _gaps.popitem(last=False)
    return now - since < settle / 2


def has_ended(path: Path, header: SegmentHeader) -> bool:
    """Return whether the program that wrote a segment has ended; one of which that cannot be told, after a day.

    The name of a host is that of a container too, in which processes have numbers of their own.

    Args:
        path: the segment.
        header: its header.
    """
    if is_being_written(path):
        return False
    if is_far(path, header):
        return _idle(path, None) > _LONG
    return header.boot_id != boot_id() or not _is_alive(header.pid, header.created_ms / 1000)


def has_died_here(header: SegmentHeader) -> bool:
    """Return whether the program that wrote a segment ran on this machine and has ended, wherever its files lie."""
    is_ours = header.host == os.uname().nodename and header.boot_id == boot_id() != ""
    return is_ours and not _is_alive(header.pid, header.created_ms / 1000)


def is_far(path: Path, header: SegmentHeader) -> bool:
    """Return whether only time tells if the program that wrote a segment has ended."""
    return header.host != os.uname().nodename or is_network(path.parent)


def has_left(path: Path, header: SegmentHeader) -> bool:
    """Return whether nothing will be appended to a segment any more, so that it may be moved.

    On a network file system a writer that is silent may live, and would go on in the file wherever it lies.

    Args:
        path: the last segment of its writer.
        header: its header.
    """
    state = writer_state(path, header)
    if state.kind != "silent" or not is_network(path.parent):
        return state.kind != "writing"
    return state.idle > _LONG or _closing(path, header) is not None


def is_closed(path: Path, header: SegmentHeader) -> bool:
    """Return whether a segment ends with the frame by which its writer says that the run's journal is closed."""
    return _closing(path, header) == _CLOSED


def _closing(path: Path, header: SegmentHeader) -> bytes | None:
    """Return the last event of a segment if it is one that closes it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        size = os.fstat(fd).st_size
        tail = os.pread(fd, _CLOSING, max(0, size - _CLOSING))
    finally:
        os.close(fd)
    found = unpack(tail, 0, header.seed) if len(tail) == _CLOSING else None
    return found.payload if found is not None and found.payload in {_CLOSED, _ROTATED} else None


def boot_id() -> str:
    """Return what the kernel calls its present boot; "" where it does not say."""
    if not _boot:
        try:
            _boot.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        except OSError:
            _boot.append("")
    return _boot[0]


_boot: list[str] = []
#: Size of a segment, and since when (monotonic seconds) this process has seen it.
_seen: OrderedDict[Path, tuple[int, float]] = OrderedDict()
#: When (monotonic seconds) this process has first met no intact frame at an offset of a segment.
_gaps: OrderedDict[tuple[Path, int], float] = OrderedDict()


def _unchanged(path: Path) -> float:
    try:
        size = os.stat(path).st_size
    except OSError:
        return 0.0
    now = stopwatch.seconds()
    held = _seen.get(path)
    if held is None or held[0] != size:
        held = _seen[path] = (size, now)
        while len(_seen) > _REMEMBERED:
            _seen.popitem(last=False)
    return now - held[1]


def _is_alive(pid: int, then: float) -> bool:
    """Return whether the process lives that had a number at a time in wall-clock seconds.

    Numbers come again: in a container that is started anew, under the same name, the next program has that of the last.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's by now
        return True
    begun = _begun(pid)
    return begun is None or begun <= then + _MOMENT


def _begun(pid: int) -> float | None:
    """Return when a process began, in wall-clock seconds as the kernel counts them back; None where it does not say."""
    try:
        ticks = float(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[_STARTED])
        booted = next(line for line in Path("/proc/stat").read_bytes().splitlines() if line.startswith(b"btime "))
        return float(booted.split()[1]) + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, LookupError, StopIteration):
        return None


def _idle(path: Path, now: float | None) -> float:
    try:
        return max(0.0, (time.time() if now is None else now) - os.stat(path).st_mtime)
    except FileNotFoundError:
        return float("inf")  # it was moved or reclaimed: nobody writes to it
    except OSError:
        return 0.0
