"""What comes before what, of several journals: a restored experiment before what was logged after it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mlflow_outbox.spool import provisional
from mlflow_outbox.spool.events import Request
from mlflow_outbox.spool.reader import RunReader
from mlflow_outbox_worker.ledger import Ledger
from mlflow_outbox_worker.precedence import Precedence, Waits
from mlflow_outbox_worker.records import RunRecord
from mlflow_outbox_worker.sources import OutboxSource
from spools import RUN, make_journal, make_outbox, metric


def test_a_restoration_that_arrives_between_a_refusal_and_the_look_for_it_is_taken_notice_of(tmp_path: Path) -> None:
    """However often it was on its way before: the run is tried once more, and waits for a person only then."""
    outbox = make_outbox(tmp_path)
    make_journal(outbox).append(metric(0))
    room = provisional.room_of("7")
    make_journal(outbox, run=room).append(Request("restore_experiment", b"{}", 1))
    ledger = Ledger.open(outbox.ledger)
    precedence = Precedence(OutboxSource(outbox), ledger)
    run = RunRecord(RUN, experiment_id="7")
    for _ in range(3):
        with pytest.raises(Waits) as waits:
            precedence.await_restoration(run)
        assert room == waits.value.on
    ledger.commit(RunRecord(room, cursors=RunReader(outbox.run(room)).window({}).cursors))
    with pytest.raises(Waits) as waits:
        precedence.await_restoration(run)
    assert waits.value.on == ""
    precedence.await_restoration(run)
    ledger.close()


def test_a_change_of_a_trace_waits_for_rooms_that_may_have_it_and_for_none_that_waits_for_a_person(
    tmp_path: Path,
) -> None:
    """Nor for one in which there is nothing."""
    outbox = make_outbox(tmp_path)
    room = provisional.room_of("7")
    make_journal(outbox, run=room).append(Request("start_trace", b"{}", 1_000))
    ledger = Ledger.open(outbox.ledger)
    precedence = Precedence(OutboxSource(outbox), ledger)

    def waits(trace: str, time_ms: int = 1_001) -> str | None:
        try:
            precedence.await_trace(trace, time_ms, provisional.COMMON_ROOM)
        except Waits as error:
            return error.on
        return None

    ledger.commit(RunRecord(room, remote_id=room))
    assert [room, room] == [waits("tr-1"), waits("tr-1")]
    assert waits("tr-2", -60_000) is None, "what is there was logged much later"
    ledger.commit(RunRecord(room, remote_id=room, state="parked"))
    assert waits("tr-1") is None
    empty = make_journal(outbox, run=provisional.room_of("8"))
    assert empty.append(Request("start_trace", b"{}", 1_000))
    empty.close()
    assert provisional.room_of("8") == waits("tr-1")
    [[segment]] = RunReader(outbox.run(provisional.room_of("8"))).segments().values()
    os.truncate(segment.path, segment.body)  # its program was killed before it had written anything
    assert waits("tr-1") is None, "nothing can come of that"
    ledger.close()
