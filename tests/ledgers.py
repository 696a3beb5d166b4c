"""What the tests of the ledger share: things to store, and scripts that use a ledger in a process of their own."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

from mlflow_outbox.views import Latest, Register, RunView
from mlflow_outbox_worker.database import Database
from mlflow_outbox_worker.ledger import Ledger
from mlflow_outbox_worker.records import Cursor, DeadLetter, RunRecord
from spools import FORKS

FILES = ("cache.db", "cache.db-wal", "cache.db-shm")

PRELUDE = """
import os, signal, sys, threading
from pathlib import Path
from mlflow_outbox.errors import LedgerUnavailable
from mlflow_outbox_worker.ledger import Ledger, LedgerCorrupt
from mlflow_outbox_worker.records import Cursor, DeadLetter, RunRecord
directory = Path(sys.argv[1])
"""


def script(text: str, *arguments: object) -> list[str]:
    """The command that runs a script which knows the ledger's names."""
    return [sys.executable, *FORKS, "-c", PRELUDE + text, *map(str, arguments)]


def run(text: str, *arguments: object) -> str:
    """Run such a script to its end and return what it printed."""
    done = subprocess.run(script(text, *arguments), capture_output=True, text=True, timeout=240, check=False)
    assert (0, "") == (done.returncode, done.stderr)
    return done.stdout


def record(run_id: str, seq: int = 0, remote_id: str = "") -> RunRecord:
    """A record whose one writer has been delivered up to seq."""
    return RunRecord(run_id, experiment="e", remote_id=remote_id, cursors={"w": Cursor(0, 100 * seq, seq)})


def letter(run_id: str, reason: str = "no") -> DeadLetter:
    """A dead letter of a run."""
    return DeadLetter(run_id, "remote", b"\x92\x02", reason, "INVALID_PARAMETER_VALUE", 400, 1)


def view() -> RunView:
    """A view with something of everything."""
    return RunView(
        name="n",
        params={f"p{i}": "v" * 50 for i in range(50)},
        tags={"t": Register("v", 1, "w")},
        metrics={f"m{i}": Latest(float(i), i, i, 1) for i in range(100)},
    )


def copy(source: Path, target: Path) -> None:
    """Copy a ledger that nobody has open."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    target.chmod(0o700)


def edit(directory: Path, sql: str, *arguments: Any) -> None:
    """Change the database behind the ledger's back."""
    connection = sqlite3.connect(directory / "cache.db", isolation_level=None)
    connection.execute(sql, arguments)
    connection.close()


def assert_works(ledger: Ledger) -> None:
    """A repaired ledger takes new commits and reads them back."""
    ledger.commit(record("new", 1, "rn"), view=view(), dead=[letter("new")])
    assert record("new", 1, "rn") == ledger.record("new")
    assert 1 == len(list(ledger.dead_letters("new")))
    assert "new" in {found.run_id for found in ledger.records()}
    assert ledger.checkpoint()


def assert_one_of_the_past(directory: Path, reports: list[str]) -> int:
    """Return how far the ledger ``crashed`` has come, reopened: to a state that was committed, and it works."""
    ledger = Ledger.open(directory, report=reports.append)
    found = ledger.record("a")
    seq = 0 if found is None else found.cursors["w"].seq
    assert found is None or found.cursors["w"].offset == 100 * seq
    assert [str(index) for index in range(1, seq + 1)] == [x.reason for x in ledger.dead_letters()]
    assert_works(ledger)
    ledger.close()
    return seq


def assert_set_aside(directory: Path, number: int = 1) -> Ledger:
    """Opening reports one thing, keeps the old file under its new name, and begins anew."""
    reports: list[str] = []
    ledger = Ledger.open(directory, report=reports.append)
    assert 1 == len(reports)
    assert f"cache.db.corrupt-{number}" in reports[0]
    assert [] == [*ledger.records(), *ledger.dead_letters()]
    assert_works(ledger)
    return ledger


def database(ledger: Ledger) -> Database:
    """The database of a ledger that was not opened to be read only."""
    assert isinstance(ledger._source, Database)
    return ledger._source
