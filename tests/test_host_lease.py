"""Two machines never deliver one outbox at once, and the one that is left takes over."""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from contents import QUICK, numbered, points, the_run
from mlflow_outbox import FlushResult, MLflowTracker, stopwatch
from mlflow_outbox.outbox import Outbox
from mlflow_outbox.spool import filesystem
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox.spool.reader import RunReader
from mlflow_outbox_worker import flush, host_lease
from mlflow_outbox_worker.child import ChildDelivery
from mlflow_outbox_worker.cli.signals import Ending
from mlflow_outbox_worker.cli.worker import Service
from mlflow_outbox_worker.host_lease import HostLease, described, worker_of
from mlflow_outbox_worker.lease import Holder, Lease
from replays import command, log_offline, the_outbox
from servers import MlflowServer, eventually


@pytest.fixture
def machine(tmp_path: Path) -> Callable[..., HostLease]:
    """Return the lease of an outbox as a machine of a given name sees it, each with its own local state."""

    def make(name: str, *, beat: float = 0.02, missed: int = 3000) -> HostLease:
        return HostLease(
            tmp_path / "host.lease", tmp_path / name / "worker.lock", "command", host=name, beat=beat, missed=missed
        )

    return make


def aged(path: Path) -> bool:
    """Let a lease look as if its holder had been silent for an hour: no test waits for that, however slow it runs."""
    then = time.time() - 3600
    os.utime(path, (then, then))
    return True


def renewed(path: Path) -> bool:
    """Return whether a lease was given a sign of life within the last minutes."""
    return time.time() - os.stat(path).st_mtime < 600


def fall_silent(lease: HostLease) -> None:
    """End the beats of a lease, as those of a stopped process; none that was on its way comes later."""
    lease._stop.set()
    for beats in threading.enumerate():
        if any(told is lease._stop for told in getattr(beats, "_args", ())):
            beats.join(60)


_HOLDER = """
import sys
from pathlib import Path
from mlflow_outbox_worker.host_lease import HostLease
path, lock, host, beat = sys.argv[1:]
lease = HostLease(Path(path), Path(lock), "process", host=host, beat=float(beat))
print(lease.acquire(), flush=True)
sys.stdin.readline()
print(lease.is_sound(), flush=True)
"""


def other_machine(path: Path, state: Path, host: str, *, beat: float = 0.02) -> subprocess.Popen[str]:
    """Start a process that holds a lease as another machine does, until it is told something; then it says how it is.

    Args:
        path: of the lease.
        state: the local state directory of that machine.
        host: its name.
        beat: seconds between two signs of life.
    """
    child = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(path), str(state / "worker.lock"), host, str(beat)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert "True\n" == child.stdout.readline()
    return child


def test_only_one_of_two_machines_holds_the_lease(machine: Callable[..., HostLease]) -> None:
    """The second gets it when the first has given it back."""
    first, second = machine("node1"), machine("node2")
    assert first.acquire()
    assert not second.acquire()
    assert first.is_sound()
    first.release()
    assert second.acquire()
    second.release()


def test_who_has_to_wait_learns_the_other_machines_name(machine: Callable[..., HostLease]) -> None:
    """The message names machine, process and kind."""
    first, second = machine("node1"), machine("node2")
    assert first.acquire()
    holder = second.other()
    assert holder is not None
    assert f"a worker (command, process {os.getpid()}) on the machine node1" == described(holder)
    first.release()


def test_a_holder_that_beats_is_never_taken_for_dead(machine: Callable[..., HostLease], tmp_path: Path) -> None:
    """Its file grows young again by itself."""
    first, second = machine("node1"), machine("node2")
    assert first.acquire()
    for _ in range(3):
        aged(tmp_path / "host.lease")
        eventually(lambda: renewed(tmp_path / "host.lease"))
        assert not second.acquire()
    assert first.is_sound()
    first.release()


def test_a_machine_that_died_is_succeeded_after_the_missed_beats_and_not_before(
    machine: Callable[..., HostLease], tmp_path: Path
) -> None:
    """A process on "another machine" is killed; its lease lies there and grows old."""
    child = other_machine(tmp_path / "host.lease", tmp_path / "node1", "node1")
    second = machine("node2", beat=0.1, missed=10)
    assert not second.acquire()
    child.kill()
    child.communicate()
    last_beat = os.stat(tmp_path / "host.lease").st_mtime
    eventually(second.acquire, 10)
    assert 1.0 < os.stat(tmp_path / "host.lease").st_mtime - last_beat
    assert second.is_sound()
    second.release()


