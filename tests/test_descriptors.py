"""Descriptors of segments: a fork takes none along (F05), none is a standard stream's, none is given back in use."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest

from mlflow_outbox.counters import Counters
from mlflow_outbox.spool import descriptors, sequence
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox.testing import FailingDisk
from spools import FORKS, RUN, Everything, make_journal, make_outbox, metric, open_files, read

#: A thread is held inside of one of the disk's calls while another one forks; the child says what it still has open.
CODE = """
import os, sys, threading, time
sys.path[:0] = {path!r}
from spools import *
from mlflow_outbox.spool.disk import is_being_written
from mlflow_outbox.testing.disk import FailingDisk
disk = FailingDisk()
outbox = make_outbox(Path({outbox!r}))
writer = make_journal(outbox, disk)
if {operation!r} == "close":
    writer.append(metric(0, "first"))
    run = writer.close
else:
    run = lambda: writer.append(metric(0, "first"))
with disk.held({operation!r}) as entered:
    thread = threading.Thread(target=run)
    thread.start()
    assert entered.wait(60)
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        segments = [path.stat() for path in outbox.run(RUN).glob("*.log")]
        shared = 0
        for number in range(256):
            try:
                found = os.fstat(number)
            except OSError:
                continue
            shared += any((found.st_dev, found.st_ino) == (one.st_dev, one.st_ino) for one in segments)
        os._exit(shared)
    took = time.monotonic() - began
thread.join()
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, "the child has a segment of its parent's"
assert took < 5, took
writer.append(metric(1, "after"))
writer.close()
assert not any(is_being_written(path) for path in outbox.run(RUN).glob("*.log"))
"""


@pytest.mark.parametrize("operation", ["create", "write", "close"])
def test_a_fork_in_the_middle_of_a_segments_begin_or_end_takes_no_descriptor_along(
    operation: str, tmp_path: Path
) -> None:
    """Its lock would make readers take a dead parent for alive; and no fork waits for ever for a disk that hangs."""
    code = CODE.format(path=sys.path, outbox=str(tmp_path / "outbox"), operation=operation)
    command = [sys.executable, *FORKS, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (0, "") == (done.returncode, done.stderr), done.stderr[-3000:]


_DAEMON = """
import os, sys
sys.path[:0] = {path!r}
from spools import *
outbox = make_outbox(Path({outbox!r}))
writers = [make_journal(outbox) for _ in range(4)]
for writer in writers:
    writer.append(metric(1))
for stream in range(3):
    try:
        os.write(stream, b"a library's warning")
    except OSError:
        pass
for writer in writers:
    writer.append(metric(2))
    writer.close()
"""


def test_no_segment_takes_the_place_of_a_standard_stream_that_is_closed(tmp_path: Path) -> None:
    """What the libraries of a daemon write to standard error is not in the middle of its events."""
    code = _DAEMON.format(path=sys.path, outbox=str(tmp_path / "outbox"))
    command = ["sh", "-c", 'exec "$0" -c "$1" <&- >&- 2>&-', sys.executable, code]
    assert 0 == subprocess.run(command, timeout=60, check=False).returncode
    found = Everything(make_outbox(tmp_path / "outbox").run(RUN))
    assert ([], 0, [1, 2] * 4) == (found.broken, found.missing, found.steps)


#: A background that does nothing by itself.
_BACKGROUND = types.SimpleNamespace(watch=lambda _: True, hurry=lambda: None)


@pytest.mark.parametrize(("left", "names"), [("among many", 1), ("removed", 0)])
def test_a_segment_that_is_left_while_it_is_synced_keeps_its_descriptor_until_that_is_done(
    left: str, names: int, outbox: OutboxDirectory, disk: FailingDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its number would be nobody's, which looks like a disk that fails, or another file's, which is synced for it."""
    counters = Counters()
    writer = make_journal(outbox, disk, counters=counters, registry=_BACKGROUND)
    assert writer.append(metric(0))
    (segment,) = outbox.run(RUN).glob("*.log")
    begun = segment.stat().st_ino
    with disk.held("datasync") as entered:
        background = threading.Thread(target=writer.sync)
        background.start()
        assert entered.wait(60)
        if left == "removed":
            segment.unlink()
        else:
            monkeypatch.setattr(descriptors, "_MANY", 0)
        writer.close()
        assert writer.append(metric(1))
        (fd,) = [call.fd for call in disk.calls if call.operation == "datasync"]
        found = os.fstat(fd)
        assert (begun, names) == (found.st_ino, found.st_nlink)
    background.join(60)
    writer.close()
    writer.sync()
    assert 0 == counters["sync_errors"]
    assert [0, 1] == read(outbox).steps
    assert [] == open_files(outbox.path)


def test_a_segment_whose_sync_is_still_to_come_in_a_round_is_synced_however_many_others_are(
    outbox: OutboxDirectory, disk: FailingDisk
) -> None:
    """The complete ones before it take the disk long, and it is complete itself meanwhile."""
    counters = Counters()
    writer = make_journal(outbox, disk, segment_bytes=1024, counters=counters, registry=_BACKGROUND)
    number = 0
    while len(writer._sequence.retired) < sequence._MOST_RETIRED:
        assert writer.append(metric(number))
        number += 1
    last = writer._sequence.live
    with disk.held("datasync") as entered:
        background = threading.Thread(target=writer.sync)
        background.start()
        assert entered.wait(60)
        while writer._sequence.live is last:
            assert writer.append(metric(number))
            number += 1
        assert last.is_open
    background.join(60)
    assert {} == counters.snapshot()
    writer.close()
    writer.sync()
    assert list(range(number)) == read(outbox).steps
    assert [] == open_files(outbox.path)
