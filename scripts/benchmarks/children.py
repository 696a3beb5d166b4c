"""Runs one measurement of one subject in a process of its own, so that nothing of one tracker lives on in the next.

A child is a module of this package with a function ``main(request) -> result``; request and result are JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

#: The variable that says when a child was started, in seconds since the epoch; what the child starts has it too.
STARTED = "BENCH_STARTED"

_TELEMETRY_OFF = {
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_SILENT": "true",
    "WANDB_ERROR_REPORTING": "false",
    "AIM_DISABLE_TELEMETRY": "1",
    "DVC_NO_ANALYTICS": "1",
    "ITERATIVE_DO_NOT_TRACK": "1",
    "COMET_LOGGING_CONSOLE": "ERROR",
    "NEPTUNE_LOGGER_LEVEL": "error",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


def run(module: str, request: dict[str, Any], *, first: Path | None = None, timeout: float = 240.0) -> dict[str, Any]:
    """Run ``benchmarks.<module>.main(request)`` in a new process and return its result, or ``{"error": sentence}``.

    Args:
        module: the module's name.
        request: its argument; ``directory`` is added, an empty directory that is removed afterwards.
        first: a directory in which packages are looked for first.
        timeout: seconds after which the child is ended.
    """
    roots = [str(first)] if first else []
    environment = os.environ | _TELEMETRY_OFF
    environment["PYTHONPATH"] = os.pathsep.join([*filter(None, [environment.get("PYTHONPATH")]), *roots])
    with tempfile.TemporaryDirectory(prefix="mlflow-outbox-bench-", ignore_cleanup_errors=True) as directory:
        answer = Path(directory) / "answer.json"
        environment.update(HOME=directory, TMPDIR=directory, XDG_CONFIG_HOME=directory)
        environment[STARTED] = str(time.time())
        with (Path(directory) / "child.log").open("w+b") as log:
            try:
                code = subprocess.run(
                    [sys.executable, "-m", "benchmarks.children", module, str(answer)],
                    input=json.dumps(request | {"directory": directory, "first": roots}).encode(),
                    stdout=log,
                    stderr=log,
                    env=environment,
                    cwd=directory,
                    timeout=timeout,
                    check=False,
                ).returncode
            except subprocess.TimeoutExpired:
                return {"error": f"not done after {timeout:.0f} s"}
            if answer.exists():
                result: dict[str, Any] = json.loads(answer.read_text())
                return result | {"whole_s": time.time() - float(environment[STARTED])}
            log.seek(0)
            lines = log.read().decode("utf-8", "replace").strip().splitlines()
        errors = [line for line in lines if "Error: " in line] or lines or ["no output"]
        return {"error": f"exit code {code}: {errors[-1][:200]}"}


def started() -> float:
    """Return when this child was started, in seconds since the epoch."""
    return float(os.environ[STARTED])


def _main() -> None:
    request = json.loads(sys.stdin.read())
    sys.path[:0] = request.pop("first")  # before the environment's own packages
    result = importlib.import_module(f"benchmarks.{sys.argv[1]}").main(request)
    draft = Path(sys.argv[2] + ".draft")
    draft.write_text(json.dumps(result))
    draft.rename(sys.argv[2])
    if sys.argv[1] == "calls":
        os._exit(0)  # the others are measured to their very end


if __name__ == "__main__":
    _main()
