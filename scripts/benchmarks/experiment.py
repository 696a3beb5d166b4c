"""What the experiment pays: a loop of steps with one metric each, from the start of the process to its end.

The steps are busy work in Python of a size that is calibrated once, so that a step without tracking takes 0.2 ms.
What tracking costs shows in four numbers: how much longer the whole process takes than one without tracking, how
much longer its loop alone takes, how much more processor time the process uses (which says the same on a machine
that is busy with other things, the tracking server among them), and the longest of its steps.

How much of that is the machine's and not the outbox's, one more row tells: an experiment that logs nothing, beside a
process that posts points to the same server (``posting``).

A subject that delivers to a server must have delivered everything by the time the clock stops, except a worker
process, which exists so that the experiment need not wait for it.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

from benchmarks import children
from benchmarks.numbers import median
from benchmarks.plan import Plan
from benchmarks.posting import posting
from benchmarks.trackers import open_tracker

#: Seconds of one step without tracking.
STEP = 0.0002
#: An experiment that logs nothing, while somebody else keeps the server busy.
ALONGSIDE = "without tracking, another process posting"


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Run the loop with one tracker, or without when its name is ""."""
    name, work, steps = request["tracker"], range(request["work"]), request["steps"]
    metric = finish = None
    if name and name != ALONGSIDE:
        tracker = open_tracker(name, Path(request["directory"]), request["uris"])
        metric, finish = tracker.metric, tracker.finish
    clock, longest = time.perf_counter_ns, 0
    with posting(request["uris"]["http"]) if name == ALONGSIDE else contextlib.nullcontext():
        begin = before = clock()
        for step in range(steps):
            total = 0
            for number in work:
                total += number
            if metric is not None:
                metric("loss", 0.5, step)
            now = clock()
            longest, before = max(longest, now - before), now
        loop = (clock() - begin) / 1e9
    if finish is not None and "process" not in name.split():
        with contextlib.suppress(Exception):  # what a peer says at its end is not measured here
            finish()
    return {"loop_s": loop, "cpu_s": time.process_time(), "longest_step_ms": longest / 1e6}


def measure(plan: Plan) -> dict[str, Any]:
    """Run the loop with every tracker in turn, round after round, each beside one without tracking."""
    work = _calibrated()
    steps = int(plan.loop_seconds / STEP)
    subjects = ["", ALONGSIDE, "outbox interval process http", "outbox interval thread http"]
    subjects += ["plugin process", "plugin thread", "mlflow async http", "mlflow sync http", *plan.peers]
    rounds: dict[str, list[dict[str, Any]]] = {}
    for _ in range(max(1, plan.rounds - 1)):
        bare: dict[str, Any] = {}
        for subject in subjects:
            # These calls take long, or leave much behind for the end: fewer steps tell what the loop pays, though not
            # what the whole process does.
            some = steps // {"mlflow sync http": 200, "mlflow async http": 50}.get(subject, 1)
            found = children.run(
                "experiment",
                {"tracker": subject, "work": work, "steps": some, "uris": plan.stores.uris},
                first=plan.peers.get(subject),
                timeout=plan.loop_seconds * 6 + 60,
            )
            if "error" not in found:
                bare = bare or found
                if some == steps and subject != ALONGSIDE:  # whose start is the other process's
                    found["slowdown"] = found["whole_s"] / bare["whole_s"]
                if some == steps:
                    found["cpu_slowdown"] = found["cpu_s"] / bare["cpu_s"]
                found["loop_slowdown"] = found["loop_s"] / (bare["loop_s"] * some / steps)
            rounds.setdefault(subject or "without tracking", []).append(found)
            plan.say(f"experiment: {subject or 'without tracking'}: {_short(found)}")
    return {subject: median([one for one in found if "error" not in one] or found) for subject, found in rounds.items()}


def _calibrated() -> int:
    """Return how many turns of the inner loop make one step."""
    best, turns = 1.0, 20_000
    for _ in range(20):
        before, total = time.perf_counter(), 0
        for number in range(turns):
            total += number
        best = min(best, (time.perf_counter() - before) / turns)
    return int(STEP / best)


def _short(found: dict[str, Any]) -> str:
    if "error" in found:
        return str(found["error"])
    names = ("slowdown", "loop_slowdown", "cpu_slowdown", "longest_step_ms")
    return ", ".join(f"{name} {found[name]:.3f}" for name in names if name in found)
