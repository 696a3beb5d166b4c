"""The command line on a disk that is full or read-only: what only looks or deletes needs no room."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from commands import environment, offline
from contents import numbered, points, the_run
from faults.alone import alone
from faults.children import Nest
from faults.table import Row
from mlflow_outbox.testing.faults import status
from mlflow_outbox.testing.proxy import FaultProxy
from servers import MlflowServer

#: Mounts what a program needs in a namespace of its own.
_ALONE = 'set -eu; mount --make-rprivate /; cd "$1"'


@pytest.mark.needs("mounts")
@pytest.mark.fault("F22", "replay from a file system that is mounted read-only")
def test_a_replay_from_read_only_media(
    nest: Nest, row: Row, sqlite_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """Everything arrives, the second time nothing is sent; a flush, which would have to write, says why it cannot."""
    offline(tmp_path / "box", experiment=experiment_name)
    text = alone(
        nest,
        tmp_path,
        f"""
        mkdir media; mount --bind box media; mount -o remount,ro,bind media
        outbox replay media --to {sqlite_uri}
        outbox replay media --to {sqlite_uri}
        outbox status -d media
        outbox flush -d media
        outbox worker -d media
        """,
    )
    assert ["0", "0", "0", "1", "1"] == re.findall(r"^code (\d+)$", text, re.MULTILINE), text
    assert "1 run sent" in text
    assert "nothing to send: 1 run sent" in text
    assert 2 == len(re.findall(r"media/\S+ cannot be written to; mlflow-outbox replay \S+ sends its runs", text)), text
    assert numbered(10) == points(sqlite_uri, the_run(sqlite_uri, experiment_name).info.run_id, "loss")
    row.done()


#: Logs a run on a disk, and fills that to the last byte. What is free afterwards says less than one byte refused:
#: a worker that meets the full disk gives its ledger the reserve in the same moment.
_FILL = """
    import errno
    import sys
    from mlflow_outbox import MLflowTracker
    tracker = MLflowTracker(sys.argv[1], sys.argv[2], outbox_dir="disk/box", worker=sys.argv[3])
    with tracker.start_run("full") as run:
        for step in range(3000):
            run.log_metric("loss", step / 2, step=step)
    with open("disk/filler", "wb", buffering=0) as filler:
        for size in (65536, 1):
            refused = ""
            try:
                while filler.write(bytes(size)) == size:
                    pass
            except OSError as error:
                refused = errno.errorcode[error.errno]
    print("full", size, refused, flush=True)
    sys.stdin.readline()
    print("delivered", tracker.close(60), dict(tracker.counters), flush=True)
"""
#: Fills the directory "share" until its file system has no block left.
_FULL = """
    import contextlib
    import os

    for number in range(100):
        if os.statvfs("share").f_bavail == 0:
            break
        with open(f"share/filler{number}", "wb", buffering=0) as filler:
            for size in (65536, 1024, 1):
                with contextlib.suppress(OSError):
                    while filler.write(bytes(size)) == size:
                        pass
        os.sync()
    print("full", os.statvfs("share").f_bavail)
