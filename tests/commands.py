"""The installed command, in a process of its own or in the test's, and outboxes for it to work on."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import select
import signal
import subprocess
import sysconfig
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mlflow_outbox import MLflowTracker, Settings
from mlflow_outbox_worker.cli import main

#: A port that nobody listens at: connections are refused at once.
NOBODY = "http://127.0.0.1:9"
#: The pauses of ``contents.QUICK`` for a process of its own.
QUICK_ENVIRONMENT = {
    "MLFLOW_OUTBOX_POLL_INTERVAL": "0.02",
    "MLFLOW_OUTBOX_RETRY_INITIAL": "0.02",
    "MLFLOW_OUTBOX_RETRY_MAX": "0.2",
}


#: Seconds after which a command that does not end fails its test.
_PATIENCE = 280.0


class Done(NamedTuple):
    """What a command came to."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        """Standard output, read as JSON."""
        return json.loads(self.out)


@functools.cache
def console_script() -> Path:
    """Return the ``mlflow-outbox`` that users run: the one installed in the environment of the tests."""
    path = Path(sysconfig.get_path("scripts")) / "mlflow-outbox"
    assert path.is_file(), f"{path} is not there; install the project into the environment of the tests: scripts/test"
    return path


def command(*words: object) -> list[str]:
    """Return the command line of a command."""
    return [str(console_script()), *map(str, words)]


def closing(streams: str, *words: str) -> list[str]:
    """Return the command line of a command whose streams a shell redirects: ``>&-`` closes its standard output."""
    return ["bash", "-c", f'exec "$@" {streams}', "bash", *words]


def environment(**more: str) -> dict[str, str]:
    """Return the environment for a command in a process of its own."""
    return {**os.environ, **QUICK_ENVIRONMENT, **more}


def start(*words: object, **more: str) -> subprocess.Popen[str]:
    """Start a command in a process of its own, with both its outputs in one pipe; ctrl-C interrupts it."""
    return subprocess.Popen(
        command(*words),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(**more),
        preexec_fn=take_interrupts,  # noqa: PLW1509 - one system call, which no thread of this process can hold up
    )


def take_interrupts() -> None:
    """Undo what a shell does to its jobs in the background: they ignore SIGINT, and so do their children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(*words: object, **more: str) -> Done:
    """Run a command in a process of its own."""
    done = subprocess.run(
        command(*words), capture_output=True, text=True, timeout=_PATIENCE, env=environment(**more), check=False
    )
    return Done(done.returncode, done.stdout, done.stderr)


def waited(*words: object) -> tuple[Done, float]:
    """Run a command; return also for how many seconds it waited, whatever for.

    That leaves out the time in which its main thread computed, and that in which it could not because the processors
    were busy with others: how fast the machine is at the moment says nothing about how a command keeps its time.
    """
    started = time.monotonic()
    process = subprocess.Popen(
        command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    at_work = busy_until_it_ends(process.pid)
    spent = time.monotonic() - started
    out, err = process.communicate()
    return Done(process.returncode, out, err), spent - at_work


def busy(pid: int) -> float:
    """Return for how many seconds the main thread of a process has computed, or could not for want of a processor."""
    computed, kept_waiting, _ = Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()
    return (int(computed) + int(kept_waiting)) / 1e9


def busy_until_it_ends(pid: int, before: float = 0.0) -> float:
    """Wait for the end of a process that says little until then, a child of this one; return how busy it was.

    Args:
        pid: the process.
        before: how busy it had been when it was looked at last.
    """
    ended, found = os.pidfd_open(pid), before
    while not select.select([ended], [], [], 0.01)[0]:
        with contextlib.suppress(OSError):  # it has ended just now
            found = max(found, busy(pid))
    os.close(ended)
    return found


class Here:
    """Runs commands in the test's own process, where mlflow is imported once."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys = capsys
        for name, value in QUICK_ENVIRONMENT.items():
            monkeypatch.setenv(name, value)

    def __call__(self, *words: object) -> Done:
        """Run a command."""
        self._capsys.readouterr()
        code = main([str(word) for word in words])
        out, err = self._capsys.readouterr()
        return Done(code, out, err)


def offline(
    root: Path, uri: str = NOBODY, *, experiment: str = "experiment", runs: int = 1, points: int = 10, end: bool = True
) -> list[str]:
    """Log some runs without delivering them; return their ids."""
    tracker = MLflowTracker(experiment, uri, outbox_dir=root, worker="none", settings=Settings(sync="os"))
    ids = []
    for number in range(runs):
        one = tracker.start_run(f"run-{number}")
        one.log_param("number", number)
        for step in range(points):
            one.log_metric("loss", step / 2, step=step)
        if end:
            one.end()
        ids.append(one.run_id)
    tracker.close()
    return ids


def make_unreadable(segment: Path) -> None:
    """Overwrite the beginning of a segment, so that both copies of its header are gone."""
    with segment.open("r+b") as file:
        file.write(bytes(600))


def withhold(monkeypatch: pytest.MonkeyPatch, run_id: str) -> None:
    """Let the disk give nothing of a run: an input/output error at its directory."""
    listdir = os.listdir

    def failing(path: Any = ".") -> Any:
        if not isinstance(path, int) and Path(os.fsdecode(path)).name == run_id:
            raise OSError(errno.EIO, os.strerror(errno.EIO), os.fspath(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", failing)


def withhold_runs(monkeypatch: pytest.MonkeyPatch, outbox: Path) -> None:
    """Let the disk not say which runs an outbox has: an input/output error at the directory of all."""
    scandir = os.scandir

    def failing(path: Any = ".") -> Any:
        if not isinstance(path, int) and Path(os.fsdecode(path)) == outbox / "runs":
            raise OSError(errno.EIO, os.strerror(errno.EIO), os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)


def outbox_of(root: Path) -> Path:
    """Return the only outbox in a directory."""
    (path,) = [entry.parent for entry in root.glob("*/outbox.json")]
    return path
