"""Time to the server: from the logging call until the point is committed in MLflow.

Points go out at a steady rate; meanwhile another process looks into the server's database every 20 ms, so that
asking does not slow down the server's answers. Each point's step is its number, so that what is there tells what
has arrived.
"""

from __future__ import annotations

import contextlib
import sqlite3
import statistics
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks import children
from benchmarks.numbers import median
from benchmarks.plan import Plan

RATES = (1, 100, 5000)
#: Seconds between two looks at the database.
_LOOK = 0.02


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Log at a steady rate and see when the points arrive."""
    from mlflow_outbox import MLflowTracker

    rate, count = request["rate"], max(4, int(request["rate"] * request["seconds"]))
    key = f"arrival_{time.time_ns()}"
    tracker = MLflowTracker(
        "arrival", request["uri"], outbox_dir=Path(request["directory"]) / "outbox", worker=request["worker"]
    )
    run = tracker.start_run()
    run.log_metric(f"{key}_warm", 0.0, step=0)
    if not tracker.flush(60):
        raise RuntimeError("the first point did not arrive within a minute")
    logged: list[float] = []
    arrived: list[tuple[float, int]] = []
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(request["database"], key, count, arrived, done))
    watcher.start()
    begin = time.perf_counter()
    for number in range(count):
        wait = begin + number / rate - time.perf_counter()
        if wait > 0:
            time.sleep(wait)
        logged.append(time.perf_counter())
        run.log_metric(key, 0.5, step=number)
    done.wait(60)
    watcher.join(1)
    delays, place = [], 0
    for number, moment in enumerate(logged):
        while place < len(arrived) and arrived[place][1] <= number:
            place += 1
        if place < len(arrived):
            delays.append(arrived[place][0] - moment)
    run.end()
    return {
        "median_s": statistics.median(delays) if delays else None,
        "p99_s": sorted(delays)[int(len(delays) * 0.99)] if delays else None,
        "arrived": len(delays) / count,
    }


def _watch(database: str, key: str, count: int, arrived: list[tuple[float, int]], done: threading.Event) -> None:
    """Note how many points of a metric there are, whenever that has changed."""
    connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=5)
    held, deadline = 0, time.monotonic() + 120
    with contextlib.closing(connection):
        while held < count and time.monotonic() < deadline:
            with contextlib.suppress(sqlite3.OperationalError):  # locked by the server just now
                row = connection.execute("SELECT step FROM latest_metrics WHERE key = ?", (key,)).fetchone()
                if row is not None and row[0] + 1 != held:
                    held = row[0] + 1
                    arrived.append((time.perf_counter(), held))
            time.sleep(_LOOK)
    done.set()


def measure(plan: Plan) -> dict[str, Any]:
    """Measure each rate with both kinds of worker."""
    results: dict[str, Any] = {}
    database = str(plan.stores.server.directory / "mlflow.db")
    for worker in ("process", "thread"):
        for rate in RATES:
            rounds = [
                children.run(
                    "arrival",
                    {
                        "uri": plan.stores.server.url,
                        "database": database,
                        "worker": worker,
                        "rate": rate,
                        "seconds": plan.arrivals if rate > 1 else max(6.0, plan.arrivals),
                    },
                )
                for _ in range(max(1, plan.rounds - 1))
            ]
            name = f"{rate:,} per second, worker {worker}"
            plan.say(f"arrival: {name}: {rounds[-1]}")
            results[name] = median([one for one in rounds if "error" not in one] or rounds)
    return results
