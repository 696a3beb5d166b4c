"""Power cuts on a real file system: what was acknowledged as durable is there afterwards, and arrives once."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from faults import workload
from faults.children import Nest
from faults.mounts import PowerCut, own_namespace
from faults.oracle import held
from faults.table import Row

#: Seconds between two background syncs, and by how much a busy machine may be late with one.
INTERVAL = 0.05
LATE = 0.5


def lose_power(fd: int, folder: str, uri: str, sync: str, worker: str, pause: float) -> None:
    """Log to a file system, cut its power, and report what was acknowledged and when; the file system is on again."""

    def work() -> dict[str, Any]:
        own_namespace()
        disk = PowerCut(Path(folder))
        read, write = os.pipe()
        victim = os.fork()
        if victim == 0:
            os.close(read)
            changed = {"sync": sync, "sync_interval": INTERVAL, "free_bytes": 0, **workload.TINY}
            log_with_times(write, uri, str(disk.path / "outbox"), worker, changed)
        os.close(write)
        data = bytearray()
        listener = threading.Thread(target=_listen, args=(read, data), daemon=True)
        listener.start()
        while not data:
            time.sleep(0.002)
        time.sleep(pause)
        before = time.monotonic()
        disk.cut()
        after = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        os.waitpid(victim, 0)
        listener.join()
        disk.off()
        disk.on()
        fields = (line.split() for line in data.decode().splitlines())
        acked = [(int(number), float(when)) for number, when in fields]
        # A call whose acknowledgement came while the power went is one nobody can judge.
        known = [(n, t) for n, t in acked if t < before]
        durable = [n for n, t in known if sync == "always" or t < before - INTERVAL - LATE]
        drained = os.fork()
        if drained == 0:
            workload.drain(fd, uri, str(disk.path / "outbox"), "power", 90_000, {"free_bytes": 0})
            os._exit(0)
        os.waitpid(drained, 0)
        disk.off()
        issued = [n for n, _ in acked]
        return {"durable": durable, "issued": [*issued, max(issued) + 1], "cut_ms": 1000 * (after - before)}

    workload.reported(fd, work)


def log_with_times(fd: int, uri: str, outbox: str, worker: str, changed: dict[str, Any]) -> None:
    """Log numbered events, and acknowledge each with the time at which its call returned."""
    tracker = workload.MLflowTracker(
        "power", uri, outbox_dir=outbox, worker=worker, settings=workload.settings(**changed)  # type: ignore[arg-type]
    )
    run = tracker.start_run("cut")
    for number in range(9_000):
        # On a disk without power, events are kept in memory: they are kept, but nobody calls them durable.
        if workload.log_event(run, number):
            os.write(fd, f"{number} {time.monotonic()}\n".encode())
        if number % 8 == 0:
            time.sleep(0.001)
    threading.Event().wait()


def _listen(fd: int, data: bytearray) -> None:
    while part := os.read(fd, 65536):
        data += part


@pytest.mark.needs("loop")
@pytest.mark.fault("F16", "power cut (ext4 shut down without flushing) at a random time, disk and ledger both")
@pytest.mark.parametrize(("sync", "worker", "store"), [("always", "thread", "sqlite"), ("interval", "none", "sqlite"), ("interval", "thread", "file")])
def test_a_power_cut_takes_no_more_than_the_ladder_says(
    sync: str,
    worker: str,
    store: str,
    empty_database: Callable[[Path], Path],
    nest: Nest,
    row: Row,
    rng: random.Random,
    tmp_path: Path,
) -> None:
    """What a call at "always" returned from, and what is older than the interval, arrives; a gap in the rest is counted."""
    for number in range(row.pick(1, 100, 1000)):
        folder = tmp_path / str(number)
        folder.mkdir()
        database = f"sqlite:///{empty_database(folder / 'mlflow.db')}"
        uri = database if store == "sqlite" else (folder / "mlruns").as_uri()
        pause = rng.uniform(0.0, 0.4) if sync == "always" else rng.uniform(0.6, 1.2)
        child = nest.start(lose_power, str(folder), uri, sync, worker, pause)
        last = child.report()
        after = next(line for line in child.lines() if '"acked"' in line)
        assert '"pending": 0, "parked": 0' in after, after
        fresh = set(range(90_000, 90_010))
        found = held(uri, "power")
        found.check(set(last["durable"]) | fresh, set(last["issued"]) | fresh)
        there = sorted(set(found.events) - fresh)
        if worker == "none":  # what a worker had sent before the cut is there anyway
            # The kernel may write newer segments before older ones, and none of them was promised yet: but a gap is told.
            counted = json.loads(after)["counters"]
            gap = set(range(there[-1] + 1)) - set(there)
            assert len(gap) <= counted.get("missing", 0) + counted.get("dead_letters", 0), (sorted(gap), counted)
        row.done()
        row.measure(sync=sync, store=store, durable=len(last["durable"]), lost=len(last["issued"]) - 1 - len(there))
