"""All at once, again and again: kills, outages, lost and broken answers; and nothing is lost or doubled."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import mlflow_outbox.run as run_module
from faults import workload
from faults.children import Nest
from faults.oracle import held
from faults.table import Row
from faults.test_kills import recovered
from mlflow_outbox import MLflowTracker, stopwatch
from mlflow_outbox.testing import faults
from mlflow_outbox.testing.proxy import Action, FaultProxy
from servers import MlflowServer, eventually

#: Programs that are killed before what they left is delivered and judged.
_ROUND = 3
#: Hours of an outage, with twenty events in each.
_HOURS = 8


def any_fault(rng: random.Random) -> Action:
    """Return what happens to one request; half of them are let through."""
    if rng.random() < 0.5:
        return faults.forward()
    return rng.choice(
        [
            faults.status(rng.choice([429, 500, 503])),
            faults.drop(),
            faults.rst_after(rng.randrange(400)),
            faults.rst_request_after(rng.randrange(400)),
            faults.forward_then_drop_response(),
            faults.forward_then_truncate_body(),
            faults.html_page(),
        ]
    )


def log_through_hours(fd: int, uri: str, outbox: str, experiment: str, first: int, changed: dict[str, Any]) -> None:
    """Log on while the server is away, an hour going by between each two of some events; then until it is killed."""
    true = {name: getattr(time, name) for name in ("time", "monotonic", "time_ns", "monotonic_ns")}
    gone = [0.0]
    for name, clock in true.items():
        unit = 1_000_000_000 if name.endswith("_ns") else 1
        setattr(time, name, lambda clock=clock, unit=unit: clock() + type(clock())(gone[0] * unit))
    run_module._time_ns = time.time_ns
    steady = stopwatch.seconds
    setattr(stopwatch, "seconds", lambda: steady() + gone[0])  # noqa: B010 - mypy knows that nobody else may
    given = workload.settings(**changed)
    tracker = MLflowTracker(experiment, uri, outbox_dir=outbox, settings=given)
    run = tracker.start_run(f"hours {first}")
    for hour in range(_HOURS + 1):
        gone[0] = 3600.0 * hour
        for n in range(first + 20 * hour, first + 20 * (hour + 1)):
            if workload.log_event(run, n):
                workload.ack(fd, n)
        tries = tracker.counters.get("retried", 0)
        eventually(lambda tries=tries: tracker.counters.get("retried", 0) > tries, 60, "it tries on")
    workload.tell(fd, gone=gone[0])
    threading.Event().wait()


@pytest.mark.fault("F84", "the server is away for eight hours, by the clock, while a program logs; then it is killed")
def test_an_outage_of_hours_is_over_as_soon_as_the_server_is_back(
    mlflow_server: MlflowServer, experiment_name: str, nest: Nest, row: Row, tmp_path: Path
) -> None:
    """Nothing that was logged in these hours has expired, and it is there without anybody asking for it."""
    changed = {"segment_bytes": 4096, "request_timeout": 2.0, "retry_max": 0.5}
    for number in range(row.pick(1, 5, 100)):
        experiment, outbox = f"{experiment_name}-{number}", tmp_path / f"outbox{number}"
        with FaultProxy(mlflow_server.url) as proxy:
            proxy.down()
            child = nest.start(log_through_hours, proxy.url, str(outbox), experiment, 0, changed)
            eventually(lambda child=child: any(line.startswith("{") for line in child.lines()), 120, "the hours pass")
            proxy.up()
            back = time.monotonic()
            expected = set(range(20 * (_HOURS + 1)))
            assert expected == child.acked()
            eventually(
                lambda experiment=experiment, expected=expected: (
                    expected <= set(held(mlflow_server.database_uri, experiment).events)
                ),
                30,
                "all is there",
            )
            row.worst("seconds_until_there", time.monotonic() - back)
            child.kill()
            recovered(nest, proxy.url, outbox, experiment, expected, expected, 90_000, judge=mlflow_server.database_uri)
        row.done()


@pytest.mark.fault("F84", "programs killed one after another while requests fail at random and the server goes away")
def test_everything_at_once_loses_and_doubles_nothing(
    part: slice,
    mlflow_server: MlflowServer,
    experiment_name: str,
    nest: Nest,
    row: Row,
    rng: random.Random,
    tmp_path: Path,
) -> None:
    """The next program delivers what the killed ones left, through the same faults."""
    changed = {"segment_bytes": 4096, "request_timeout": 2.0, "retry_max": 0.1, "parked_retry": 0.1}
    events = 0
    with FaultProxy(mlflow_server.url) as proxy:
        for number in range(row.pick(1, 40, 4000))[part]:
            experiment, outbox = f"{experiment_name}-{number}", tmp_path / f"outbox{number}"
            acked: set[int] = set()
            issued: set[int] = set()
            for first in range(10_000, 10_000 * (_ROUND + 1), 10_000):
                proxy.script(*(any_fault(rng) for _ in range(12)))
                child = nest.start(
                    workload.log_forever, proxy.url, str(outbox), experiment, first, 1, "thread", changed
                )
                child.wait_for_lines()
                if rng.random() < 0.4:
                    proxy.down()
                child.process.join(rng.uniform(0.05, 0.3))  # the moment of the kill
                child.kill()
                proxy.up()
                acked |= child.acked()
                issued |= workload.issued_by(child.acked(), first, 1)
                row.done()
            proxy.script(*(any_fault(rng) for _ in range(12)))
            # A portal's page parks a run, and a flush does not wait for a person: the program after it has none.
            fresh: set[int] = set()
            for first, last in ((100, False), (200, True)):
                drained = nest.start(workload.drain, proxy.url, str(outbox), experiment, first, changed, 60.0, last)
                report = drained.report()
                fresh |= set(report["acked"])
                proxy.clear()
            assert [0, 0, 0] == [report["left"][key] for key in ("pending", "parked", "dead")], report
            held(mlflow_server.database_uri, experiment).check(acked | fresh, issued | fresh)
            events += len(acked | fresh)
    row.measure(events=events)
