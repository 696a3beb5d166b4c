"""What the background's rounds of syncing promise, against a disk that knows what a power cut would leave."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from mlflow_outbox.counters import Counters
from mlflow_outbox.spool.journal import Journal
from mlflow_outbox.testing import FailingDisk
from spools import RUN, make_journal, make_outbox, metric, read


def append(writer: Journal, first: int, end: int) -> None:
    """Append numbered events."""
    for number in range(first, end):
        assert writer.append(metric(number))


STEP = st.sampled_from(["append", "append", "sync", "sync", "sync fails", "write fails", "close", "cut"])


@settings(deadline=None)  # a disk may take its time
@given(st.lists(STEP, max_size=60))
def test_no_order_of_rounds_failures_and_power_cuts_takes_what_was_synced(steps: list[str]) -> None:
    """After a round that succeeded, a power cut takes nothing that was appended before it.

    Unless the disk had failed to sync the same events twice, which is counted.
    """
    with tempfile.TemporaryDirectory() as folder:
        outbox, disk, counters = make_outbox(Path(folder) / "outbox"), FailingDisk(), Counters()
        writer = make_journal(outbox, disk, segment_bytes=1024, counters=counters)
        number, promised = 0, 0
        for step in steps:
            if step == "append":
                append(writer, number, number + 3)
                number += 3
            elif step == "sync":
                before = counters.snapshot()
                writer.sync()
                left_alone = writer._sequence.live.tainted  # a disk that failed twice, for a while
                held_up = writer.in_memory or left_alone or counters["unsynced_not_rewritten"]
                if before == counters.snapshot() and not held_up:
                    promised = number
            elif step == "close":
                writer.close()
            elif step == "cut":
                break
            else:
                disk.fail("datasync" if step == "sync fails" else "write")
        if outbox.run(RUN).exists():
            disk.cut_power(outbox.run(RUN))
        found = read(outbox)
        assert list(range(promised)) == found.steps[:promised]
        assert len(found.steps) == len(set(found.steps))
