"""The command line on a disk that is full or read-only: what only looks or deletes needs no room."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from commands import console_script, environment, offline
from contents import numbered, points, the_run
from faults.table import Row

#: Mounts what a script needs in a namespace of its own; "outbox" is the command.
_ALONE = (
    'set -eu; mount --make-rprivate /; cd "$1"; outbox() { code=0; mlflow-outbox "$@" || code=$?; echo "code $code"; }'
)


def alone(folder: Path, script: str, **more: str) -> str:
    """Run a shell script in a mount namespace of its own; return what it wrote."""
    path = f"{console_script().parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", f"{_ALONE}\n{script}", "sh", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
        env=environment(PATH=path, XDG_STATE_HOME=str(folder / "state"), **more),
    )
    assert 0 == done.returncode, done.stdout
    return done.stdout


@pytest.mark.needs("mounts")
@pytest.mark.fault("F22", "replay from a file system that is mounted read-only")
def test_a_replay_from_read_only_media(row: Row, sqlite_uri: str, experiment_name: str, tmp_path: Path) -> None:
    """Everything arrives, the second time nothing is sent; a flush, which would have to write, says why it cannot."""
    offline(tmp_path / "box", experiment=experiment_name)
    text = alone(
        tmp_path,
        f"""
        mkdir media; mount --bind box media; mount -o remount,ro,bind media
        outbox replay media --to {sqlite_uri}
        outbox replay media --to {sqlite_uri}
        outbox status -d media
        outbox flush -d media --timeout 0.5
        """,
    )
    assert ["0", "0", "0", "3"] == re.findall(r"^code (\d+)$", text, re.MULTILINE), text
    assert "1 run sent" in text
    assert "nothing to send: 1 run sent" in text
    assert "Read-only file system" in text
    assert numbered(10) == points(sqlite_uri, the_run(sqlite_uri, experiment_name).info.run_id, "loss")
    row.done()


@pytest.mark.needs("mounts")
@pytest.mark.fault("F19", "zero bytes free: status, flush, gc, and flush again")
def test_commands_with_zero_bytes_free(row: Row, sqlite_uri: str, experiment_name: str, tmp_path: Path) -> None:
    """Looking works, a flush loses nothing and says what is in the way, gc makes room, and the rest arrives."""
    (first,) = offline(tmp_path / "first", sqlite_uri, experiment=experiment_name, points=3000)
    (second,) = offline(tmp_path / "second", sqlite_uri, experiment=f"{experiment_name}-2")
    text = alone(
        tmp_path,
        """
        mkdir disk; mount -t tmpfs -o size=2m,mode=0700 tmpfs disk
        cp -a first disk/box
        outbox flush -d disk/box --timeout 60
        cp -a second/*/runs/* disk/box/*/runs/
        cat /dev/zero > disk/filler 2> /dev/null || true
        df --output=avail disk
        outbox status -d disk/box
        outbox flush -d disk/box --timeout 1
        cat /dev/zero >> disk/filler 2> /dev/null || true
        outbox gc -d disk/box --older-than 0
        outbox flush -d disk/box --timeout 60
        """,
    )
    assert ["0", "0", "3", "0", "0"] == re.findall(r"^code (\d+)$", text, re.MULTILINE), text
    assert re.search(r"^ *0$", text, re.MULTILINE), text
    assert "13 events wait" in text
    assert "of 1 run; 0 kept" in text
    assert first != second
    for name, number in ((experiment_name, 3000), (f"{experiment_name}-2", 10)):
        assert numbered(number) == points(sqlite_uri, the_run(sqlite_uri, name).info.run_id, "loss")
    row.done()
