"""Draining a backlog, beside hand-written ``log_batch`` calls of 1,000 points over one connection.

The hand-written program is what somebody would write who has all points at hand: MLflow's own client, runs created
first, batches as large as MLflow takes them, the status at the end. The outbox does the same from its journal, finds
out first that the run is not there yet, keeps its ledger, and reads every run back.

What a batch costs that has arrived already is measured with a copy of an outbox that was taken before it was delivered,
as a worker's death between an answer and its record leaves it: each of its batches is sent once more to where it is.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import time
from pathlib import Path
from typing import Any

from benchmarks import children
from benchmarks.numbers import median
from benchmarks.plan import Plan

#: Added to each round trip, seconds.
DELAY = 0.05
_BATCH = 1000


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Drain one backlog in this process."""
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"  # for the hand-written program; the outbox needs no permission
    uri, delay = request["uri"], request["delay"]
    with contextlib.ExitStack() as stack:
        proxy = None
        if request["proxy"]:
            from mlflow_outbox.testing.faults import delay as slower
            from mlflow_outbox.testing.proxy import FaultProxy

            proxy = stack.enter_context(FaultProxy(uri))
            uri = proxy.url
            if delay:
                proxy.on("", slower(delay), times=None)
        drain = {"by hand": _by_hand, "outbox": _by_outbox, "again": _again}[request["who"]]
        result = drain(uri, request["runs"], request["points"] // request["runs"], Path(request["directory"]))
        if proxy is not None:
            result["requests"] = len(proxy.requests)
            result["request_bytes"] = sum(len(one.body) for one in proxy.requests)
    result["points_per_s"] = request["points"] / result["seconds"]
    result["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return result


def _by_hand(uri: str, runs: int, points: int, _directory: Path) -> dict[str, Any]:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    client = MlflowClient(uri)
    experiment = client.create_experiment(f"by-hand-{time.time_ns()}", artifact_location="/nowhere")
    now = time.time_ns() // 1_000_000
    begin, cpu = time.perf_counter(), time.process_time()
    for _ in range(runs):
        run_id = client.create_run(experiment).info.run_id
        for start in range(0, points, _BATCH):
            some = range(start, min(points, start + _BATCH))
            client.log_batch(run_id, [Metric("loss", 0.5 * step, now + step, step) for step in some])
        client.set_terminated(run_id)
    return {"seconds": time.perf_counter() - begin, "cpu_s": time.process_time() - cpu}


def _by_outbox(uri: str, runs: int, points: int, directory: Path) -> dict[str, Any]:
    name, size = _logged(uri, runs, points, directory)
    return _drained(name, uri, directory / "outbox") | {"bytes_per_event": size / (runs * points)}


def _again(uri: str, runs: int, points: int, directory: Path) -> dict[str, Any]:
    """Deliver a backlog, then a copy that knows nothing of that; return the second, with the seconds of the first."""
    name, _ = _logged(uri, runs, points, directory)
    shutil.copytree(directory / "outbox", directory / "copy")
    first, again = _drained(name, uri, directory / "outbox"), _drained(name, uri, directory / "copy")
    return again | {"first_seconds": first["seconds"], "ratio": again["seconds"] / first["seconds"]}


def _logged(uri: str, runs: int, points: int, directory: Path) -> tuple[str, int]:
    """Log a backlog offline; return its experiment and the bytes of its segments."""
    from mlflow_outbox import MLflowTracker

    tracker = MLflowTracker(f"outbox-{time.time_ns()}", uri, outbox_dir=directory / "outbox", worker="none")
    for _ in range(runs):
        run = tracker.start_run()
        for step in range(points):
            run.log_metric("loss", 0.5 * step, step=step)
        run.end()
    size = sum(file.stat().st_size for file in (directory / "outbox").rglob("*.log"))
    tracker.close()
    return tracker.experiment_name, size


def _drained(name: str, uri: str, root: Path) -> dict[str, Any]:
    """Deliver everything in the outbox below a directory, as ``mlflow-outbox flush`` does."""
    from mlflow_outbox import MLflowTracker
    from mlflow_outbox_worker.cli import main as command
    from mlflow_outbox_worker.mlflow_sink import open_sink

    # MLflow is imported and the store opened before the clock starts, as for the hand-written program.
    open_sink(uri).close()
    outbox = MLflowTracker(name, uri, outbox_dir=root, worker="none").outbox_path
    begin, cpu = time.perf_counter(), time.process_time()
    code = command(["flush", "--quiet", "--outbox-dir", str(outbox), "--timeout", "3600"])
    seconds, spent = time.perf_counter() - begin, time.process_time() - cpu
    if code:
        msg = f"not everything was delivered: flush ended with {code}"
        raise RuntimeError(msg)
    return {"seconds": seconds, "cpu_s": spent}


#: (store, whether many runs of 1,000 points share them, seconds added to each round trip): what is drained.
CASES = (
    ("http", False, 0.0),
    ("sqlite", False, 0.0),
    ("file", False, 0.0),
    ("http", True, 0.0),
    ("sqlite", True, 0.0),
    ("file", True, 0.0),
    ("http", False, DELAY),
    ("http", True, DELAY),
)


def measure(plan: Plan) -> dict[str, Any]:
    """Drain every backlog both ways, in turn, round after round; add requests and bytes, counted once."""
    results: dict[str, Any] = {}
    for store, many, delay in CASES:
        # The distance shows in a tenth of the points, beside as many without it.
        points = max(10_000, plan.points // 10) if delay else plan.points
        runs = points // 1000 if many else 1
        name = f"{store}, {runs:,} run{'s' if runs > 1 else ''}{', 50 ms more' if delay else ''}"
        subjects = {"by hand": delay, "outbox": delay} | ({"outbox, without": 0.0} if delay else {})
        rounds: list[dict[str, Any]] = []
        for turn in range(max(1, plan.rounds - 1)):
            found: dict[str, Any] = {}
            for who in list(subjects) if turn % 2 == 0 else list(subjects)[::-1]:
                request = {
                    "uri": plan.stores.fresh(store),
                    "who": "by hand" if who == "by hand" else "outbox",
                    "runs": runs,
                    "points": points,
                    "delay": subjects[who],
                    "proxy": bool(delay),
                }
                found[who] = children.run("draining", request, timeout=1800)
            plan.say(f"draining: {name}: {_short(found)}")
            rounds.append(found)
        results[name] = _merged(rounds, points)
    results["counted"] = {who: _counted(plan, who) for who in ("by hand", "outbox")}
    results["again"] = _redelivered(plan)
    return results


def _counted(plan: Plan, who: str) -> dict[str, Any]:
    """Count the requests and bytes of one small backlog."""
    request = {"uri": plan.stores.fresh("http"), "who": who, "runs": 10, "points": 20_000, "delay": 0.0, "proxy": True}
    return children.run("draining", request)


def _redelivered(plan: Plan) -> dict[str, Any]:
    """Measure what batches cost that have arrived already, for each kind of store, with one run."""
    results: dict[str, Any] = {}
    points = max(10_000, plan.points // 10)
    for store in ("http", "sqlite", "file"):
        found = []
        for _ in range(plan.rounds):
            request = {"who": "again", "runs": 1, "points": points, "delay": 0.0, "proxy": False}
            found.append(children.run("draining", request | {"uri": plan.stores.fresh(store)}, timeout=1800))
        good = [one for one in found if "error" not in one]
        results[store] = {"points": points, **median(good)} if good else found[0]
        plan.say(f"draining: {store}, again: {results[store].get('ratio', results[store].get('error'))}")
    return results


def _merged(rounds: list[dict[str, Any]], points: int) -> dict[str, Any]:
    good = [found for found in rounds if all("error" not in one for one in found.values())]
    if not good:
        return rounds[0]
    ratios = [{"ratio": found["by hand"]["seconds"] / found["outbox"]["seconds"]} for found in good]
    merged = {who: median([found[who] for found in good]) for who in good[0]}
    if "outbox, without" in merged:
        kept = [{"kept": found["outbox, without"]["seconds"] / found["outbox"]["seconds"]} for found in good]
        merged |= median(kept)
    return {"points": points, **merged, **median(ratios)}


def _short(found: dict[str, Any]) -> str:
    for who, one in found.items():
        if "error" in one:
            return f"{who}: {one['error']}"
    hand, outbox = found["by hand"]["points_per_s"], found["outbox"]["points_per_s"]
    rest = ""
    if "outbox, without" in found:
        without = found["outbox, without"]["points_per_s"]
        rest = f"; without the distance {without:,.0f}, of which it keeps {outbox / without:.2f}"
    return f"{outbox:,.0f} points/s, by hand {hand:,.0f}, ratio {outbox / hand:.2f}{rest}"
