"""What the tests of replay, bundles and reading back have in common: offline runs, commands, and a machine's state."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import textwrap
from pathlib import Path

from commands import console_script
from contents import QUICK
from mlflow_outbox import MLflowTracker, Settings
from mlflow_outbox_worker.cli import main

NOW_MS = 1_700_000_000_000


def log_offline(
    experiment: str,
    uri: str,
    root: Path,
    *,
    name: str = "offline",
    points: int = 100,
    status: str | None = "FINISHED",
    settings: Settings = QUICK,
) -> str:
    """Log a run to an outbox without delivering it and return its id; without a status it is left unended."""
    tracker = MLflowTracker(experiment, uri, outbox_dir=root, worker="none", settings=settings)
    run = tracker.start_run(name, start_time=NOW_MS, tags={"phase": "train"})
    run.log_params({"depth": 3, "name": name})
    for i in range(points):
        run.log_metric("loss", i / 2, step=i, timestamp=NOW_MS + i)
    run.log_text(f"report of {name}", "reports/report.txt")
    if status is not None:
        run.end(status, end_time=NOW_MS + 100_000)
    tracker.close(0)
    return run.run_id


def the_outbox(root: Path) -> Path:
    """Return the only outbox under a root."""
    [path] = [found.parent for found in root.glob("*/outbox.json")]
    return path


def command(*arguments: object) -> int:
    """Run the command line in this process and return its exit code."""
    return main([str(argument) for argument in arguments])


def contents_of(root: Path) -> dict[str, tuple[int, int, str]]:
    """Return mode, modification time and digest of everything below a directory: what reading only leaves as it is."""
    found = {}
    for path in sorted(root.rglob("*")):
        stat = path.lstat()
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        found[str(path.relative_to(root))] = (stat.st_mode, stat.st_mtime_ns, digest)
    return found


#: A process that runs the installed console script again and again, in forked children that are killed at random
#: moments, until it ends. Forked, because what each attempt would have to import takes longer than what it does.
_KILLER = """
import json, os, random, runpy, select, signal, sys
warm, least, most, kills, script, arguments = json.loads(sys.argv[1])
import mlflow_outbox_worker.cli
for name in warm:
    __import__(name)
pick = random.Random(1)
killed = 0
for attempt in range(kills + 1):
    child = os.fork()
    if child == 0:
        sys.argv = [script, *arguments]
        code = 70
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    # The last attempt may take as long as it takes, however busy the machine is.
    gone = os.pidfd_open(child)
    patience = least * (most / least) ** (attempt / kills) * pick.uniform(0.7, 1.3) if attempt < kills else 3600
    select.select([gone], [], [], patience)
    os.close(gone)
    ended, status = os.waitpid(child, os.WNOHANG)
    if ended:
        print(json.dumps([killed, os.waitstatus_to_exitcode(status)]))
        break
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    killed += 1
"""


def run_with_kills(
    *arguments: object, least: float, most: float, kills: int, mlflow: bool = True, env: dict[str, str] | None = None
) -> tuple[int, int]:
    """Run a command that is killed (SIGKILL) at random moments, and then let it end; return kills and exit code.

    The attempts grow longer from one to the next, so that the first is killed however fast the machine is just now.

    Args:
        arguments: of the command.
        least: seconds after which the first attempt is killed, about.
        most: and the last one.
        kills: how often, at most: an attempt that ends before is the last one.
        mlflow: import MLflow once, before the first attempt.
        env: more variables.
    """
    import json

    warm = ["mlflow_outbox_worker.mlflow_sink.recorder", "mlflow.store.tracking.rest_store"] if mlflow else []
    note = json.dumps([warm, least, most, kills, str(console_script()), [str(argument) for argument in arguments]])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_KILLER), note],
        capture_output=True,
        timeout=280,
        check=False,
        env={**os.environ, **(env or {})},
    )
    lines = done.stdout.decode().splitlines()
    assert lines, done.stderr.decode()[-3000:]
    killed, code = json.loads(lines[-1])
    print(*lines[:-1], done.stderr.decode()[-3000:], sep="\n")  # noqa: T201 - pytest shows it with a failure
    return killed, code
