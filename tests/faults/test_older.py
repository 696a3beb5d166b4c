"""Outboxes that older releases have left: this one delivers them, and takes over where they stopped."""

from __future__ import annotations

from pathlib import Path

import pytest

from faults import workload
from faults.children import Nest
from faults.older import DEAD, EVENTS, EXPERIMENT, RELEASES, unpacked
from faults.oracle import held
from faults.table import Row

#: How MLflow's file store writes the statuses RUNNING, FINISHED and FAILED.
RUNNING, FINISHED, FAILED = "1", "3", "4"


@pytest.mark.fault("F38", "an outbox of each release: half delivered, a dead letter in its ledger, a writer killed")
@pytest.mark.parametrize("release", sorted(path.name for path in RELEASES.iterdir()))
def test_an_outbox_of_an_older_release_is_delivered_by_this_one(
    release: str, nest: Nest, row: Row, tmp_path: Path
) -> None:
    """What its ledger calls delivered is not sent again, its dead letter is there, and all the rest arrives once."""
    uri, outbox = unpacked(RELEASES / release, tmp_path / "older")
    before = held(uri, EXPERIMENT)
    assert {"half": RUNNING} == before.status
    assert 0 < len(before.events) < len(EVENTS["half"]), "some of it was delivered"
    report = nest.start(workload.drain, uri, str(outbox), EXPERIMENT, 1000, {}).report()
    assert {"pending": 0, "parked": 0, "dead": 1} == {k: report["left"][k] for k in ("pending", "parked", "dead")}
    after = held(uri, EXPERIMENT)
    if release == "0.1.0":  # its events say no times of their own, and no tag is the last
        after.wrong = [text for text in after.wrong if not text.startswith("metric ")]
        after.lasts = [last for last in after.lasts if last[0] != "absent"]
    assert [f"param {DEAD}: 'another'"] == after.wrong
    after.wrong.clear()
    torn = EVENTS["killed"][-1]
    logged = {number for numbers in EVENTS.values() for number in numbers} | set(report["acked"])
    after.check(logged - {torn}, logged - {torn})
    assert {"half": FAILED, "waiting": FINISHED, "killed": RUNNING, "after 1000": FINISHED} == after.status
    row.measure(release=release)
    row.done()
