"""Every way to end, worker threads that die, workers that stand still."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from faults import workload
from faults.children import Nest
from faults.table import Row
from faults.test_kills import recovered
from faults.test_space import check_manners, log_timed
from mlflow_outbox import MLflowTracker
from servers import MlflowServer, eventually


def end_by(fd: int, uri: str, outbox: str, how: str, base: int) -> None:
    """Log, and end in one of the ways in which programs end."""
    tracker = MLflowTracker("ends", uri, outbox_dir=outbox, settings=workload.settings(exit_timeout=0.2))
    run = tracker.start_run(how)

    def log(first: int, last: int) -> None:
        for n in range(base + first, base + last):
            if workload.log_event(run, n):
                workload.ack(fd, n)

    class Late:
        def __del__(self) -> None:
            log(500, 510)

    late = Late()
    log(0, 100)
    if how == "SIGTERM":
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
    if how == "os._exit":
        os._exit(3)
    if how == "SIGINT":
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(60)  # another thread may get the signal, and this one its interrupt a moment later
    if how == "__del__":
        del late
    if how == "a closed tracker":
        tracker.close(0.1)
        log(100, 120)
    if how == "a daemon thread":
        threading.Thread(target=log, args=(10_000, 18_000), daemon=True).start()
    if how == "sys.exit":
        sys.exit(3)
    if how == "an exception":
        raise RuntimeError(how)


@pytest.mark.fault("F04", "SIGTERM, SIGINT, sys.exit, os._exit, an exception, __del__, a daemon thread (F06)")
def test_every_way_to_end_keeps_every_event(
    empty_database: Callable[[Path], Path], nest: Nest, row: Row, tmp_path: Path
) -> None:
    """The next program delivers what the ended one acknowledged."""
    ways = {
        "SIGTERM": -signal.SIGTERM,
        "SIGINT": 1,  # KeyboardInterrupt, which nobody catches
        "os._exit": 3,
        "sys.exit": 3,
        "an exception": 1,
        "__del__": 0,
        "a closed tracker": 0,
        "a daemon thread": 0,
    }
    for turn in range(row.pick(1, 50, 500)):
        uri = f"sqlite:///{empty_database(tmp_path / f'{turn}.db')}"
        outbox = tmp_path / f"outbox{turn}"
        acked: set[int] = set()
        issued: set[int] = set()
        for number, (how, code) in enumerate(ways.items(), 1):
            base = 20_000 * number
            child = nest.start(end_by, uri, str(outbox), how, base)
            assert (how, code) == (how, child.join())
            said = child.acked()
            assert set(range(base, base + 100)) <= said, how
            acked |= said
            daemon = max((n for n in said if n >= base + 10_000), default=base + 9_999)
            issued |= said | {max(said) + 1, *range(base + 500, base + 510), daemon + 1}
            row.done()
        recovered(nest, uri, outbox, "ends", acked, issued, 50)


def end_wholly(fd: int, uri: str, outbox: str, base: int) -> None:
    """End the interpreter itself, which a child of multiprocessing does not: with atexit, and a daemon thread."""
    tracker = MLflowTracker("ends", uri, outbox_dir=outbox, settings=workload.settings(exit_timeout=0.2))
    run = tracker.start_run(f"whole {base}")

    def log(first: int, last: int) -> None:
        for n in range(base + first, base + last):
            if workload.log_event(run, n):
                workload.ack(fd, n)

    pace = threading.Event()  # never set

    def log_slowly() -> None:
        for n in range(20_000, 22_000):
            log(n, n + 1)
            pace.wait(0.002)

    log(0, 100)
    atexit.register(log, 100, 110)  # behind the outbox's own: runs before it
    threading.Thread(target=log_slowly, daemon=True).start()
    ctypes.pythonapi.Py_Exit(3)


@pytest.mark.fault("F06", "the interpreter ends: calls in atexit, a daemon thread that logs")
def test_the_end_of_the_interpreter_keeps_every_event(
    empty_database: Callable[[Path], Path], nest: Nest, row: Row, tmp_path: Path
) -> None:
    """It ends as it would have, and the next program delivers what was acknowledged."""
    turns = row.pick(3, 50, 500)
    uri, outbox = f"sqlite:///{empty_database(tmp_path / 'mlflow.db')}", tmp_path / "outbox"
    acked: set[int] = set()
    issued: set[int] = set()
    for turn in range(1, turns + 1):
        base = 100_000 * turn
        child = nest.start(end_wholly, uri, str(outbox), base)
        assert 3 == child.join()
        said = child.acked()
        assert set(range(base, base + 110)) <= said
        daemon = max((n for n in said if n >= base + 20_000), default=base + 19_999)
        acked |= said
        issued |= said | {daemon + 1}
        row.done()
    recovered(nest, uri, outbox, "ends", acked, issued, 50, patience=60 + len(acked) / 400)


class Broken(BaseException):
    """Nothing that anybody expects to be raised."""


def with_dying_worker(fd: int, uri: str, outbox: str, experiment: str, where: str, what: str) -> None:
    """Log while something unexpected is raised inside the worker, and then no longer."""
    from mlflow_outbox_worker import courier, lookout

    def work() -> dict[str, Any]:
        error: type[BaseException] = {"exception": ZeroDivisionError, "base": Broken, "exit": SystemExit}[what]
        place: Any = courier.Courier if where in {"courier", "lane"} else lookout.Lookout
        name = {"loop": "_listen", "courier": "_deliver", "lane": "_deliver", "look": "_look_around"}[where]
        whole, raised_times = getattr(place, name), [0]

        def break_down(*arguments: Any, **named: Any) -> Any:
            if raised_times[0] < 2:
                raised_times[0] += 1
                raise error(where)
            return whole(*arguments, **named)

        threading.excepthook = lambda _: None
        setattr(place, name, break_down)
        given = workload.settings(sync_interval=0.02, retry_max=0.2)
        tracker = MLflowTracker(experiment, uri, outbox_dir=outbox, settings=given)
        run = tracker.start_run("dying")
        took: list[float] = []
        raised: list[str] = []
        started = time.monotonic()
        for first in range(0, 60, 20):
            log_timed(fd, run, range(first, first + 20), took, raised)
            workload.wait_for_round(tracker)
        run.end()
        left = tracker.flush(30)
        return {
            "raised": raised,
            "p999_ms": workload.quantile(took, 0.999),
            "max_ms": workload.quantile(took, 1.0),
            "left": [left.pending, left.parked, left.dead],
            "seconds": time.monotonic() - started,
            "times": raised_times[0],
            "counters": tracker.counters,
        }

    workload.reported(fd, work)


@pytest.mark.fault("F08", "an exception, a BaseException and SystemExit inside the worker's loop and inside a delivery")
@pytest.mark.parametrize("what", ["exception", "base", "exit"])
@pytest.mark.parametrize("where", ["loop", "courier", "lane", "look"])
def test_a_worker_that_dies_is_replaced_and_counted(
    where: str,
    what: str,
    empty_database: Callable[[Path], Path],
    mlflow_server: MlflowServer,
    experiment_name: str,
    nest: Nest,
    row: Row,
    tmp_path: Path,
) -> None:
    """Delivery goes on within seconds, and a counter says what happened."""
    for number in range(row.pick(1, 10, 50)):
        store = f"sqlite:///{empty_database(tmp_path / f'{number}.db')}"
        uri = store
        if where == "lane":  # only runs for a server are delivered in threads of their own
            uri, store = mlflow_server.url, mlflow_server.database_uri
        name = f"{experiment_name}-{number}"
        child = nest.start(with_dying_worker, uri, str(tmp_path / f"outbox{number}"), name, where, what)
        report = child.report()
        check_manners(row, report)
        assert report["times"] == 2, report
        assert [0, 0, 0] == report["left"], report
        told = ("worker_crashes", "run_crashes", "workers_replaced", "worker_errors")
        assert any(report["counters"].get(name) for name in told), report["counters"]
        outbox = tmp_path / f"outbox{number}"
        recovered(nest, uri, outbox, name, child.acked(), child.acked(), 900, judge=store)
        row.measure(where=where, what=what, seconds=report["seconds"])
        row.done()


@pytest.mark.fault("F07", "SIGSTOP of the process that delivers, while another one logs and waits, then SIGCONT")
def test_a_worker_that_stands_still_keeps_its_lease_and_harms_nothing(
    sqlite_uri: str, nest: Nest, row: Row, tmp_path: Path
) -> None:
    """Nobody else delivers meanwhile, and when it goes on nothing is there twice."""
    outbox = str(tmp_path / "outbox")
    acked: set[int] = set()
    issued: set[int] = set()
    for number in range(row.pick(1, 10, 50)):
        first = (number + 1) * 100_000
        holder = nest.start(workload.log_forever, sqlite_uri, outbox, "still", first, 1, "thread", {}, 0.01)
        eventually(lambda holder=holder: workload.lease_pid(outbox, sqlite_uri) == holder.pid)
        os.kill(holder.pid, signal.SIGSTOP)
        row.pause()
        other = nest.start(workload.log_forever, sqlite_uri, outbox, "still", first + 50_000, 1, "thread", {}, 0.01)
        other.wait_for_lines(50)
        other.process.join(row.pick(2, 30))
        assert holder.pid == workload.lease_pid(outbox, sqlite_uri)
        os.kill(holder.pid, signal.SIGCONT)
        count = len(holder.lines())
        holder.wait_for_lines(count + 20)
        for each, start in ((holder, first), (other, first + 50_000)):
            with contextlib.suppress(OSError):
                each.kill()
            acked |= each.acked()
            issued |= workload.issued_by(each.acked(), start, 1)
        row.done()
    recovered(nest, sqlite_uri, Path(outbox), "still", acked, issued, 50, patience=60 + len(acked) / 400)
