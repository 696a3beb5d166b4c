"""Recovery is idempotent (I9): who looks again at what was recovered changes no byte of it."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any, Literal

import pytest

from faults import workload
from faults.children import Nest
from faults.oracle import held
from faults.table import Row
from mlflow_outbox import MLflowTracker


def look(fd: int, uri: str, outbox: str, experiment: str, worker: Literal["none", "thread"]) -> None:
    """Be a program that logs nothing: one that only reads what is there, or one whose worker delivers it."""

    def work() -> dict[str, Any]:
        given = workload.settings()
        tracker = MLflowTracker(experiment, uri, outbox_dir=outbox, worker=worker, settings=given)
        left = tracker.flush(0.1 if worker == "none" else 60)
        counters = tracker.counters
        tracker.close(0)
        return {"left": [left.pending, left.parked, left.dead], "counters": counters}

    workload.reported(fd, work)


def tree(path: Path) -> dict[str, str]:
    """Return the content of every file of an outbox by a hash: of all that the journal and the quarantine hold."""
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.relative_to(path).parts[0] in {"runs", "delivered", "quarantine"}
    }


def damage(path: Path, rng: random.Random) -> None:
    """Turn one bit of one segment in its second half: a frame is quarantined, or the tail is."""
    # The last one is empty when its writer was killed right after it was made.
    segment = rng.choice(sorted(found for found in path.glob("runs/*/*.log") if found.stat().st_size))
    data = bytearray(segment.read_bytes())
    data[rng.randrange(len(data) // 2, len(data))] ^= 1 << rng.randrange(8)
    segment.write_bytes(data)


@pytest.mark.fault("F03", "recovery of a killed program's outbox, a frame of it damaged, three times over")
def test_a_second_recovery_changes_no_byte(
    sqlite_uri: str, nest: Nest, row: Row, rng: random.Random, tmp_path: Path
) -> None:
    """A reader changes none; a worker does once what there is to do; after that nothing moves, in MLflow neither."""
    for number in range(row.pick(2, 40, 400)):
        outbox, experiment = tmp_path / f"outbox{number}", f"twice-{number}"
        killed = nest.start(
            workload.log_forever, sqlite_uri, str(outbox), experiment, 10_000, 2, "none", workload.TINY, 0.005
        )
        killed.wait_for_lines(rng.randrange(20, 200))
        killed.kill()
        path = workload.directory_of(outbox, sqlite_uri)
        damage(path, rng)
        crashed = tree(path)
        arguments = (sqlite_uri, str(outbox), experiment)
        assert nest.start(look, *arguments, "none").report()["left"][0] > 0
        assert crashed == tree(path)
        first = nest.start(look, *arguments, "thread").report()
        recovered, there = tree(path), held(sqlite_uri, experiment)
        for worker in ("thread", "none", "thread"):
            report = nest.start(look, *arguments, worker).report()
            assert [0, 0, 0] == report["left"], report
            assert 0 == report["counters"].get("delivered", 0)
            assert recovered == tree(path)
        after = held(sqlite_uri, experiment)
        assert there == after
        issued = workload.issued_by(killed.acked(), 10_000, 2)
        lost = killed.acked() - set(after.events)
        counts = first["counters"]
        assert len(lost) <= counts.get("quarantined", 0) + counts.get("missing", 0), (sorted(lost), counts)
        after.check(killed.acked() - lost, issued)
        row.done()