def test_what_a_dead_process_of_this_machine_left_is_replaced_at_once(
    machine: Callable[..., HostLease], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The local lock says that it is dead; there is nothing to wait for."""
    first = machine("node1", beat=60)
    assert first.acquire()
    first._stop.set()
    first._local.release()  # what the kernel does for a process that dies
    second = machine("node1", beat=60)
    assert second.acquire()
    assert not first.is_sound()
    second.release()


def test_a_holder_that_was_stopped_too_long_lets_go(machine: Callable[..., HostLease], tmp_path: Path) -> None:
    """It missed its beats, another machine took over, and its own end takes nothing from that one."""
    first, second = machine("node1"), machine("node2")
    assert first.acquire()
    first._stop.set()  # its beats end, as those of a stopped process
    eventually(lambda: aged(tmp_path / "host.lease") and second.acquire())
    assert not first.is_sound()
    first.release()
    assert second.is_sound()
    second.release()


def test_a_forked_child_neither_holds_nor_gives_back_its_parents_lease(machine: Callable[..., HostLease]) -> None:
    """The lease is the parent's alone."""
    lease = machine("node1")
    assert lease.acquire()
    child = os.fork()
    if child == 0:
        held = lease.is_held()
        lease.release()
        os._exit(1 if held else 0)
    assert 0 == os.waitpid(child, 0)[1]
    assert lease.is_sound()
    lease.release()


def test_a_lease_file_without_sense_grows_old_like_any_other(machine: Callable[..., HostLease], tmp_path: Path) -> None:
    """It may be one whose writer is about to fill it, so it is not replaced at once."""
    (tmp_path / "host.lease").write_bytes(b"\x00\xff")
    lease = machine("node1")
    assert not lease.acquire()
    aged(tmp_path / "host.lease")
    assert lease.acquire()
    lease.release()


def test_of_many_successors_one_is_left(machine: Callable[..., HostLease], tmp_path: Path) -> None:
    """All find the old lease at the same time; whoever else believed to be first notices."""
    first = machine("node0")
    assert first.acquire()
    first._stop.set()
    candidates = [machine(f"node{number}") for number in range(1, 6)]
    eventually(lambda: aged(tmp_path / "host.lease") and candidates[0].acquire())
    fall_silent(candidates[0])
    aged(tmp_path / "host.lease")
    assert 1 <= sum(candidate.acquire() for candidate in candidates[1:])
    assert 1 == sum(candidate.is_sound() for candidate in candidates)
    for candidate in candidates:
        candidate.release()
    first.release()
    assert [] == [path.name for path in tmp_path.iterdir() if path.name.startswith(".host.lease")]


def test_a_file_system_without_links_serves_too(
    machine: Callable[..., HostLease], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exclusive creation decides there."""

    def no_links(*_args: object, **_kwargs: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(host_lease.os, "link", no_links)
    first, second = machine("node1"), machine("node2")
    assert first.acquire()
    assert not second.acquire()
    first.release()
    assert second.acquire()
    second.release()


def test_an_old_lease_says_nothing_about_who_delivers_now(tmp_path: Path, machine: Callable[..., HostLease]) -> None:
    """A machine that died last week is not named as the one to wait for."""
    lease = machine("node1")
    assert lease.acquire()
    fall_silent(lease)
    assert Holder("node1", os.getpid(), "command") == machine("node2").other()
    os.utime(tmp_path / "host.lease", (time.time() - 7 * 86_400,) * 2)
    assert machine("node2").other() is None
    lease.release()


@pytest.mark.parametrize("ahead", [-60.0, 3600.0])
def test_a_silent_holder_is_dead_whatever_this_machine_s_clock_says(
    ahead: float, machine: Callable[..., HostLease], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is an hour behind the file server's, as after a suspension of a virtual machine; a sign of life counts."""
    monkeypatch.setattr(host_lease, "_SILENT", 600.0)
    lease = machine("node1")
    assert lease.acquire()
    fall_silent(lease)
    then = time.time() + ahead
    os.utime(tmp_path / "host.lease", (then, then))
    now = [1000.0]
    monkeypatch.setattr(host_lease.stopwatch, "seconds", lambda: now[0])
    assert machine("node2").other() is not None
    now[0] += 601.0
    assert machine("node2").other() is None
    os.utime(tmp_path / "host.lease", (then + 1, then + 1))
    assert machine("node2").other() is not None
    lease.release()


def test_a_stopped_process_does_not_keep_the_outbox(machine: Callable[..., HostLease], tmp_path: Path) -> None:
    """SIGSTOP on the other machine: no beats, so this one takes over; SIGCONT: the other notices."""
    child = other_machine(tmp_path / "host.lease", tmp_path / "node1", "node1")
    child.send_signal(signal.SIGSTOP)
    second = machine("node2")
    eventually(lambda: aged(tmp_path / "host.lease") and second.acquire())
    child.send_signal(signal.SIGCONT)
    said, _ = child.communicate("\n", timeout=60)
    assert "False\n" == said
    assert second.is_sound()
    second.release()


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system with room for names and not for a word in a file; SFTP calls that an input/output error."""

    def refuse(*_args: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(host_lease.os, "pwrite", refuse)


@pytest.mark.usefixtures("full")
def test_a_full_file_system_excludes_others_as_well_as_any(machine: Callable[..., HostLease], tmp_path: Path) -> None:
    """The lease has no words then: it is kept alive, known again and given back by its length, and nothing is left."""
    first, second = machine("node1"), machine("node2")
    assert first.acquire()
    assert 0 == (tmp_path / "host.lease").stat().st_blocks
    aged(tmp_path / "host.lease")
    eventually(lambda: renewed(tmp_path / "host.lease"))
    assert not second.acquire()
    assert first.is_sound()
    assert not second.is_held()
    holder = second.other()
    assert holder is not None
    assert "a worker that could not write its name down" == described(holder)
    first.release()
    assert second.acquire()
    second.release()
    assert [] == [path.name for path in tmp_path.iterdir() if "host.lease" in path.name]


@pytest.mark.usefixtures("full")
def test_on_a_full_file_system_a_dead_holder_is_succeeded_by_one(
    machine: Callable[..., HostLease], tmp_path: Path
) -> None:
    """Leases without words are told apart: the dead one's file is taken away, a successor's is not."""
    first = machine("node0")
    assert first.acquire()
    first._stop.set()
    candidates = [machine(f"node{number}") for number in range(1, 6)]
    eventually(lambda: aged(tmp_path / "host.lease") and candidates[0].acquire())
    assert 0 == sum(candidate.acquire() for candidate in candidates[1:])
    assert 1 == sum(candidate.is_sound() for candidate in candidates)
    assert not first.is_sound()
    for candidate in (*candidates, first):
        candidate.release()


def test_a_disk_that_fills_up_later_takes_no_lease_away(
    machine: Callable[..., HostLease], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Signs of life go on where even writing the same words again is refused, as copying file systems do."""
    lease = machine("node1")
    assert lease.acquire()

    def refuse(*_args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(host_lease.os, "pwrite", refuse)
    aged(tmp_path / "host.lease")
    eventually(lambda: renewed(tmp_path / "host.lease"))
    assert lease.is_sound()
    lease.release()


# -- an outbox that several machines see


#: A flush on a machine that takes its directory for a network file system.
_FLUSH = """
import sys
from mlflow_outbox.spool import filesystem
from mlflow_outbox_worker.cli import main
filesystem.read_mountinfo = lambda: f"1 1 0:1 / {sys.argv[1]} rw - nfs4 filer:/ rw"
sys.exit(main(["flush", "-d", sys.argv[1], "--timeout", "60"]))
"""


@pytest.fixture
def share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory on a file system that counts as NFS."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    mounts = f"1 1 0:1 / {tmp_path / 'share'} rw - nfs4 filer:/ rw"
    monkeypatch.setattr(filesystem, "read_mountinfo", lambda: mounts)
    monkeypatch.setattr(filesystem, "_known", {})
    place = tmp_path / "share"
    place.mkdir(mode=0o700)
    return place


def test_an_outbox_on_a_share_is_delivered_with_the_ledger_on_this_machine(
    share: Path, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """By a worker of the experiment: no database and no lock file lie on the share, and the lease is given back."""
    import mlflow  # noqa: F401 - so that it delivers in this process, which takes the directory for a share

    with MLflowTracker(experiment_name, mlflow_server.url, outbox_dir=share, settings=QUICK) as tracker:
        run = tracker.start_run("on the share")
        for step in range(100):
            run.log_metric("loss", step / 2, step=step)
        run.end()
        assert tracker.flush(60)
    remote = the_run(mlflow_server.url, experiment_name)
    assert numbered(100) == points(mlflow_server.url, remote.info.run_id, "loss")
    there = {path.name for path in the_outbox(share).iterdir()}
    assert not {"delivery", "worker.lock"} & there
    eventually(lambda: not (the_outbox(share) / "host.lease").exists())
    assert list((tmp_path / "state").rglob("cache.db"))


def test_what_a_killed_process_of_this_machine_left_on_a_share_is_nobody_who_delivers(
    share: Path, experiment_name: str
) -> None:
    """Its lock is free. The thread of a program whose child was killed would start no other one for two minutes."""
    log_offline(experiment_name, "http://127.0.0.1:9", share)
    directory = OutboxDirectory.open(the_outbox(share))
    assert directory.network
    lease = HostLease(directory.host_lease, directory.lock, "thread")
    assert lease.acquire()
    found = worker_of(directory)
    assert found is not None
    assert os.getpid() == found.pid
    lease._stop.set()
    lease._local.release()  # what the kernel does for a process that dies
    assert directory.host_lease.exists()
    assert worker_of(directory) is None


def test_what_another_machine_delivers_is_left_to_it_and_it_is_named(
    share: Path, experiment_name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A process on "node7" holds the lease: the replay here says so, with an exit code of its own."""
    log_offline(experiment_name, "http://127.0.0.1:9", share)
    child = other_machine(the_outbox(share) / "host.lease", tmp_path / "state of node7", "node7", beat=host_lease.BEAT)
    try:
        assert 6 == command("replay", share)
        said = capsys.readouterr().err
        assert f"process {child.pid}) on the machine node7" in said
        assert "MLFLOW_OUTBOX_WORKER=none" in said, "that machine may not reach the server, and holds it all the same"
    finally:
        child.kill()
        child.communicate()


def test_a_flush_beside_another_machines_worker_sees_what_that_has_filed(
    share: Path, experiment_name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its ledger is on that machine: what it moved away is delivered, and of the rest only it can tell."""
    first, second = (log_offline(experiment_name, "http://127.0.0.1:9", share, name=name) for name in ("one", "two"))
    outbox = the_outbox(share)
    child = other_machine(outbox / "host.lease", tmp_path / "state of node7", "node7", beat=host_lease.BEAT)
    try:
        assert 6 == command("flush", "-d", share, "--timeout", 0.3)
        assert "on the machine node7 has this outbox; how far it is can only be seen there" in capsys.readouterr().err
        assert 0 == command("status", "-d", share)
        assert "on the machine node7 delivers; how far it is can only be seen there" in capsys.readouterr().out
        asked = OutboxDirectory.open(outbox).hurry_asked()
        flushing = subprocess.Popen(
            [sys.executable, "-c", _FLUSH, str(share)], stdout=subprocess.PIPE, text=True, env=os.environ
        )
        eventually(lambda: OutboxDirectory.open(outbox).hurry_asked() > asked, 60)
        for run_id in (first, second):
            (outbox / "runs" / run_id).rename(outbox / "delivered" / run_id)
        out, _ = flushing.communicate(timeout=60)
        assert 0 == flushing.returncode, out
        assert "208 events delivered" in out
    finally:
        child.kill()
        child.communicate()


def test_a_service_that_ends_when_nobody_logs_any_more_waits_for_a_program_on_a_share(
    share: Path, sqlite_uri: str, experiment_name: str
) -> None:
    """No lock tells there that it lives: it does until it has closed its segment."""
    tracker = MLflowTracker(experiment_name, sqlite_uri, outbox_dir=share, worker="none", settings=QUICK)
    run = tracker.start_run("goes on")
    assert run.log_metric("loss", 0.0, step=0)
    with Ending() as ending:
        service = Service(dataclasses.replace(QUICK, root=share), ending)
        service.adopt(share)
        (worker,) = service._workers.values()
        eventually(lambda: worker.counters["delivered"] >= 2 and worker.delivery.is_idle(), 60)
        assert not service._is_idle(worker)
        run.end()
        tracker.close(0)
        eventually(lambda: service._is_idle(worker), 60)
        assert 0 == service.end(0.0, None)


_KILLED = """
import os, signal, sys
from mlflow_outbox import MLflowTracker
experiment, uri, root = sys.argv[1:]
tracker = MLflowTracker(experiment, uri, outbox_dir=root, worker="none")
tracker.start_run("killed").log_metric("loss", 0.0, step=0)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_service_that_ends_when_nobody_logs_any_more_does_not_wait_for_who_was_killed_on_this_machine(
    share: Path, sqlite_uri: str, experiment_name: str
) -> None:
    """Such as for want of memory: wherever its files lie, its number tells that it is gone."""
    command_line = [sys.executable, "-c", _KILLED, experiment_name, sqlite_uri, str(share)]
    assert -signal.SIGKILL == subprocess.run(command_line, check=False, timeout=200).returncode
    with Ending() as ending:
        service = Service(dataclasses.replace(QUICK, root=share), ending)
        service.adopt(share)
        (worker,) = service._workers.values()
        eventually(lambda: 2 == worker.counters["delivered"] and service._is_idle(worker), 60)
        assert 0 == service.end(0.0, None)


def test_a_share_is_asked_for_what_other_machines_have_made(share: Path, experiment_name: str) -> None:
    """A name comes and goes in the directory of the runs, which no cache outlives."""
    log_offline(experiment_name, "http://127.0.0.1:9", share)
    place = the_outbox(share) / "runs"
    for words in (("status", "-d", share, "-q"), ("replay", share, "--dry-run", "-q")):
        os.utime(place, (0, 0))
        assert 0 == command(*words)
        assert place.stat().st_mtime > 0, words
        assert 1 == len(list(place.iterdir()))


def test_a_live_writer_on_a_share_is_never_taken_for_dead_at_once(share: Path, experiment_name: str) -> None:
    """Nobody holds a lock there, also not the writers of this machine: only silence could tell."""
    tracker = MLflowTracker(experiment_name, "http://127.0.0.1:9", outbox_dir=share, worker="none", settings=QUICK)
    run = tracker.start_run("live")
    run.log_metric("loss", 0.5, step=1)
    reader = RunReader(the_outbox(share) / "runs" / run.run_id)
    window = reader.window({})
    assert window.live
    [[segment]] = reader.segments().values()
    with segment.path.open("ab") as file:
        file.write(b"the beginning of a frame")
    after = reader.window(window.cursors)
    assert (True, [], window.cursors) == (after.live, after.broken, after.cursors)
    tracker.close(0)


def test_a_flush_without_a_time_does_not_wait_for_ever_for_what_only_another_machine_can_tell(
    share: Path, experiment_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run goes on, as that of a training on several machines does: nothing of it is filed that would show."""
    monkeypatch.setattr(flush, "_UNSEEN", 0.5)
    tracker = MLflowTracker(experiment_name, "http://127.0.0.1:9", outbox_dir=share, settings=QUICK)
    child = other_machine(the_outbox(share) / "host.lease", tmp_path / "state of node7", "node7", beat=host_lease.BEAT)
    found: list[FlushResult] = []
    try:
        run = tracker.start_run("on two machines")
        run.log_metric("loss", 0.5, step=1)
        waiting = threading.Thread(target=lambda: found.append(tracker.flush()), daemon=True)
        waiting.start()
        waiting.join(60)
        assert [FlushResult(0, 2, 0, 0)] == found
    finally:
        tracker.close(0)
        child.kill()
        child.communicate()


def test_the_thread_of_a_program_makes_the_state_directory_for_the_user_alone(
    share: Path, experiment_name: str, tmp_path: Path
) -> None:
    """With any umask, as on a cluster where one group has all users; also the directories on the way there."""
    log_offline(experiment_name, "http://127.0.0.1:9", share)
    directory = OutboxDirectory.open(the_outbox(share))
    outbox = Outbox(directory, directory.destination, QUICK, "thread")
    loop = ChildDelivery(outbox, lambda: pytest.fail("nothing is delivered here"))
    umask = os.umask(0)
    try:
        assert loop._is_free()
    finally:
        os.umask(umask)
        loop._lease.release()
    made = [tmp_path / "state", *(tmp_path / "state").rglob("*")]
    assert directory.lock in made
    assert {} == {path: mode for path in made if (mode := path.lstat().st_mode & 0o077)}


def test_a_process_that_only_writes_sees_who_delivers_where_its_home_is_on_the_network_too(
    share: Path, experiment_name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As those are that a training gives its tracker to: it says nothing of what the training delivers."""
    monkeypatch.setenv("XDG_STATE_HOME", str(share / "home"))
    tracker = MLflowTracker(experiment_name, "http://127.0.0.1:9", outbox_dir=share, worker="none", settings=QUICK)
    with tracker.start_run("of a process") as run:
        run.log_metric("loss", 0.5, step=1)
    outbox = tracker._outbox
    assert outbox is not None
    lock = outbox.directory.lock
    lock.parent.mkdir(mode=0o700, parents=True)
    assert filesystem.is_network(lock.parent)
    training = Lease(lock, "thread")
    assert training.acquire()
    outbox.at_exit(stopwatch.seconds())
    assert "events wait" not in caplog.text
    training.release()
    outbox.at_exit(stopwatch.seconds())
    assert "3 events wait in" in caplog.text
