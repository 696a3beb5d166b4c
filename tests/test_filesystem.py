"""Whether a path is on a network file system, and what follows from it for whoever logs there."""

from __future__ import annotations

import dataclasses
import fcntl
import pwd
from pathlib import Path
from typing import Any

import pytest

from contents import QUICK
from mlflow_outbox import MLflowTracker
from mlflow_outbox.spool import filesystem
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox.spool.filesystem import Mount, is_network, is_network_type, mount_of
from mlflow_outbox_worker.deputy import passed_on
from spools import AllShared

TABLE = r"""
22 1 259:2 / / rw,relatime shared:1 - ext4 /dev/root rw
23 22 0:21 / /proc rw,nosuid - proc proc rw
40 22 0:45 /export/home /home rw,relatime shared:20 - nfs4 filer:/export/home rw,vers=4.2
41 22 0:46 / /scratch rw,relatime master:3 propagate_from:2 - lustre 10.0.0.1@tcp:/scratch rw
42 40 259:3 / /home/ada/local rw,relatime - xfs /dev/nvme1n1 rw
43 22 0:50 / /mnt/my\040share rw - fuse.sshfs ada@host:/ rw
44 22 0:51 / /mnt/covered rw - nfs filer:/x rw
45 22 0:52 / /mnt/covered rw - tmpfs tmpfs rw
a line that is none
46 22 0:53
"""


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/var/tmp", Mount("/", "ext4")),
        ("/home", Mount("/home", "nfs4")),
        ("/home/ada/outbox", Mount("/home", "nfs4")),
        ("/home/ada/local/outbox", Mount("/home/ada/local", "xfs")),
        ("/homework", Mount("/", "ext4")),
        ("/scratch/job/outbox", Mount("/scratch", "lustre")),
        ("/mnt/my share/outbox", Mount("/mnt/my share", "fuse.sshfs")),
        ("/mnt/covered/outbox", Mount("/mnt/covered", "tmpfs")),
    ],
)
def test_a_path_lies_on_the_innermost_and_latest_mount(path: str, expected: Mount) -> None:
    """Prefixes end at a slash, escapes are undone, and a later mount covers an earlier one."""
    assert expected == mount_of(path, TABLE)


def test_an_empty_or_foreign_table_names_no_mount() -> None:
    """Where there is no such table, nothing is known, and a path counts as local."""
    assert mount_of("/home", "") is None
    assert mount_of("/home", "/dev/sda1 /home ext4 rw 0 0") is None


@pytest.mark.parametrize(
    "kind",
    ["nfs", "nfs4", "lustre", "gpfs", "beegfs", "cifs", "smb3", "fuse.sshfs", "ceph", "fuse.glusterfs", "9p", "afs"],
)
def test_shared_file_systems_are_network_file_systems(kind: str) -> None:
    """Those of clusters, of file servers, and those that programs bring over FUSE."""
    assert is_network_type(kind)


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "zfs", "tmpfs", "overlay", "fuse", "fuseblk", "fuse.ntfs-3g"])
def test_local_file_systems_are_not(kind: str) -> None:
    """FUSE by itself says nothing."""
    assert not is_network_type(kind)


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that counts as being on NFS, and a local state directory on another file system."""
    place = tmp_path / "share"
    place.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(filesystem, "_known", AllShared())
    return place


def test_a_path_that_is_not_there_yet_is_where_its_parent_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory of an outbox is judged before it is made."""
    monkeypatch.setattr(filesystem, "read_mountinfo", lambda: f"1 1 0:1 / {tmp_path} rw - nfs4 filer:/ rw")
    monkeypatch.setattr(filesystem, "_known", {})
    assert is_network(tmp_path / "not" / "there")
    filesystem.forget()


def test_a_logging_call_on_a_network_file_system_locks_nothing(
    shared: Path, experiment_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock could wait for a file server that is away; the events are there all the same."""
    locked: list[int] = []
    monkeypatch.setattr(fcntl, "flock", lambda fd, kind: locked.append(fd))
    tracker = MLflowTracker(experiment_name, "http://127.0.0.1:9", outbox_dir=shared, worker="none", settings=QUICK)
    run = tracker.start_run("on the share")
    assert run.log_metric("loss", 0.5, step=1)
    run.end()
    tracker.close(0)
    assert [] == locked
    assert 1 == len(list(shared.glob("*/runs/*/*.log")))


def test_ledger_and_lock_of_an_outbox_on_a_network_file_system_are_elsewhere(
    shared: Path, experiment_name: str, tmp_path: Path
) -> None:
    """SQLite and flock stay on this machine."""
    tracker = MLflowTracker(experiment_name, "http://127.0.0.1:9", outbox_dir=shared, worker="none", settings=QUICK)
    assert tracker.outbox_path is not None
    directory = OutboxDirectory.open(tracker.outbox_path)
    assert directory.network
    for path in (directory.ledger, directory.lock):
        assert path.is_relative_to(tmp_path / "state" / "mlflow-outbox")


def test_who_has_no_home_logs_on_a_network_file_system_too(
    shared: Path, experiment_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container whose user nobody knows: where the ledger would be is asked as the tracker is made."""

    def unknown(user: int) -> pwd.struct_passwd:
        raise KeyError(user)

    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    tracker = MLflowTracker(experiment_name, "http://127.0.0.1:9", outbox_dir=shared, worker="none", settings=QUICK)
    assert tracker.outbox_path is not None
    assert OutboxDirectory.open(tracker.outbox_path).ledger.is_relative_to("/.local/state/mlflow-outbox")
    assert tracker.start_run("homeless").log_metric("loss", 0.5)
    tracker.close(0)


def test_on_a_network_file_system_no_other_process_syncs_for_the_program(shared: Path, experiment_name: str) -> None:
    """Its descriptor may know only what was written by that very one (sshfs, s3fs), and its sync then says nothing."""
    given = dataclasses.replace(QUICK, linger=0.0)
    tracker = MLflowTracker(experiment_name, "http://127.0.0.1:9", outbox_dir=shared, worker="process", settings=given)
    run = tracker.start_run("on the share")
    outbox: Any = tracker._outbox
    assert (None, None) == (outbox._worker._deputy, outbox._caretaker._is_relieved)
    with passed_on(given, network=True) as deputy:
        assert deputy is None
    run.end()
    tracker.close(0)
