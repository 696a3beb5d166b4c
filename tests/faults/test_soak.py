"""All at once, again and again: kills, outages, lost and broken answers; and nothing is lost or doubled."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from faults import workload
from faults.children import Nest
from faults.oracle import held
from faults.table import Row
from mlflow_outbox.testing import faults
from mlflow_outbox.testing.proxy import Action, FaultProxy
from servers import MlflowServer

#: Programs that are killed before what they left is delivered and judged.
_ROUND = 3


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
