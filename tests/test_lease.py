"""One worker per outbox (F80 to F82)."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mlflow_outbox_worker import lease as lease_module
from mlflow_outbox_worker.lease import Holder, Lease, holder
from servers import eventually


def test_only_one_of_many_holds_the_lease(tmp_path: Path) -> None:
    """In one process too; releasing hands it on."""
    first, second = Lease(tmp_path / "lock", "thread"), Lease(tmp_path / "lock", "command")
    assert first.acquire()
    assert first.acquire()
    assert not second.acquire()
    assert (True, False) == (first.is_held(), second.is_held())
    first.release()
    first.release()
    assert second.acquire()
    assert 0o600 == stat.S_IMODE((tmp_path / "lock").stat().st_mode)


def test_the_holder_is_named_while_it_holds(tmp_path: Path) -> None:
    """For messages: host, process and kind."""
    lease = Lease(tmp_path / "lock", "process")
    assert holder(tmp_path / "lock") is None
    lease.acquire()
    found = holder(tmp_path / "lock")
    assert found is not None
    assert (os.getpid(), "process") == (found.pid, found.kind)
    lease.release()
    assert holder(tmp_path / "lock") is None


def test_where_there_are_no_locks_it_is_said_what_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a home on a cluster's file system that is mounted without; nothing would ever be delivered."""
    before = len(os.listdir("/proc/self/fd"))

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(lease_module.fcntl, "flock", refuse)
    with pytest.raises(OSError, match=r"not implemented: .*/lock cannot be locked; give .*XDG_STATE_HOME") as said:
        Lease(tmp_path / "lock", "thread").acquire()
    assert (errno.ENOSYS, before) == (said.value.errno, len(os.listdir("/proc/self/fd")))


def test_a_lease_that_is_just_being_taken_is_nobody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread asks between the lock and the note of who has it; for a second lease it is somebody else's."""
    locked, may_go = threading.Event(), threading.Event()
    is_same = lease_module._is_same

    def slow(fd: int, path: Path) -> bool:
        locked.set()
        may_go.wait(60)
        return is_same(fd, path)

    monkeypatch.setattr(lease_module, "_is_same", slow)
    lease = Lease(tmp_path / "lock", "thread")
    answers: list[object] = []
    taking = threading.Thread(target=lease.acquire)
    asking = threading.Thread(target=lambda: answers.append(lease.other()))
    taking.start()
    assert locked.wait(60)
    asking.start()
    assert Lease(tmp_path / "lock", "command").other() is not None
    may_go.set()
    taking.join(60)
    asking.join(60)
    assert [None] == answers
    assert lease.is_held()


def test_a_note_that_cannot_be_read_hides_no_holder(tmp_path: Path) -> None:
    """What decides is the lock."""
    lease = Lease(tmp_path / "lock", "thread")
    lease.acquire()
    (tmp_path / "lock").write_bytes(b"\xff junk")
    found = holder(tmp_path / "lock")
    assert found is not None
    assert "" == found.host  # it could not be read


def test_the_kernel_releases_the_lease_of_a_killed_holder(tmp_path: Path) -> None:
    """F81: no time-out, no stale lock."""
    code = f"""
import sys, time
sys.path[:0] = {sys.path!r}
from pathlib import Path
from mlflow_outbox_worker import lease as lease_module
from mlflow_outbox_worker.lease import Lease
lease = Lease(Path({str(tmp_path / "lock")!r}), "process")
print(lease.acquire(), flush=True)
sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert b"True\n" == other.stdout.readline()
        mine = Lease(tmp_path / "lock", "thread")
        assert not mine.acquire()
        other.send_signal(signal.SIGKILL)
    eventually(mine.acquire)


def test_a_forked_child_does_not_keep_its_parents_lease(tmp_path: Path) -> None:
    """The child lives on, and the parent's release counts all the same."""
    lease = Lease(tmp_path / "lock", "thread")
    lease.acquire()
    gate, end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(end)
        held = lease.is_held()
        os.read(gate, 1)
        os._exit(1 if held else 0)
    os.close(gate)
    assert lease.is_held()
    lease.release()
    assert Lease(tmp_path / "lock", "thread").acquire()
    os.close(end)
    assert 0 == os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("note", [b"", b"{", b'{"host":"\xff\xfe","pid":1,"kind":"thread"}', b'{"more":' + b"[" * 4000])
def test_a_lock_file_that_says_nothing_readable_is_held_by_somebody(tmp_path: Path, note: bytes) -> None:
    """The lock decides; whoever looks is told of a holder without a name."""
    lease = Lease(tmp_path / "lock", "thread")
    lease.acquire()
    (tmp_path / "lock").write_bytes(note)
    assert Holder("", 0, "") == holder(tmp_path / "lock")


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_a_holder_notices_that_its_lock_file_is_not_the_one(tmp_path: Path, how: str) -> None:
    """F82: somebody else may lock the new file, so the old holder must stop."""
    lease = Lease(tmp_path / "lock", "thread")
    lease.acquire()
    assert lease.is_sound()
    (tmp_path / "lock").unlink()
    if how == "replaced":
        (tmp_path / "lock").write_text("")
    assert not lease.is_sound()
    assert Lease(tmp_path / "lock", "thread").acquire()


def test_a_link_in_place_of_the_lock_is_refused(tmp_path: Path) -> None:
    """F90: it is not followed."""
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError):
        Lease(tmp_path / "lock", "thread").acquire()
    assert not (tmp_path / "elsewhere").exists()
    assert holder(tmp_path / "lock") is None
