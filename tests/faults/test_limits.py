"""Too few descriptors, no threads, no memory: logging goes on, and what it said it kept arrives."""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from faults import workload
from faults.children import Nest
from faults.oracle import held
from faults.table import Row
from faults.test_space import Said, check_accounts, check_manners, log_timed
from mlflow_outbox import MLflowTracker
from mlflow_outbox.spool import journal
from mlflow_outbox.spool.disk import SystemDisk
from servers import MlflowServer, eventually


def log_without_descriptors(fd: int, uri: str, outbox: str) -> None:
    """Log while no descriptor is left, and then again with some."""

    def work() -> dict[str, Any]:
        given = workload.settings(sync_interval=0.02, **workload.TINY)
        tracker = MLflowTracker("descriptors", uri, outbox_dir=outbox, settings=given)
        run = tracker.start_run("descriptors")
        took: list[float] = []
        raised: list[str] = []
        log_timed(fd, run, range(20), took, raised)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1, hard))
        taken: list[int] = []
        try:
            while True:
                taken.append(os.dup(0))
        except OSError:
            pass
        log_timed(fd, run, range(20, 200), took, raised)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for each in taken:
            os.close(each)
        log_timed(fd, run, range(200, 220), took, raised)
        run.end()
        left = tracker.flush(60)
        return {
            "raised": raised,
            "p999_ms": workload.quantile(took, 0.999),
            "max_ms": workload.quantile(took, 1.0),
            "left": [left.pending, left.parked, left.dead],
            "counters": tracker.counters,
        }

    workload.reported(fd, work)


@pytest.mark.fault("F24", "no file descriptor left in the process, worker running")
def test_no_descriptor_left_loses_nothing(
    empty_database: Callable[[Path], Path], nest: Nest, row: Row, tmp_path: Path
) -> None:
    """Events wait in memory, the worker survives, and with descriptors again everything arrives."""
    for number in range(row.pick(1, 30, 100)):
        uri = f"sqlite:///{empty_database(tmp_path / f'{number}.db')}"
        child = nest.start(log_without_descriptors, uri, str(tmp_path / f"outbox{number}"))
        report = child.report()
        check_manners(row, report)
        assert [0, 0, 0] == report["left"], report
        held(uri, "descriptors").check(child.acked())
        row.done()


def log_without_threads(fd: int, uri: str, outbox: str, experiment: str, when: str) -> None:
    """Log while no thread can be started, and then again when some can."""

    def work() -> dict[str, Any]:
        given = workload.settings(sync_interval=0.02, retry_max=0.2, **workload.TINY)
        tracker = MLflowTracker(experiment, uri, outbox_dir=outbox, settings=given)
        run = tracker.start_run("threads") if when == "while delivering" else None
        took: list[float] = []
        raised: list[str] = []
        said: list[str] = []
        Said(said)
        if run is not None:
            log_timed(fd, run, range(20), took, raised)
            eventually(lambda: tracker.counters.get("delivered"))
        starts, refusals = threading.Thread.start, []

        def no_threads(_: threading.Thread) -> None:
            refusals.append(1)
            msg = "can't start new thread"  # as where the limit of threads is reached
            raise RuntimeError(msg)

        threading.Thread.start = no_threads  # type: ignore[method-assign]  # in this child only
        run = run or tracker.start_run("threads")
        log_timed(fd, run, range(20, 200), took, raised)
        other = tracker.start_run("another")  # would have a lane of its own
        log_timed(fd, other, range(1000, 1100), took, raised)
        if when == "while delivering":
            eventually(lambda: refusals, 60, "a thread was wanted")
        threading.Thread.start = starts  # type: ignore[method-assign]  # put back
        log_timed(fd, run, range(200, 220), took, raised)
        run.end()
        other.end()
        left = tracker.flush(60)
        return {
            "raised": raised,
            "max_ms": workload.quantile(took, 1.0),
            "left": [left.pending, left.parked, left.dead],
            "refusals": len(refusals),
            "calls": len(took),
            "said": said,
            "counters": tracker.counters,
        }

    workload.reported(fd, work)


