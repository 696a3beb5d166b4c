"""What the experiment pays: a loop of steps with one metric each, from the start of the process to its end.

The steps are busy work in Python of a size that is calibrated once, so that a step without tracking takes 0.2 ms.
What tracking costs shows in four numbers: how much longer the whole process takes than one without tracking, how much
longer its loop alone takes, how much more processor time the process uses (which says the same on a machine that is
busy with other things, the tracking server among them), and the longest of its steps.

A virtual machine is not equally fast from one second to the next. So a third as many steps without tracking run
before and after each experiment, and each is compared with the mean of the two; the row without tracking is too, and
shows how much of a figure is chance. That is more than the hundredths that are asked for, so two more numbers are
taken, whose two sides share the machine's good and bad seconds: a loop that takes turns with one without tracking
(``alternation``), and, within one loop, the time in its calls beside the time in its steps, which leaves out what
steps pay for the background. Peers, and MLflow's API, run in the first round only, and without turns.

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

from benchmarks import alternation, children
from benchmarks.numbers import median
from benchmarks.plan import Plan
from benchmarks.posting import posting
from benchmarks.trackers import open_tracker

#: Seconds of one step without tracking.
STEP = 0.0002
#: The part of the steps that is run without tracking between two experiments.
_BETWEEN = 3
#: An experiment that logs nothing, while somebody else keeps the server busy.
ALONGSIDE = "without tracking, another process posting"


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Run the loop with one tracker, or without when its name is ""."""
    name, work, steps = request["tracker"], range(request["work"]), request["steps"]
    metric = finish = None
    if name and name != ALONGSIDE:
        tracker = open_tracker(name, Path(request["directory"]), request["uris"])
        metric, finish = tracker.metric, tracker.finish
    clock, longest, worked = time.perf_counter_ns, 0, 0
    with posting(request["uris"]["http"]) if name == ALONGSIDE else contextlib.nullcontext():
        begin_cpu = time.process_time()
        begin = before = clock()
        for step in range(steps):
            total = 0
            for number in work:
                total += number
            worked += clock() - before
            if metric is not None:
                metric("loss", 0.5, step)
            now = clock()
            longest, before = max(longest, now - before), now
        loop = (clock() - begin) / 1e9
        loop_cpu = time.process_time() - begin_cpu
    if finish is not None and "process" not in name.split():
        with contextlib.suppress(Exception):  # what a peer says at its end is not measured here
            finish()
    result = {"loop_s": loop, "loop_cpu_s": loop_cpu, "cpu_s": time.process_time(), "longest_step_ms": longest / 1e6}
    return result | {"calls_percent": 100 * (loop * 1e9 / worked - 1)}


def measure(plan: Plan) -> dict[str, Any]:
    """Run the loop with every tracker in turn, round after round, each between two parts of one without tracking."""
    work = _calibrated()
    steps = int(plan.loop_seconds / STEP)
    ours = ["", ALONGSIDE, "outbox interval process http", "outbox interval thread http"]
    others = ["plugin process", "plugin thread", "mlflow async http", "mlflow sync http", *plan.peers]

    def loop(subject: str, some: int) -> dict[str, Any]:
        request = {"tracker": subject, "work": work, "steps": some, "uris": plan.stores.uris}
        first, timeout = plan.peers.get(subject), plan.loop_seconds * 6 + 60
        return children.run("experiment", request, first=first, timeout=timeout)

    rounds: dict[str, list[dict[str, Any]]] = {}
    for number in range(max(1, plan.rounds - 1)):
        before = loop("", steps // _BETWEEN)
        for subject in ours if number else [*ours, *others]:
            # These calls take long, or leave much behind for the end: fewer steps tell what the loop pays, though not
            # what the whole process does.
            part = {"mlflow sync http": 200, "mlflow async http": 50}.get(subject, 1)
            found = loop(subject, steps // part)
            after = loop("", steps // _BETWEEN)
            if "error" not in found:
                found |= _compared(found, before, after, _BETWEEN / part)
            if part > 1 or subject == ALONGSIDE:  # whose start is the other process's
                found.pop("slowdown", None)
            if part > 1:
                found.pop("cpu_slowdown", None)
            before = after
            if subject in ours and "error" not in found:
                named = "" if subject == ALONGSIDE else subject
                found |= alternation.compare(plan, named, work, alongside=subject == ALONGSIDE)
            rounds.setdefault(subject or "without tracking", []).append(found)
            plan.say(f"experiment: {subject or 'without tracking'}: {_short(found)}")
    return {subject: median([one for one in found if "error" not in one] or found) for subject, found in rounds.items()}


def _compared(found: dict[str, Any], before: dict[str, Any], after: dict[str, Any], times: float) -> dict[str, float]:
    """Return how many times as long an experiment took as one without tracking.

    Args:
        found: the experiment.
        before: a part of one without tracking, and its end.
        after: another one.
        times: as many steps as that part has the experiment.
    """

    def bare(whole: str, loop: str) -> float:
        """Return the seconds without tracking: start and end once, and the loop as often as it takes."""
        return sum(one[whole] + one[loop] * (times - 1) for one in (before, after)) / 2

    return {
        "slowdown": found["whole_s"] / bare("whole_s", "loop_s"),
        "loop_slowdown": found["loop_s"] / bare("loop_s", "loop_s"),
        "cpu_slowdown": found["cpu_s"] / bare("cpu_s", "loop_cpu_s"),
    }


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
    names = ("slowdown", "loop_slowdown", "alternating", "cpu_slowdown", "calls_percent", "longest_step_ms")
    return ", ".join(f"{name} {found[name]:.3f}" for name in names if name in found)
