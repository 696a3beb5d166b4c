"""What is filed as delivered was delivered."""

from __future__ import annotations

from pathlib import Path

from contents import QUICK, artifact_text, the_run
from mlflow_outbox import MLflowTracker
from mlflow_outbox.counters import Counters
from mlflow_outbox.destination import resolve
from mlflow_outbox.settings import Settings
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox.spool.events import Metric
from mlflow_outbox.spool.journal import Journal
from mlflow_outbox.spool.reader import RunReader
from mlflow_outbox.spool.sequence import RunIdentity
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
        assert not file_run(directory, ledger, "a" * 32, delivered, Counters())
        everything = RunReader(directory.run("a" * 32)).window({}).cursors
        assert file_run(directory, ledger, "a" * 32, everything, Counters())
    finally:
        ledger.close()
    assert [] == directory.run_ids()


def test_a_copy_that_was_filed_before_the_ledger_was_lost_is_found(
    sqlite_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """A worker killed while filing has moved the files and not the segments; without its ledger all is sent again."""
    offline = MLflowTracker(experiment_name, sqlite_uri, outbox_dir=tmp_path / "o", worker="none", settings=QUICK)
    with offline.start_run("filed in part") as run:
        run.log_text("content", "notes.txt")
    assert offline.outbox_path is not None
    filed = offline.outbox_path / "delivered" / run.run_id
    filed.mkdir(mode=0o700)
    (offline.outbox_path / "runs" / run.run_id / "files").rename(filed / "files")
    with MLflowTracker(experiment_name, sqlite_uri, outbox_dir=tmp_path / "o", settings=QUICK) as tracker:
        result = tracker.flush(60)
    assert (0, 0, 0) == (result.pending, result.parked, result.dead)
    assert "content" == artifact_text(sqlite_uri, the_run(sqlite_uri, experiment_name).info.run_id, "notes.txt")
