"""A request that a database never takes, for a row that is there, does not hold up its run for good."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from contents import QUICK, numbered, points, the_run
from mlflow_outbox import MLflowTracker
from mlflow_outbox.plugin import runs
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox.spool.events import Request
from mlflow_outbox_worker import collisions
from mlflow_outbox_worker.collisions import Collisions
from mlflow_outbox_worker.outcome import classify
from mlflow_outbox_worker.planner import Batch
from mlflow_outbox_worker.sink import SinkError
from plugin_world import store, tracking
from servers import MlflowServer, eventually
from workers import delivering

MET = SinkError("UNIQUE constraint failed: a.b", kind="answer", status=400, code="BAD_REQUEST")
AWAY = SinkError("refused", kind="connection", sent=False)


def test_only_what_meets_a_row_again_and_again_for_long_is_refused_for_good() -> None:
    """Another failure counts for nothing, nor does another run's; what went well, or another request, begins anew."""
    now = 0.0
    met = Collisions(lambda: now)
    first, second = (Request("log_inputs", number.encode(), 1) for number in "12")

    def judged(request: Request, error: SinkError, run_id: str = "run") -> str:
        return met.judged(run_id, request, error, classify(error, request.operation)).kind

    for _ in range(20):
        assert "retry" == judged(first, MET)
    now = 100.0
    assert "retry" == judged(first, AWAY)
    assert "retry" == judged(first, MET, "other")
    assert "dead_letter" == judged(first, MET)
    for count in range(20):
        now += 10.0
        assert "retry" == judged((first, second)[count % 2], MET)
        met.passed("other")
    for _ in range(20):
        now += 10.0
        assert "retry" == judged(first, MET)
        met.passed("run")


@pytest.mark.parametrize(
    "met",
    [
        MET,
        SinkError("Failed to set tags with given within 3 retries. Keys: ['c']", kind="answer", status=500),
    ],
    ids=["row", "tags"],
)
def test_of_a_batch_that_meets_a_row_each_name_is_judged_alone(met: SinkError) -> None:
    """A name that was taken meanwhile begins anew; another one counts for nothing."""
    now = 0.0
    judge = Collisions(lambda: now)
    both, one, other = (Batch((), {}, dict.fromkeys(keys, "x"), 1) for keys in ("ab", "a", "b"))

    def judged(batch: Batch, error: SinkError = met) -> str:
        return judge.judged_batch("run", batch, error, classify(error, "log_batch")).kind

    assert ["split", "retry"] == [judged(both), judged(both, AWAY)]
    for _ in range(collisions.TRIES - 1):
        assert ["retry", "retry"] == [judged(one), judged(other)]
    now = 100.0
    judge.passed_batch("run", other)
    assert ["dead_letter", "dead_letter", "retry"] == [judged(one), judged(one), judged(other)]


def test_of_names_that_a_database_takes_for_one_the_second_is_a_dead_letter_and_all_else_arrives(
    own_mlflow_server: Callable[..., MlflowServer],
    experiment_name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As MySQL and SQL Server do with names that differ by their case."""
    monkeypatch.setattr(collisions, "SECONDS", 0.0)
    server = own_mlflow_server()
    with contextlib.closing(sqlite3.connect(server.directory / "mlflow.db")) as database, database:
        for table in ("params", "latest_metrics"):
            database.execute(f"CREATE UNIQUE INDEX caseless_{table} ON {table} (run_uuid, key COLLATE NOCASE)")
    tracker = MLflowTracker(experiment_name, server.url, outbox_dir=tmp_path, worker="none", settings=QUICK)
    with tracker.start_run() as run:
        run.log_params({"C": 1, "c": 2, "depth": 3, "Depth": 4})
        for step in range(5):
            run.log_metrics({"loss": step / 2, "Loss": 1.0}, step=step)
    tracker.close(0)
    assert tracker.outbox_path is not None
    with delivering(OutboxDirectory.open(tracker.outbox_path), server.url, QUICK) as counters:
        eventually(lambda: (8, 7) == (counters["delivered"], counters["dead_letters"]), 60)
    held = the_run(server.url, experiment_name)
    assert ({"C": "1", "depth": "3"}, "FINISHED") == (held.data.params, held.info.status)
    assert {"loss": 2.0} == held.data.metrics
    assert numbered(5) == points(server.url, held.info.run_id, "loss")


@pytest.mark.parametrize("where", ["server", "sqlite"])
def test_what_a_database_never_takes_is_a_dead_letter_and_the_rest_of_the_run_arrives(
    where: str,
    mlflow_server: MlflowServer,
    sqlite_uri: str,
    experiment_name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a journal has it that was written by somebody who does not refuse it."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    monkeypatch.setattr(collisions, "SECONDS", 0.0)
    monkeypatch.setattr(runs, "_check_tags_of_datasets", lambda _: None)
    plain = {"server": mlflow_server.url, "sqlite": sqlite_uri}[where]
    with tracking(f"outbox+{plain}", tmp_path / "outbox") as mlflow:
        mlflow.set_experiment(experiment_name)
        with mlflow.start_run() as run:
            twice = [InputTag("a", "1"), InputTag("a", "2")]
            mlflow.MlflowClient().log_inputs(run.info.run_id, [DatasetInput(Dataset("n", "d", "t", "s"), twice)])
            mlflow.log_metric("m", 1.0)
        result = store(f"outbox+{plain}").outbox.flush(60)
    assert (0, 0, 1) == (result.pending, result.parked, result.dead)
    found = the_run(plain, experiment_name)
    assert ({"m": 1.0}, "FINISHED") == (found.data.metrics, found.info.status)


def test_what_no_database_takes_of_a_dataset_or_a_link_is_refused_or_mended_at_the_call(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Two tags of one name are refused, as without an outbox; a trace that is named twice is linked once."""
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.exceptions import MlflowException

    given = [InputTag("a", "1"), InputTag("a", "2")]
    for prefix in ("", "outbox+"):
        uri = f"{prefix}{mlflow_server.url}"
        with tracking(uri, tmp_path) as mlflow:
            api = mlflow.MlflowClient()
            number = api.create_experiment(experiment_name + prefix)
            run = api.create_run(number).info.run_id
            with pytest.raises(MlflowException) as raised:
                api.log_inputs(run, [DatasetInput(Dataset("n", "d", "t", "s"), given)])
            assert "BAD_REQUEST" == raised.value.error_code
            good = [DatasetInput(Dataset("n", "d", "t", "s"), tags) for tags in (given[:1], given)]
            api.log_inputs(run, good)
            if prefix:
                trace = "tr-" + "a" * 32
                api.link_traces_to_run([trace, trace], run)
                result = store(uri).outbox.flush(60)
                assert (True, 0) == (bool(result), result.dead)
    for prefix in ("", "outbox+"):
        (held,) = the_run(mlflow_server.url, experiment_name + prefix).inputs.dataset_inputs
        assert [("a", "1")] == [(tag.key, tag.value) for tag in held.tags]
