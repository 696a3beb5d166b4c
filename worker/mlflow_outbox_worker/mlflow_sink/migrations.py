"""Migrations of databases, which take turns in a process.

MLflow makes the tables of a new database with Alembic, and Alembic keeps the migration that is under way in globals of
its modules. Where two threads migrate at a time, each takes the other one's: both fail ("KeyError: 'config'"), or one
alters the other one's database ("duplicate column name"). MLflow alone does not come to that, for it migrates where the
program opens a store. Delivery opens one in a thread of its own, and the program may be opening another at that moment,
with MLflow's plain URI: the error would be the program's. So every migration of this process waits for the one before,
whoever began it.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from typing import Any, Final

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
