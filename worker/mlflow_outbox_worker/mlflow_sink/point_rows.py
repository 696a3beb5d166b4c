"""MLflow's store of a database, to which the points of a batch are rows.

MLflow's own makes an object of SQLAlchemy's for each point and lets a session keep account of them, which takes ten
times as long as all else together. Here the rows of a batch go to the database in one statement, in the same
transaction as before with what it belongs to, the latest value of each metric; what is refused is refused by MLflow's
own code. A point that the table has is left out by the database: sent again, a batch costs no more than the first time.

Databases without ``ON CONFLICT DO NOTHING``, and a version of MLflow whose tables have other columns, get MLflow's way.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import sqlalchemy.dialects.postgresql
import sqlalchemy.dialects.sqlite
from mlflow.store.tracking.dbmodels.models import SqlLatestMetric, SqlMetric
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow.utils.validation import _validate_metric

_COLUMNS = {"key", "value", "timestamp", "step", "is_nan", "run_uuid"}
_INSERTS: dict[str, Callable[[Any], Any]] = {
    "sqlite": lambda table: sqlalchemy.dialects.sqlite.insert(table).on_conflict_do_nothing(),
    "postgresql": lambda table: sqlalchemy.dialects.postgresql.insert(table).on_conflict_do_nothing(),
}


class PointRows(SqlAlchemyStore):  # type: ignore[misc]  # MLflow has no type information
    """A database store.

    Args:
        *arguments: MLflow's.
        engine: holds its connections; None for the one that MLflow keeps for each URI.
        **named: MLflow's.

    Attributes:
        takes_rows: points go to the table as rows, and again for nothing.
    """

    def __init__(self, *arguments: Any, engine: Any = None, **named: Any) -> None:
        self._given = engine
        super().__init__(*arguments, **named)
        known = all(set(model.__table__.columns.keys()) == _COLUMNS for model in (SqlMetric, SqlLatestMetric))
        insert = _INSERTS.get(self.engine.dialect.name)
        self._insert = insert(SqlMetric.__table__) if known and insert is not None else None
        self.takes_rows = self._insert is not None
        # With later versions a session is one for reading unless it is asked to be for writing.
        writing = "read_only" in inspect.signature(self.ManagedSessionMaker).parameters
        self._session: Callable[[], AbstractContextManager[Any]] = (
            (lambda: self.ManagedSessionMaker(read_only=False)) if writing else self.ManagedSessionMaker
        )

    def _get_or_create_engine(self, db_uri: str) -> Any:
        return self._given if self._given is not None else super()._get_or_create_engine(db_uri)

    def _log_metrics(self, run_id: str, metrics: Any) -> None:
        if self._insert is None:
            super()._log_metrics(run_id, metrics)
            return
        rows: list[dict[str, Any]] = []
        latest: dict[str, dict[str, Any]] = {}
        for metric in metrics:
            _validate_metric(metric.key, metric.value, metric.timestamp, metric.step)
            is_nan, value = self.sanitize_metric_value(metric.value)
            row = {
                "run_uuid": run_id,
                "key": metric.key,
                "value": value,
                "timestamp": metric.timestamp,
                "step": metric.step,
                "is_nan": is_nan,
            }
            rows.append(row)
            if metric.key not in latest or _rank(row) > _rank(latest[metric.key]):
                latest[metric.key] = row
        if not rows:
            return
        with self._session() as session:
            self._check_run_is_active(self._get_run(run_uuid=run_id, session=session))
            session.execute(self._insert, rows)
            self._update_latest_metrics_if_necessary([SqlMetric(**row) for row in latest.values()], session)


def _rank(row: dict[str, Any]) -> tuple[int, int, float]:
    """Return that by which MLflow tells which point of a metric is the latest."""
    return row["step"], row["timestamp"], row["value"]
