"""Clocks that jump, stand still and are hours ahead after a suspend, while a program logs and delivers (F40, F41)."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from faults import workload
from faults.children import Nest
from faults.clocks import Clocks
from faults.oracle import held, kind_of, time_of
from faults.table import Row
from mlflow_outbox import MLflowTracker
from mlflow_outbox.spool import frame
from mlflow_outbox.spool.events import Metric, Tags, encode
from mlflow_outbox.testing import faults
from mlflow_outbox.testing.proxy import FaultProxy
from mlflow_outbox_worker.delivery import Delivery
from servers import MlflowServer, eventually

HOUR = 3600.0
YEAR = 365 * 24 * HOUR
#: A wall clock that is wrong by so many seconds: jumps, the end of daylight saving time on a machine whose clock
#: shows local time (an hour back, later one ahead), 1970, and standing still (None), so that all readings are equal.
JUMPS = (-HOUR, HOUR, -10 * YEAR, -100 * YEAR, None, 10 * YEAR, 0.0, -HOUR, 0.0)


class Elsewhere:
    """A segment of a run that another machine writes on this disk: only its age tells whether its writer lives."""

    def __init__(self, run: Path) -> None:
        first = next(run.glob("*-000000.log"))
        ours, _ = frame.unpack_header(first.read_bytes())
        head = msgspec.structs.replace(ours, writer="e" * 16, ordinal=0, first_seq=0, boot_id="of another machine")
        self._seed = head.seed
        self._next = 0
        self._path = run / f"{head.writer}-000000.log"
        self._write(frame.pack_header(head))
        self._path.chmod(0o600)

    def log(self, number: int) -> None:
        """Log an event, one that is a metric or a tag, in two pieces: a reader may look between them."""
        if kind_of(number) == "tag":
            event: Metric | Tags = Tags({f"t{number}": f"value {number}"}, 1_700_000_000_000)
        else:
            event = Metric("loss", number / 2, time_of(number) or 1_700_000_000_000, number)
        data = frame.pack(encode(event), self._next, self._seed)
        self._next += 1
        self._write(data[:9])
        self._write(data[9:])

    def _write(self, data: bytes) -> None:
        with self._path.open("ab") as file:
            file.write(data)


def under_jumps(fd: int, uri: str, outbox: str, jumps: list[float | None]) -> None:
    """Log and deliver with a wall clock that jumps, beside a writer elsewhere, and report."""

    def work() -> dict[str, Any]:
        clocks = Clocks()
        assert clocks.replaced, "no clock of ours was found"
        tracker = MLflowTracker("clock", uri, outbox_dir=outbox, settings=workload.settings())
        run = tracker.start_run("clock")
        run.set_tag("first", "there")
        tracker.flush(20)
        elsewhere = Elsewhere(workload.directory_of(outbox, uri) / "runs" / run.run_id)
        n, leases = 0, set()
        for jump in [0.0, *jumps]:
            clocks.wall, clocks.still = jump or 0.0, None if jump is not None else clocks.time_ns()
            for _ in range(10):
                if workload.log_event(run, n):
                    workload.ack(fd, n)
                n += 1
            for _ in range(3):
                while kind_of(n) not in {"metric", "tag"}:
                    n += 1
                elsewhere.log(n)
                workload.ack(fd, n)
                n += 1
            run.set_tag("last", str(n))
            tracker.flush(20)
            leases.add(workload.lease_pid(outbox, uri))
        run.end()
        left = tracker.flush(30)
        return {
            "left": [left.pending, left.parked, left.dead],
            "last": n,
            "counters": tracker.counters,
            "ours": leases == {os.getpid()},
        }

    workload.reported(fd, work)


@pytest.mark.fault("F40", "the wall clock -1 h, +1 h, -10 y, to 0, stands still, +10 y, an hour back and forth")
def test_a_wall_clock_that_jumps_costs_nothing(
    empty_database: Callable[[Path], Path], nest: Nest, row: Row, tmp_path: Path
) -> None:
    """All events arrive, those of a silent writer too, none expires, the lease stays, and the last tag is the last."""
    for number in range(row.pick(1, 34, 334)):
        database = empty_database(tmp_path / f"{number}.db")
        jumps = list(JUMPS)
        child = nest.start(under_jumps, f"sqlite:///{database}", str(tmp_path / f"outbox{number}"), jumps)
        report = child.report()
        assert [0, 0, 0] == report["left"], report
        held(f"sqlite:///{database}", "clock").check(child.acked())
        connection = sqlite3.connect(database)
        ((last,),) = connection.execute("SELECT value FROM tags WHERE key = 'last'").fetchall()
        connection.close()
        assert str(report["last"]) == last
        assert report["ours"], "the lease was lost"
        assert not report["counters"].get("quarantined"), report
        row.done(len(jumps))


#: Seconds of a night.
NIGHT = 8 * HOUR
#: How a machine was suspended, its settings, and the seconds in which all has to be there afterwards: the pauses of the
#: first are over only because the night counts.
SUSPENDS: dict[str, tuple[float, dict[str, Any], float]] = {
    "its monotonic clock goes on": (NIGHT, {"retry_initial": HOUR, "retry_max": 2 * HOUR}, 5.0),
    "its monotonic clock stands": (0.0, {"retry_max": 0.2}, 5.2),
    "in the middle of a request": (NIGHT, {"retry_max": 0.2, "request_timeout": 1.0}, 6.2),
}


def is_away(tracker: MLflowTracker) -> bool:
    """Return whether delivery has been refused, and its pause has begun."""
    worker: Any = tracker._outbox and tracker._outbox._worker
    loop = worker.delivery._loop if worker and worker.delivery else None
    return isinstance(loop, Delivery) and loop.condition()[0] == "away"


def suspended(
    fd: int, uri: str, outbox: str, experiment: str, gap: float, signs: str, changed: dict[str, Any], asked: str
) -> None:
    """Log, be suspended for a night when told to, log on, and report when told to; nothing is flushed.

    With ``asked`` "refused" the night begins in the pause after a refusal, with "waiting" in the middle of a request.
    """

    def work() -> dict[str, Any]:
        clocks = Clocks()
        tracker = MLflowTracker(experiment, uri, outbox_dir=outbox, settings=workload.settings(**changed))
        run = tracker.start_run("suspended")
        for number in range(30):
            if number == 20:
                eventually(Path(signs, "suspend").exists, 60)
                if asked == "refused":
                    eventually(lambda: is_away(tracker), 60, "the server has refused something")
                clocks.gap, clocks.wall = gap, NIGHT
            if workload.log_event(run, number):
                workload.ack(fd, number)
        eventually(Path(signs, "end").exists, 60)
        return {"counters": tracker.counters, "ours": workload.lease_pid(outbox, uri) == os.getpid()}

    workload.reported(fd, work)


@pytest.mark.fault("F41", "suspended for eight hours: away from the server, and in the middle of a request to it")
@pytest.mark.parametrize("how", SUSPENDS)
def test_a_suspended_machine_goes_on_at_once_and_has_lost_nothing(
    how: str, mlflow_server: MlflowServer, experiment_name: str, nest: Nest, row: Row, tmp_path: Path
) -> None:
    """I6: what was logged before and after arrives within the back-off and 5 s; the lease stays, nothing expires."""
    gap, changed, most = SUSPENDS[how]
    slowest = 0.0
    for turn in range(row.pick(1, 5, 20)):
        experiment, signs = f"{experiment_name}-{turn}", tmp_path / f"signs{turn}"
        signs.mkdir()
        with FaultProxy(mlflow_server.url) as proxy:
            asked = "waiting" if how == "in the middle of a request" else "refused"
            proxy.on("", faults.forward_then_hang() if asked == "waiting" else faults.status(503), times=None)
            outbox = str(tmp_path / f"outbox{turn}")
            child = nest.start(suspended, proxy.url, outbox, experiment, gap, str(signs), changed, asked)
            child.wait_for_lines(20)
            eventually(lambda proxy=proxy: proxy.requests, 60, "the server is asked, and is away")
            proxy.clear()
            (signs / "suspend").touch()
            child.wait_for_lines(30)
            took = workload.seconds_until(
                lambda experiment=experiment: set(range(30)) <= set(held(mlflow_server.database_uri, experiment).events)
            )
            slowest = max(slowest, took)
            (signs / "end").touch()
            report = child.report()
        held(mlflow_server.database_uri, experiment).check(set(range(30)))
        assert set(range(30)) == child.acked()
        assert report["ours"], report
        assert not report["counters"].get("dead_letters"), report
        row.done()
    row.measure(slowest_s=slowest)
    assert slowest < most + workload.PATIENCE