@pytest.mark.fault("F24", "no thread can be started: before the first event, and while a worker delivers")
@pytest.mark.parametrize("when", ["before the first event", "while delivering"])
def test_no_thread_left_loses_nothing(
    when: str, mlflow_server: MlflowServer, experiment_name: str, nest: Nest, row: Row, tmp_path: Path
) -> None:
    """Nothing is refused: the events are on disk, and are delivered when there are threads again."""
    for number in range(row.pick(1, 15, 50)):
        name, outbox = f"{experiment_name}-{number}", str(tmp_path / f"outbox{number}")
        child = nest.start(log_without_threads, mlflow_server.url, outbox, name, when)
        report = child.report()
        check_manners(row, report)
        assert report["refusals"] > 0
        assert {*range(220 if when == "while delivering" else 0), *range(20, 220), *range(1000, 1100)} == child.acked()
        assert [0, 0, 0] == report["left"], report
        check_accounts(report, child.acked())
        held(mlflow_server.database_uri, name).check(child.acked())
        row.done()


def log_without_memory(fd: int, uri: str, outbox: str, where: str, seed: int) -> None:
    """Log while memory runs out in every third call, in one place, and then no longer."""

    def work() -> dict[str, Any]:
        calls, ran_out = [seed], [0]

        def is_out() -> bool:
            if not during.is_set():
                return False
            calls[0] += 1
            ran_out[0] += calls[0] % 3 == 0
            return calls[0] % 3 == 0

        def failing(whole: Callable[..., Any]) -> Callable[..., Any]:
            def call(*given: Any) -> Any:
                if where != "behind the write" and is_out():
                    raise MemoryError
                result = whole(*given)
                if where == "behind the write" and is_out():
                    raise MemoryError
                return result

            return call

        during = threading.Event()
        if where == "encode":
            journal.encode = failing(journal.encode)
        else:
            SystemDisk.write = staticmethod(failing(SystemDisk.write))
        given = workload.settings(sync_interval=0.02, **workload.TINY)
        tracker = MLflowTracker("memory", uri, outbox_dir=outbox, worker="none", settings=given)
        took: list[float] = []
        raised: list[str] = []
        said: list[str] = []
        Said(said)
        run = tracker.start_run("memory")
        log_timed(fd, run, range(20), took, raised)
        during.set()
        log_timed(fd, run, range(20, 200), took, raised)
        during.clear()
        log_timed(fd, run, range(200, 220), took, raised)
        run.end()
        counters = tracker.counters
        left = MLflowTracker("memory", uri, outbox_dir=outbox, settings=given).flush(60)
        return {
            "raised": raised,
            "max_ms": workload.quantile(took, 1.0),
            "left": [left.pending, left.parked, left.dead],
            "ran_out": ran_out[0],
            "calls": len(took),
            "said": said,
            "counters": counters,
        }

    workload.reported(fd, work)


@pytest.mark.fault("F24", "MemoryError in a logging call: in encode, before and behind the write")
@pytest.mark.parametrize("where", ["encode", "before the write", "behind the write"])
def test_no_memory_left_loses_nothing_that_was_kept(
    where: str, empty_database: Callable[[Path], Path], nest: Nest, row: Row, tmp_path: Path
) -> None:
    """No call raises; a call that failed for it says so and is counted, and the next ones go on."""
    for number in range(row.pick(1, 10, 34)):
        uri = f"sqlite:///{empty_database(tmp_path / f'{number}.db')}"
        child = nest.start(log_without_memory, uri, str(tmp_path / f"outbox{number}"), where, number)
        report = child.report()
        check_manners(row, report)
        assert report["ran_out"] > 30
        acked = child.acked()
        assert {*range(20), *range(200, 220)} <= acked
        assert [0, 0, 0] == report["left"], report
        check_accounts(report, acked, lines=2)  # for the metric, and for what has no key
        held(uri, "memory").check(acked, acked if where == "encode" else set(range(220)))
        row.done()
