"""The command line on file systems of its own: a shell script in a mount namespace, whose commands are forked warm.

A command that is started anew imports MLflow for seconds; here it is forked from a process that has all of it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from commands import environment
from faults import workload
from faults.children import Nest
from faults.mounts import own_namespace
from mlflow_outbox_worker.cli import main

#: "outbox" is the command: its words go to the process that forks, which answers with the exit code.
_SHELL = """
set -eu; cd "$1"; trap 'echo > asked' EXIT
outbox() { printf '%s\\n' "$@" > asked; echo "code $(cat answered)"; }
"""


def alone(nest: Nest, folder: Path, script: str, **more: str) -> str:
    """Run a shell script in a mount namespace of its own; return what it and its commands wrote.

    Args:
        nest: where the commands are forked.
        folder: where the script runs.
        script: for sh; ``outbox`` is the command.
        **more: environment variables.
    """
    given = environment(XDG_STATE_HOME=str(folder / "state"), **more)
    report = nest.start(_run, str(folder), script, given).report()
    said = (folder / "said").read_text()
    assert 0 == report["code"], said
    return said


def _run(fd: int, folder: str, script: str, given: dict[str, str]) -> None:
    def work() -> dict[str, int]:
        own_namespace()
        os.environ.clear()
        os.environ.update(given)
        os.chdir(folder)
        os.mkfifo("asked")
        os.mkfifo("answered")
        said = os.open("said", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        with subprocess.Popen(["sh", "-c", _SHELL + script, "sh", folder], stdout=said, stderr=said) as shell:
            while any(words := Path("asked").read_text().split("\n")[:-1]):
                code = _command(words, said)
                Path("answered").write_text(f"{code}\n")
        return {"code": shell.returncode}

    workload.reported(fd, work)


def _command(words: list[str], said: int) -> int:
    command = os.fork()
    if command == 0:
        os.dup2(said, 1)
        os.dup2(said, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        code = 70
        try:
            code = main(words)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(command, 0)[1])
