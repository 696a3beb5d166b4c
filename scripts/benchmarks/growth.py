"""How costs grow over three decades: one logging call, and one delivered event of a store that costs nothing.

The store is a double that takes every request at once: what is measured is the outbox's own work alone.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from benchmarks import children
from benchmarks.plan import Plan

_AWAY = "http://127.0.0.1:9"


class _Nowhere:
    """A sink that takes everything."""

    deduplicates_metrics = True
    takes_repeats = False
    parallel = False

    def __init__(self) -> None:
        self._runs = 0
        self.requests = 0

    def experiment_id(self, _name: str) -> str:
        return "1"

    def find_runs(self, _experiment_id: str, _local_id: str) -> list[str]:
        return []

    def create_run(self, _experiment_id: str, **_details: Any) -> str:
        self._runs += 1
        return f"{self._runs:032x}"

    def log_batch(self, *_batch: Any) -> None:
        self.requests += 1

    def update_run(self, *_run: Any, **_status: Any) -> None:
        self.requests += 1

    def close(self) -> None:
        pass


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Log some events to some runs, then deliver them to nowhere."""
    from mlflow_outbox import MLflowTracker, Settings
    from mlflow_outbox.counters import Counters
    from mlflow_outbox.spool.directory import OutboxDirectory
    from mlflow_outbox_worker.delivery import Delivery

    events, runs, keys = request["events"], request["runs"], request["keys"]
    settings = Settings(verify="off")
    tracker = MLflowTracker(
        "growth", _AWAY, outbox_dir=Path(request["directory"]) / "o", worker="none", settings=settings
    )
    names = [f"metric_{index}" for index in range(keys)]
    began = time.perf_counter()
    for _ in range(runs):
        run = tracker.start_run()
        for step in range(events // runs):
            run.log_metric(names[step % keys], 0.5, step=step)
        run.end()
    logged = time.perf_counter() - began
    assert tracker.outbox_path is not None  # noqa: S101 - it was just written to
    directory = OutboxDirectory.open(tracker.outbox_path)
    tracker.close()
    sink, counters = _Nowhere(), Counters()
    delivery = Delivery(
        directory, directory.destination, settings, counters, kind="command", open_sink=lambda *_uri, **_options: sink
    )
    cpu, deadline = time.process_time(), time.monotonic() + 300
    import threading

    worker = threading.Thread(target=delivery.run)
    worker.start()
    while counters["delivered"] < events and time.monotonic() < deadline:
        time.sleep(0.02)
    spent = time.process_time() - cpu
    delivery.stop()
    worker.join()
    if counters["delivered"] < events:
        msg = f"only {counters['delivered']} of {events} events were delivered"
        raise RuntimeError(msg)
    return {"log_us": logged / events * 1e6, "deliver_cpu_us": spent / events * 1e6, "requests": sink.requests}


def measure(plan: Plan) -> dict[str, Any]:
    """Let one number grow at a time."""
    most = 100_000 if plan.quick else 1_000_000
    results: dict[str, list[dict[str, Any]]] = {}
    for name, cases in {
        "events": [(count, 1, 1) for count in (most // 1000, most // 100, most // 10, most)],
        "runs": [(20_000, count, 1) for count in (1, 10, 100, 1000)],
        "metric keys": [(20_000, 1, count) for count in (1, 10, 100, 1000)],
    }.items():
        for events, runs, keys in cases:
            found = children.run("growth", {"events": events, "runs": runs, "keys": keys}, timeout=400)
            plan.say(f"growth: {events:,} events, {runs:,} runs, {keys:,} keys: {found}")
            results.setdefault(name, []).append(found | {"events": events, "runs": runs, "metric keys": keys})
    return results
