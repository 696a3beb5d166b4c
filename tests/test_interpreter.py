"""Processes that deliver for a program: they find what the program finds, and nothing of the current directory."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from contents import runs
from mlflow_outbox_worker import interpreter

_PROGRAM = """
    import sys
    sys.path[:0] = {paths!r}
    from mlflow_outbox import MLflowTracker

    tracker = MLflowTracker({experiment!r}, {uri!r}, outbox_dir={outbox!r}, worker={worker!r})
    with tracker.start_run("delivered by another process") as run:
        run.log_metric("m", 1.0)
    print(bool(tracker.flush(200)), "mlflow" in sys.modules)
"""


@pytest.mark.parametrize("worker", ["thread", "process"])
@pytest.mark.parametrize("options", [[], ["-I", "-S"]], ids=["as usual", "on a path of its own"])
def test_a_process_that_delivers_imports_what_the_program_would(
    options: list[str], worker: str, sqlite_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """Where the program has changed its path, and where files lie about that are named like modules of Python."""
    here = tmp_path / "here"
    here.mkdir()
    for name in ("json", "mlflow", "queue", "random", "runpy", "types"):
        (here / f"{name}.py").write_text("raise SystemExit('this is not for you')\n")
    program = tmp_path / "program.py"
    outbox = str(tmp_path / "outbox")
    text = _PROGRAM.format(
        paths=[path for path in sys.path if path],
        experiment=experiment_name,
        uri=sqlite_uri,
        outbox=outbox,
        worker=worker,
    )
    program.write_text(textwrap.dedent(text))
    command = [sys.executable, *options, str(program)]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=280, check=False)
    assert (0, "True False\n") == (done.returncode, done.stdout), done.stderr
    assert "this is not for you" not in done.stderr
    assert [("delivered by another process", {"m": 1.0})] == [
        (run.info.run_name, run.data.metrics) for run in runs(sqlite_uri, experiment_name)
    ]


@pytest.mark.parametrize("way", ["delivers for a program", "is a command"])
def test_numpy_starts_no_thread_in_a_process_of_ours(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where none is left, as when data loaders have used up a limit, its OpenBLAS would end the process by a SIGINT."""
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "2")
    code = "import os, numpy; print(len(os.listdir('/proc/self/task')))"
    if way == "is a command":
        code = f"import sys; sys.argv[1:] = ['--version']; from mlflow_outbox_worker.cli import main; main(); {code}"
    environment = interpreter.environment() if way == "delivers for a program" else None
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert "1" == done.stdout.splitlines()[-1]
