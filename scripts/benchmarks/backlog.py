"""Much that waits: opening and asking an outbox, the worker's memory, descriptors and threads, what rests on disk.

The pending events are written by the journal itself at its full speed. The worker's figures are those of a process
of its own whose server is away.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import children
from benchmarks.plan import Plan

#: A port of loopback that nothing listens on (discard).
_AWAY = "http://127.0.0.1:9"
#: Seconds for which an idle worker is watched.
_WATCHED = 5.0


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Fill an outbox, then open it, ask it, and let a worker stand before it."""
    from mlflow_outbox import MLflowTracker

    directory = Path(request["directory"]) / "outbox"
    writer = MLflowTracker("backlog", _AWAY, outbox_dir=directory, worker="none")
    runs = request["runs"]
    for _ in range(runs):
        run = writer.start_run()
        for step in range(request["events"] // runs):
            run.log_metric("loss", 0.5, step=step)
        run.end()
    path = writer.outbox_path
    writer.close()
    size = sum(entry.stat().st_size for entry in Path(str(path)).rglob("*.log"))
    asked = _in_fresh_process(path)
    return asked | _worker(path) | {"bytes_per_event": size / request["events"]}


def ask(path: str) -> None:
    """Open an outbox and count what is pending, as ``status`` does; print how long each took, in seconds."""
    from mlflow_outbox import Settings
    from mlflow_outbox.spool.directory import OutboxDirectory
    from mlflow_outbox_worker.flush import Watch

    begin = time.perf_counter()
    directory = OutboxDirectory.open(Path(path))
    opened = time.perf_counter() - begin
    begin = time.perf_counter()
    found, _ = Watch(directory, Settings()).measure()
    taken = time.perf_counter() - begin
    print(json.dumps({"open_s": opened, "status_s": taken, "pending": found.pending}))


def _in_fresh_process(path: Any) -> dict[str, Any]:
    program = "import sys; from benchmarks.backlog import ask; ask(sys.argv[1])"
    answer = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, check=True)
    found: dict[str, Any] = json.loads(answer.stdout)
    return found


def _worker(path: Any) -> dict[str, Any]:
    """Watch a worker process that cannot deliver: after its first looks it should rest."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow_outbox_worker", str(path)], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdin is not None  # noqa: S101 - PIPE was asked for
    process.stdin.write(b'{"settings": {"linger": 0}, "uri": ""}\n')
    process.stdin.flush()
    try:
        time.sleep(10.0)  # importing MLflow and the first attempts
        before, begin = _cpu(process.pid), time.perf_counter()
        time.sleep(_WATCHED)
        idle = (_cpu(process.pid) - before) / (time.perf_counter() - begin)
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
        fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        return {
            "rss_mb": int(fields["VmRSS"].split()[0]) / 1024,
            "threads": int(fields["Threads"]),
            "fds": len(os.listdir(f"/proc/{process.pid}/fd")),
            "idle_cpu_percent": 100 * idle,
        }
    except OSError as error:  # no /proc on this system, or the worker ended
        return {"worker": f"not measured: {error}"}
    finally:
        process.stdin.close()
        process.terminate()
        process.wait(30)


def _cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(plan: Plan) -> dict[str, Any]:
    """Look at outboxes of growing size, each over three decades or more, and at one of many runs."""
    results: dict[str, Any] = {}
    events = 1000
    while events <= plan.pending:
        results[f"{events:,} events in one run"] = _one(plan, events, 1)
        events *= 10
    results[f"{plan.waiting_runs:,} runs of 2 events"] = _one(plan, 2 * plan.waiting_runs, plan.waiting_runs)
    return results


def _one(plan: Plan, events: int, runs: int) -> dict[str, Any]:
    found = children.run("backlog", {"events": events, "runs": runs}, timeout=600)
    plan.say(f"backlog: {events:,} events in {runs:,} runs: {found}")
    return found | {"events": events, "runs": runs}
