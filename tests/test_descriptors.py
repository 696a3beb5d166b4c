"""Descriptors of segments and forks: a child keeps none of its parent, whatever its threads were doing (F05)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from spools import FORKS

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
    assert entered.wait(10)
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
