"""What comes before what, of several journals: a restored experiment before what was logged after it."""

from __future__ import annotations

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
