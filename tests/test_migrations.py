"""New databases that are opened at the same time: Alembic can migrate one at a time in a process."""

from __future__ import annotations

import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from alembic.script import ScriptDirectory
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

from mlflow_outbox_worker.mlflow_sink.database import open_store


def _columns(path: Path) -> set[str]:
    with closing(sqlite3.connect(path)) as connection:
        return {name for (name,) in connection.execute("SELECT name FROM pragma_table_info('metrics')")}


@pytest.mark.compatibility
def test_a_program_opens_a_new_database_of_its_own_while_delivery_opens_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Neither fails, and each has its own tables: the one that comes second waits for the first."""
    inside: set[int] = set()
    most: list[int] = []
    both = threading.Event()
    whole = ScriptDirectory.run_env

    def run_env(script: ScriptDirectory) -> Any:
        inside.add(threading.get_ident())
        most.append(len(inside))
        if len(inside) > 1:
            both.set()
        both.wait(1.0)  # as long as a migration takes; the other one comes in by then, where it may
        try:
            return whole(script)
        finally:
            inside.discard(threading.get_ident())

    open_store(f"sqlite:///{tmp_path / 'first.db'}", str(tmp_path))[1]._dispose_engine()
    monkeypatch.setattr(ScriptDirectory, "run_env", run_env)
    ours, its = tmp_path / "ours.db", tmp_path / "the program's.db"
    with ThreadPoolExecutor() as pool:
        delivery = pool.submit(open_store, f"sqlite:///{ours}", str(tmp_path))
        program = pool.submit(SqlAlchemyStore, f"sqlite:///{its}", str(tmp_path))
        stores = [delivery.result(240)[1], program.result(240)]
    for store in stores:
        store._dispose_engine()
    assert [1, 1] == most
    assert {"key", "value", "timestamp", "run_uuid", "step", "is_nan"} == _columns(ours) == _columns(its)
