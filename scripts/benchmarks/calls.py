"""What one logging call costs: the child's loop, and the rounds over all subjects.

The clock's own cost (about 0.1 us) is in every figure. One loop runs for a limited number of calls and a limited
time, whichever ends first, after some calls that are not counted.

A virtual machine has seconds in which everything takes two to five times as long, a bare write and a line of Python
alike. So the outbox has another loop of one metric, in which each second step is a bare write, to a file of its own:
how many times as long as that a call takes is told by the two medians of one loop. The controls "write" and "write
spaced" show how much of that is chance. What a tracker's threads take from its program, they take from the bare write
too; so this says how long a call is, not what it waits for, and is not done with peers, whose threads work more.

The first loop is a program's first seconds, in which what delivers is started: the 99.9th percentile there is ten calls
of ten thousand. The loop with the bare writes comes later in the same program, while it delivers; so its own
percentile is told too, and that of the bare writes between, which wait for the same processors and interpreter.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import children
from benchmarks.numbers import median, quantiles
from benchmarks.plan import Plan
from benchmarks.posting import posting
from benchmarks.trackers import open_tracker

#: Calls that are made before any is counted: files, threads and connections are opened by the first ones.
_WARM_UP = 5
SHAPES = ("one metric", "10 metrics", "100 metrics", "one param", "one tag", "8 threads")
#: While a worker delivers, calls come as an experiment makes them: after some work. Seconds. "write spaced" shows what
#: the machine alone does to such calls, and "write posting" what it does to them while its cores are busy: there,
#: another process posts points to the tracking server (``posting``), as a worker does.
_PAUSE = 0.0002
#: So many times longer such loops may take: calls that come rarely, and the background's rounds, twice a second, that
#: one in a thousand of them meets.
_LONGER = 4
#: Seconds that a tracker may take for its end.
_END = 10.0


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Measure one tracker in this process."""
    tracker = open_tracker(request["tracker"], Path(request["directory"]), request["uris"])
    name = request["tracker"]
    spaced = name in {"write spaced", "write posting"} or (
        name.startswith(("outbox", "plugin")) and " none" not in name
    )
    seconds = request["seconds"] * (_LONGER if spaced else 1)
    result = {}
    with posting(request["uris"]["http"]) if name == "write posting" else contextlib.nullcontext():
        for shape in request["shapes"]:
            calls = _calls(tracker, shape)
            if calls is not None:
                with contextlib.suppress(ValueError):  # threads in which every call failed: the tracker cannot do it
                    result[shape] = quantiles(_timed(shape, calls, request["calls"], seconds, spaced))
        if name.startswith(("outbox", "write")):
            result["one metric"].update(_beside(tracker, request, seconds, spaced))
    # Not measured here; but a queue can take minutes to empty, so an end that takes long is left to itself.
    end = threading.Thread(target=_finish, args=(tracker,), daemon=True)
    end.start()
    end.join(_END)
    return result


def _finish(tracker: Any) -> None:
    with contextlib.suppress(Exception):  # what a peer says at its end is not measured here
        tracker.finish()


def _calls(tracker: Any, shape: str) -> Any:
    """Return a function of the number of the call, or None when the tracker has no such call."""
    metric, metrics, param, tag, _ = tracker
    if shape in {"one metric", "8 threads"}:
        return lambda number: metric("loss", 0.5, number)
    if shape == "one param" and param is not None:
        return lambda number: param(f"param_{number}", "value")
    if shape == "one tag" and tag is not None:
        return lambda number: tag(f"tag_{number}", "value")
    if shape.endswith("metrics") and metrics is not None:
        values = {f"metric_{index}": 0.5 * index for index in range(int(shape.split(maxsplit=1)[0]))}
        return lambda number: metrics(values, number)
    return None


def _timed(shape: str, call: Any, calls: int, seconds: float, spaced: bool) -> list[int]:  # noqa: FBT001 - internal
    for number in range(_WARM_UP):
        call(number)
    if shape != "8 threads":
        return _loop([call], _WARM_UP, calls, seconds, spaced)
    parts: list[list[int]] = []
    threads = [
        threading.Thread(target=lambda at=at: parts.append(_loop([call], at, calls // 8, seconds, spaced)))
        for at in range(1000, 9000, 1000)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [one for part in parts for one in part]


def _beside(tracker: Any, request: dict[str, Any], seconds: float, spaced: bool) -> dict[str, float]:  # noqa: FBT001 - internal
    """Return the median of bare writes, in us, how many times as long that of the calls between them is, and p99.9."""
    steps = [_calls(one, "one metric") for one in (tracker, open_tracker("write", Path(request["directory"]), {}))]
    steps[1](0)  # the file's first page
    durations = _loop(steps, 2 * request["calls"], request["calls"], seconds, spaced)
    ours, writes = (quantiles(durations[first::2]) for first in (0, 1))
    return {
        "write": writes["p50"],
        "times": ours["p50"] / writes["p50"],
        "p99.9 later": ours["p99.9"],
        "write p99.9": writes["p99.9"],
    }


def _loop(
    steps: Sequence[Callable[[int], Any]],
    begin: int,
    calls: int,
    seconds: float,
    spaced: bool,  # noqa: FBT001 - internal
) -> list[int]:
    """Return the nanoseconds of each call; the steps take turns."""
    clock = time.perf_counter_ns
    durations: list[int] = []
    end = clock() + int(seconds * 1e9)
    for number in range(begin, begin + calls):
        call = steps[(number - begin) % len(steps)]
        before = clock()
        call(number)
        after = clock()
        durations.append(after - before)
        if after > end:
            break
        if spaced:
            until = after + int(_PAUSE * 1e9)
            while clock() < until:
                pass
    return durations


def measure(plan: Plan) -> dict[str, Any]:
    """Measure every tracker in turn, round after round.

    Returns:
        By tracker, by shape: quantiles in us, or ``{"error": sentence}``.
    """
    subjects = ["write", "write spaced", "write posting", "diskcache"]
    subjects += ["outbox os none", "outbox interval none", "outbox always none"]
    subjects += ["outbox interval process http", "outbox interval thread http", "plugin process", "plugin thread"]
    subjects += [f"mlflow {manner} {store}" for manner in ("sync", "async") for store in ("http", "sqlite")]
    rounds: dict[str, list[dict[str, Any]]] = {}
    for _ in range(plan.rounds):
        for subject in [*subjects, *plan.peers]:
            rounds.setdefault(subject, []).append(
                children.run(
                    "calls",
                    {
                        "tracker": subject,
                        "shapes": SHAPES,
                        "calls": plan.calls,
                        "seconds": plan.call_seconds,
                        "uris": plan.stores.uris,
                    },
                    first=plan.peers.get(subject),
                )
            )
            plan.say(f"calls: {subject}: {_short(rounds[subject][-1])}")
    return {subject: _merged(found) for subject, found in rounds.items()}


def _merged(found: list[dict[str, Any]]) -> dict[str, Any]:
    good = [one for one in found if "error" not in one]
    if not good:
        return found[0]
    return {shape: median([one[shape] for one in good]) for shape in SHAPES if shape in good[0]}


def _short(result: dict[str, Any]) -> str:
    one = result.get("one metric")
    if not one:
        return str(result.get("error", "no such call"))
    if "times" not in one:
        return f"{one['p50']:.1f} us, p99.9 {one['p99.9']:.0f} us"
    later = f"later {one['p99.9 later']:.0f} us, of the writes {one['write p99.9']:.0f} us"
    return f"{one['p50']:.1f} us, {one['times']:.1f} times a bare write beside it, p99.9 {one['p99.9']:.0f} us, {later}"
