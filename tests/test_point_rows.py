"""Points of a batch as rows of a database: what is there afterwards is what MLflow's own code makes of them."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

from mlflow_outbox_worker.mlflow_sink import point_rows
from mlflow_outbox_worker.mlflow_sink.point_rows import PointRows

pytestmark = pytest.mark.compatibility

#: Few of each, so that points meet: the same one twice, and those that only the value tells apart.
_POINTS = st.builds(
    Metric,
    st.sampled_from(["loss", "val/loss"]),
    st.sampled_from([0.0, -0.0, 0.5, -1.5, 3, True + 1, 1e308, math.nan, math.inf, -math.inf]),
    st.sampled_from([0, 1_700_000_000_000, 1_700_000_000_001]),
    st.sampled_from([-1, 0, 1, 2**40]),
)
_TABLES = {
    "metrics": "SELECT key, timestamp, step, value, is_nan FROM metrics WHERE run_uuid = ? ORDER BY 1, 2, 3, 4, 5",
    "latest_metrics": "SELECT key, timestamp, step, value, is_nan FROM latest_metrics WHERE run_uuid = ? ORDER BY 1",
}

Stores = tuple[SqlAlchemyStore, PointRows, Path]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stores]:
    """Open MLflow's store and the outbox's on one database."""
    folder = tmp_path_factory.mktemp("rows")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    theirs, ours = SqlAlchemyStore(uri, str(folder)), PointRows(uri, str(folder))
    yield theirs, ours, folder / "mlflow.db"
    for store in (theirs, ours):
        store._dispose_engine()


def _new_run(store: SqlAlchemyStore) -> str:
    return str(store.create_run("0", "", 0, [], None).info.run_id)


def _held(database: Path, run_id: str) -> dict[str, list[Any]]:
    with contextlib.closing(sqlite3.connect(database)) as connection:
        return {table: connection.execute(sql, (run_id,)).fetchall() for table, sql in _TABLES.items()}


@contextlib.contextmanager
def _statements(store: SqlAlchemyStore) -> Iterator[list[str]]:
    """Note the statements that a store sends; one for many rows is one."""
    seen: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        seen.append(statement)

    sqlalchemy.event.listen(store.engine, "before_cursor_execute", note)
    try:
        yield seen
    finally:
        sqlalchemy.event.remove(store.engine, "before_cursor_execute", note)


@functools.cache
def _takes_nan_twice(store: SqlAlchemyStore) -> bool:
    """Return whether MLflow's own code does; the oldest version refuses the second one, which the outbox's does not."""
    run_id = _new_run(store)
    try:
        for _ in range(2):
            store.log_batch(run_id, [Metric("loss", math.nan, 0, 0)], [], [])
    except MlflowException:
        return False
    return True


def test_a_point_without_a_number_may_come_twice(stores: Stores) -> None:
    """As any other, with every version of MLflow."""
    _, ours, database = stores
    run_id = _new_run(ours)
    for _ in range(2):
        ours.log_batch(run_id, [Metric("loss", math.nan, 0, 0)], [], [])
    assert [("loss", 0, 0, 0.0, 1)] == _held(database, run_id)["metrics"]


@settings(deadline=None)  # a disk may take its time
@given(batches=st.lists(st.lists(_POINTS, max_size=6), min_size=1, max_size=4))
def test_both_tables_hold_what_mlflow_s_own_code_puts_there(stores: Stores, batches: list[list[Metric]]) -> None:
    """Points that come twice, in one batch or in two, those of an earlier step, what is no number, no point at all."""
    theirs, ours, database = stores
    nans = [(one.key, one.timestamp, one.step) for one in itertools.chain(*batches) if math.isnan(one.value)]
    assume(len(nans) == len(set(nans)) or _takes_nan_twice(theirs))
    runs = {store: _new_run(store) for store in (theirs, ours)}
    for store, batch in itertools.product((theirs, ours), batches):
        store.log_batch(runs[store], batch, [], [])
    assert _held(database, runs[theirs]) == _held(database, runs[ours])


def test_a_batch_is_one_statement_and_costs_no_more_when_it_is_sent_again(stores: Stores) -> None:
    """However many points it has; MLflow's own looks for each of them in turn then."""
    theirs, ours, database = stores
    batch = [Metric("loss", 0.5 * step, step, step) for step in range(1000)]
    counts: dict[SqlAlchemyStore, list[int]] = {}
    for store in (theirs, ours):
        run_id = _new_run(store)
        for _ in range(2):
            with _statements(store) as seen:
                store.log_batch(run_id, batch, [], [])
            counts.setdefault(store, []).append(len([one for one in seen if "metrics" in one]))
        assert 1000 == len(_held(database, run_id)["metrics"])
    first, again = counts[ours]
    assert again <= first <= counts[theirs][0]
    assert again < counts[theirs][1]


def test_only_the_latest_point_of_a_metric_becomes_an_object(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    """An object for each point is what takes MLflow's own code its time."""
    _, ours, _ = stores
    made: list[str] = []
    model = point_rows.SqlMetric

    class Counted:
        def __new__(cls, **columns: Any) -> Any:  # the column names of MLflow
            made.append(columns["key"])
            return model(**columns)

    monkeypatch.setattr(point_rows, "SqlMetric", Counted)
    batch = [Metric(key, 0.5, step, step) for step in range(300) for key in ("a", "b")]
    ours.log_batch(_new_run(ours), batch, [], [])
    assert ["a", "b"] == sorted(made)


def _deleted(store: SqlAlchemyStore) -> str:
    run_id = _new_run(store)
    store.delete_run(run_id)
    return run_id


@pytest.mark.parametrize(
    ("run", "point"),
    [
        (_deleted, Metric("loss", 0.5, 0, 0)),
        (lambda _: "0" * 32, Metric("loss", 0.5, 0, 0)),
        (_new_run, Metric("../loss", 0.5, 0, 0)),
        (_new_run, Metric("loss", "much", 0, 0)),
        (_new_run, Metric("loss", 0.5, -1, 0)),
        (_new_run, Metric("loss", 0.5, 0, "first")),
    ],
)
@pytest.mark.parametrize("method", ["log_batch", "log_metric"])
def test_what_mlflow_refuses_is_refused_in_its_words_and_nothing_is_kept(
    stores: Stores, method: str, run: Callable[[SqlAlchemyStore], str], point: Metric
) -> None:
    """A run that is deleted or unheard of, a name or a value that is none; a good point of the batch neither."""
    theirs, ours, database = stores
    said: list[tuple[str, str]] = []
    for store in (theirs, ours):
        run_id = run(store)
        with pytest.raises(MlflowException) as caught:
            if method == "log_batch":
                store.log_batch(run_id, [Metric("good", 0.5, 0, 0), point], [], [])
            else:
                store.log_metric(run_id, point)
        said.append((caught.value.error_code, str(caught.value).replace(run_id, "")))
        assert {"metrics": [], "latest_metrics": []} == _held(database, run_id)
    assert said[0] == said[1]


def test_tables_with_other_columns_are_left_to_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later version may keep more of a point than is known here."""
    monkeypatch.setattr(point_rows, "_COLUMNS", {"key", "value"})
    store = PointRows(f"sqlite:///{tmp_path / 'mlflow.db'}", str(tmp_path))
    with contextlib.ExitStack() as stack:
        stack.callback(store._dispose_engine)
        assert not store.takes_rows
        run_id = _new_run(store)
        for _ in range(2):
            store.log_batch(run_id, [Metric("loss", 0.5, 0, 0)], [], [])
        assert 1 == len(_held(tmp_path / "mlflow.db", run_id)["metrics"])
