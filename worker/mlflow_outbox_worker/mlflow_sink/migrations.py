"""Migrations of databases, which take turns in a process.

MLflow makes the tables of a new database with Alembic, and Alembic keeps the migration that is under way in globals of
its modules. Where two threads migrate at a time, each takes the other one's: both fail ("KeyError: 'config'"), or one
alters the other one's database ("duplicate column name"). MLflow alone does not come to that, for it migrates where the
program opens a store. Delivery opens one in a thread of its own, and the program may be opening another at that moment,
with MLflow's plain URI: the error would be the program's. So every migration of this process waits for the one before,
whoever began it.

And a migration happens as a whole or not at all. Python's sqlite3 begins no transaction for a statement that alters
tables, so that each is kept at once, and Alembic does not go on from the middle ("table ... already exists"). Delivery
ends with its program, which may be soon, and what it then leaves half upgraded is a database that somebody has had for
years: neither MLflow nor this package opens it again.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from typing import Any, Final

import sqlalchemy.engine
import sqlalchemy.event
from alembic import command, context

from mlflow_outbox import stopwatch

#: Seconds to wait for a migration that began before there were turns.
_PATIENCE: Final = 30.0

_turn = threading.RLock()


def _after_fork_in_child() -> None:
    global _turn  # noqa: PLW0603 - whoever had it is a thread of the parent
    _turn = threading.RLock()


os.register_at_fork(after_in_child=_after_fork_in_child)


def take_turns() -> None:
    """Let all migrations of this process wait for each other from now on, and wait for one that is under way."""
    with _turn:
        whole = command.upgrade
        if hasattr(whole, "takes_turns"):
            return

        @functools.wraps(whole)
        def upgrade(*arguments: Any, **named: Any) -> None:
            with _turn:
                whole(*arguments, **named)

        upgrade.takes_turns = True  # type: ignore[attr-defined]  # a mark of this module's own
        command.upgrade = upgrade
        deadline = stopwatch.seconds() + _PATIENCE
        while getattr(context, "_proxy", None) is not None and stopwatch.seconds() < deadline:
            time.sleep(0.01)


def one_transaction_each(engine: sqlalchemy.engine.Engine) -> None:
    """Let what an engine does to an SQLite file be in transactions, so that a migration which is cut off is undone."""
    sqlalchemy.event.listen(engine, "connect", _begins_none)
    sqlalchemy.event.listen(engine, "begin", _begin)


def _begins_none(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # sqlite3 by itself: it would do so before some statements only


def _begin(connection: sqlalchemy.engine.Connection) -> None:
    driver: Any = connection.connection.dbapi_connection
    if not driver.in_transaction:  # as where a pool has one connection for all
        connection.exec_driver_sql("BEGIN")
