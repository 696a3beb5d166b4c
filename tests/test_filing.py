"""What is filed as delivered was delivered."""

from __future__ import annotations

from pathlib import Path

from mlflow_outbox.counters import Counters
from mlflow_outbox.destination import resolve
from mlflow_outbox.settings import Settings
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox.spool.events import Metric
from mlflow_outbox.spool.journal import Journal, RunIdentity
from mlflow_outbox.spool.reader import RunReader
from mlflow_outbox_worker.ledger import Ledger
from mlflow_outbox_worker.retention import file_run


def test_a_run_resumed_for_a_moment_while_it_is_filed_stays_where_it_is(tmp_path: Path) -> None:
    """Its new segment is closed already, so nobody writes it; but no cursor has passed it."""
    directory = OutboxDirectory.create(tmp_path / "outbox", resolve("http://127.0.0.1:9"), now_ms=0)
    journal = Journal(directory, RunIdentity("a" * 32, "experiment"), Settings(), Counters())
    journal.append(Metric("m", 1.0, 1, 1))
    journal.close()
    delivered = RunReader(directory.run("a" * 32)).window({}).cursors
    journal.append(Metric("m", 2.0, 2, 2))
    journal.close()
    ledger = Ledger.open(tmp_path / "ledger")
    try:
        assert not file_run(directory, ledger, "a" * 32, delivered)
        everything = RunReader(directory.run("a" * 32)).window({}).cursors
        assert file_run(directory, ledger, "a" * 32, everything)
    finally:
        ledger.close()
    assert [] == directory.run_ids()
