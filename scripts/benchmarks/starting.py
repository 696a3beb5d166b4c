"""Starting: importing a tracker, making it, and its first logging call, in a fresh process."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from benchmarks import children
from benchmarks.numbers import median
from benchmarks.plan import Plan
from benchmarks.trackers import open_tracker


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Start one tracker in this process."""
    begin = time.perf_counter()
    tracker = open_tracker(request["tracker"], Path(request["directory"]), request["uris"])
    ready = time.perf_counter()
    tracker.metric("loss", 0.5, 0)
    return {"ready_ms": (ready - begin) * 1000, "first_call_ms": (time.perf_counter() - begin) * 1000}


def measure(plan: Plan) -> dict[str, Any]:
    """Start every tracker in turn, round after round; the first round warms the disk's cache and is not counted."""
    subjects = ["outbox interval none", "outbox interval thread http", "outbox interval process http"]
    subjects += ["mlflow sync http", "mlflow sync sqlite", *plan.peers]
    rounds: dict[str, list[dict[str, Any]]] = {}
    for turn in range(plan.rounds + 1):
        for subject in subjects:
            found = children.run(
                "starting", {"tracker": subject, "uris": plan.stores.uris}, first=plan.peers.get(subject)
            )
            if turn:
                rounds.setdefault(subject, []).append(found)
                plan.say(f"starting: {subject}: {found}")
    return {subject: median([one for one in found if "error" not in one] or found) for subject, found in rounds.items()}