"""
#: Twice what ``free_bytes`` keeps for others, so that nothing is refused before it is filled.
_DISK = "mkdir disk; mount -t tmpfs -o size=128m,mode=0700 tmpfs disk"


@pytest.mark.needs("mounts")
@pytest.mark.fault("F19", "zero bytes free, nothing delivered yet: flush")
def test_a_flush_with_zero_bytes_free(
    nest: Nest, row: Row, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """It makes its ledger, delivers, acknowledges and deletes; without that ledger nothing arrives twice either."""
    fill = f"{sys.executable} -c 'import os{textwrap.dedent(_FILL)}' {experiment_name} {mlflow_server.url} none"
    text = alone(
        nest,
        tmp_path,
        f"""
        {_DISK}
        {fill} < /dev/null
        cp -a disk/box kept
        outbox flush -d disk/box --timeout 60
        find disk/box/*/runs disk/box/*/delivered -mindepth 1
        df --output=avail disk
        outbox flush -d disk/box --timeout 60
        outbox flush -d kept --timeout 60
        """,
    )
    assert "full 1 ENOSPC\n" in text
    assert ["0", "0", "0"] == re.findall(r"^code (\d+)$", text, re.MULTILINE), text
    assert "3,002 events delivered" in text
    assert "deleted before its retention time" in text
    assert ".log" not in text
    assert not re.search(r"^ *0$", text, re.MULTILINE), text
    remote = the_run(mlflow_server.url, experiment_name)
    assert ("FINISHED", numbered(3000)) == (remote.info.status, points(mlflow_server.url, remote.info.run_id, "loss"))
    row.done()


@pytest.mark.needs("mounts")
@pytest.mark.fault("F19", "the disk fills up while the server is away; the experiment's worker delivers")
def test_a_worker_with_zero_bytes_free(
    row: Row, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """The worker thread of a running experiment acknowledges and deletes what it delivers, nothing arrives twice."""
    with FaultProxy(mlflow_server.url) as proxy:
        proxy.on("mlflow", status(503), times=None)
        words = ["sh", "-c", f'{_ALONE}\n{_DISK}\nexec {sys.executable} -c "$2" $3 $4 thread', "sh"]
        program = "import os" + textwrap.dedent(_FILL)
        process = subprocess.Popen(
            ["unshare", "-m", *words, str(tmp_path), program, experiment_name, proxy.url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        assert process.stdin is not None
        assert process.stdout is not None
        assert "full 1 ENOSPC\n" == process.stdout.readline()
        proxy.clear()
        out, _ = process.communicate("\n", timeout=120)
    assert "delivered=3002, pending=0, parked=0, dead=0" in out
    assert "'reclaimed_early': 1" in out
    remote = the_run(mlflow_server.url, experiment_name)
    assert ("FINISHED", numbered(3000)) == (remote.info.status, points(mlflow_server.url, remote.info.run_id, "loss"))
    row.done()


@pytest.mark.needs("mounts")
@pytest.mark.fault("F19", "zero bytes free on a disk too small for a reserve: status, flush, gc")
def test_commands_with_zero_bytes_free(
    nest: Nest, row: Row, sqlite_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """Looking works; what was delivered before gives way to the ledger, and the rest arrives."""
    (first,) = offline(tmp_path / "first", sqlite_uri, experiment=experiment_name, points=9000)
    (second,) = offline(tmp_path / "second", sqlite_uri, experiment=f"{experiment_name}-2")
    text = alone(
        nest,
        tmp_path,
        """
        rm first/*/delivery/reserve
        mkdir disk; mount -t tmpfs -o size=4m,mode=0700 tmpfs disk
        cp -a first disk/box
        outbox flush -d disk/box --timeout 60
        cp -a second/*/runs/* disk/box/*/runs/
        cat /dev/zero > disk/filler 2> /dev/null || true
        df --output=avail disk
        outbox status -d disk/box
        outbox gc -d disk/box --dry-run --older-than 0
        outbox flush -d disk/box --timeout 60
        """,
        MLFLOW_OUTBOX_FREE_BYTES="0",
    )
    assert ["0", "0", "0", "0"] == re.findall(r"^code (\d+)$", text, re.MULTILINE), text
    assert re.search(r"^ *0$", text, re.MULTILINE), text
    assert "13 events wait" in text
    assert "of 1 run; 0 delivered runs kept" in text
    assert first != second
    for name, number in ((experiment_name, 9000), (f"{experiment_name}-2", 10)):
        assert numbered(number) == points(sqlite_uri, the_run(sqlite_uri, name).info.run_id, "loss")
    row.done()


#: The command line, on a machine that takes the directory "share" for a network file system.
_MACHINE = """
    from pathlib import Path
    from mlflow_outbox.spool import filesystem
    from mlflow_outbox_worker.cli import main
    point = os.path.realpath("share")
    filesystem.read_mountinfo = lambda: f"1 1 0:1 / {point} rw - nfs4 filer:/ rw"
    filesystem._known.clear()
    code = 0
    for words in sys.argv[1].split(";"):
        print("code", main(words.split()), flush=True)
"""


@pytest.mark.needs("loop")
@pytest.mark.fault("F19", "zero bytes free on a network file system: flush, gc")
def test_a_network_file_system_with_zero_bytes_free(
    nest: Nest, row: Row, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """No room for the words of the lease, nor for a directory to file the run in; all arrives, and room is made."""
    (run_id,) = offline(tmp_path / "box", mlflow_server.url, experiment=experiment_name, points=3000)
    text = alone(
        nest,
        tmp_path,
        f"""
        truncate -s 8M image; mkfs.ext4 -q -F -m 0 image; mkdir share; mount -o loop image share
        device=$(basename "$(findmnt -n -o SOURCE share)"); echo 0 > /sys/fs/ext4/$device/reserved_clusters
        cp -a box share/box; rm -r share/box/*/delivery
        {sys.executable} - <<'end'
{textwrap.dedent(_FULL)}
end
        machine() {{ {sys.executable} -c 'import os, sys{textwrap.dedent(_MACHINE)}' "$1"; }}
        machine "flush -d share/box --timeout 60;gc -d share/box --older-than 0;doctor --offline -d share/box"
        find share/box/*/runs share/box/*/delivered -mindepth 1
        find share/box -name '*host.lease*'
        df --output=avail share
        """,
        MLFLOW_OUTBOX_FREE_BYTES="0",
    )
    assert "full 0\n" in text
    assert ["0", "0"] == re.findall(r"^code (\d+)$", text, re.MULTILINE)[:2], text
    assert "3,003 events delivered" in text
    assert "deleted before its retention time" in text
    assert run_id not in text.split("deleted before")[-1], text
    assert "host.lease" not in text
    assert not re.search(r"^ *0$", text, re.MULTILINE), text
    remote = the_run(mlflow_server.url, experiment_name)
    assert ("FINISHED", numbered(3000)) == (remote.info.status, points(mlflow_server.url, remote.info.run_id, "loss"))
    row.done()
