"""What MLflow refuses for good: exactly that event becomes a dead letter, or that run is parked; the rest arrives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from contents import QUICK, client, numbered, points, runs, the_run
from mlflow_outbox import MLflowTracker
from mlflow_outbox.spool.events import Params, decode
from mlflow_outbox.testing.proxy import FaultProxy
from mlflow_outbox_worker.ledger import Ledger
from mlflow_outbox_worker.records import DeadLetter
from servers import MlflowServer, eventually


def dead_letters(tracker: MLflowTracker) -> list[DeadLetter]:
    """Return all dead letters of a tracker's outbox."""
    assert tracker.outbox_path is not None
    ledger = Ledger.open(tracker.outbox_path / "delivery", read_only=True)
    letters = list(ledger.dead_letters())
    ledger.close()
    return letters


@pytest.mark.compatibility
@pytest.mark.parametrize("store", ["server", "sqlite", "file"])
def test_a_conflicting_param_alone_is_a_dead_letter(
    store: str, mlflow_server: MlflowServer, sqlite_uri: str, file_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """Of 60 params one has two values: the second is kept as a dead letter, 60 params and all points arrive."""
    uri = {"server": mlflow_server.url, "sqlite": sqlite_uri, "file": file_uri}[store]
    tracker = MLflowTracker(experiment_name, uri, outbox_dir=tmp_path / "outbox", settings=QUICK)
    with tracker.start_run("conflict") as run:
        run.log_params({f"p{n}": n for n in range(30)})
        assert tracker.flush(60)
        run.log_params({"p7": "other"} | {f"q{n}": n for n in range(30)})
        for i in range(50):
            run.log_metric("loss", i / 2, step=i)
    result = tracker.flush(60)
    assert result
    assert 1 == result.dead
    letters = dead_letters(tracker)
    assert [{"p7": "other"}] == [
        event.values for event in map(decode, (x.payload for x in letters)) if isinstance(event, Params)
    ]
    assert "p7" in letters[0].reason
    held = the_run(uri, experiment_name)
    assert {f"p{n}": str(n) for n in range(30)} | {f"q{n}": str(n) for n in range(30)} == held.data.params
    assert numbered(50) == points(uri, held.info.run_id, "loss")
    assert "FINISHED" == held.info.status
    tracker.close()


def test_one_event_that_yields_many_letters_is_one_event(sqlite_uri: str, experiment_name: str, tmp_path: Path) -> None:
    """50 refused params of one call are 50 letters and one dead event; a refused part leaves its event delivered."""
    tracker = MLflowTracker(experiment_name, sqlite_uri, outbox_dir=tmp_path / "outbox", settings=QUICK)
    run = tracker.start_run()
    run.log_params({f"p{n}": n for n in range(50)})
    assert tracker.flush(60)
    assert 2 == tracker.counters["delivered"]
    run.log_params({f"p{n}": n + 1 for n in range(50)})
    run.log_params({"p0": 2, "q": 1})
    assert tracker.flush(60)
    run.end()
    result = tracker.close(60)
    counters = tracker.counters
    assert (4, 51, 0) == (result.delivered, result.dead, result.pending)
    assert (4, 1, 51) == (counters["delivered"], counters["dead_events"], counters["dead_letters"])


def test_two_values_of_a_param_in_one_window(sqlite_uri: str, experiment_name: str, tmp_path: Path) -> None:
    """The first value stays, the second becomes a dead letter, in one delivery too."""
    tracker = MLflowTracker(experiment_name, sqlite_uri, outbox_dir=tmp_path / "outbox", settings=QUICK)
    with tracker.start_run() as run:
        run.log_param("depth", 3)
        run.log_param("depth", 5)
        run.log_param("depth", 3)
    assert 1 == tracker.close(60).dead
    assert {"depth": "3"} == the_run(sqlite_uri, experiment_name).data.params


def test_one_refused_point_of_a_thousand_is_found(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """A server that refuses every batch with one certain point gets the other 999, in few requests."""
    with FaultProxy(mlflow_server.url) as proxy:
        tracker = MLflowTracker(experiment_name, proxy.url, outbox_dir=tmp_path, settings=QUICK)
        proxy.down()  # how many requests it takes would depend on who is faster, who logs or who delivers
        run = tracker.start_run()
        for i in range(999):
            run.log_metric("loss", i / 2, step=i)
        run._keys.add("bad$key")  # passes the check of the call, as a newer or stricter server would find it
        run.log_metric("bad$key", 1.0, step=1)
        run.end()
        proxy.up()
        result = tracker.close(60)
        batches = sum("log-batch" in request.path for request in proxy.requests)
    assert 1 == result.dead
    held = the_run(mlflow_server.url, experiment_name)
    assert numbered(999) == points(mlflow_server.url, held.info.run_id, "loss")
    assert batches <= 2 * 10 + 4, "halving needs about two requests a level"


@pytest.mark.compatibility
def test_an_over_long_value_costs_at_most_itself(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """A param of 7000 characters is cut or refused by MLflow, as MLflow decides; its neighbours arrive."""
    tracker = MLflowTracker(experiment_name, mlflow_server.url, outbox_dir=tmp_path, settings=QUICK)
    with tracker.start_run() as run:
        run.log_params({"before": 1, "long": "x" * 7000, "after": 2})
        run.set_tags({"long": "y" * 9000, "short": "z"})
        run.log_metric("loss", 1.0)
    result = tracker.close(60)
    held = the_run(mlflow_server.url, experiment_name)
    assert ("1", "2", "z", 1.0) == (
        held.data.params["before"],
        held.data.params["after"],
        held.data.tags["short"],
        held.data.metrics["loss"],
    )
    assert result
    kept = [len(held.data.params.get("long", "")), len(held.data.tags.get("long", ""))]
    assert result.dead == sum(length == 0 for length in kept)
    assert all(length in {0, 6000, 8000} for length in kept)
    assert 2 == tracker.counters["over_long_values"]


@pytest.mark.compatibility
def test_a_deleted_run_is_parked_and_the_others_go_on(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Its events wait for a person; when the run is restored they arrive."""
    uri = mlflow_server.url
    tracker = MLflowTracker(experiment_name, uri, outbox_dir=tmp_path, settings=QUICK)
    deleted, other = tracker.start_run("deleted"), tracker.start_run("other")
    deleted.log_metric("loss", 0.0, step=0)
    assert tracker.flush(60)
    remote = next(run.info.run_id for run in runs(uri, experiment_name) if run.info.run_name == "deleted")
    with client(uri) as mlflow:
        mlflow.delete_run(remote)
    for i in range(1, 100):
        deleted.log_metric("loss", i / 2, step=i)
        other.log_metric("loss", i / 2, step=i)
    other.end()
    result = tracker.flush(60)
    assert not result
    assert (0, 99, 0) == (result.pending, result.parked, result.dead)
    assert numbered(100) - numbered(1) == points(uri, the_run(uri, experiment_name).info.run_id, "loss")
    with client(uri) as mlflow:
        mlflow.restore_run(remote)
    assert eventually(lambda: tracker.flush(10))
    assert numbered(100) == points(uri, remote, "loss")
    tracker.close()


def test_a_wiped_server_parks_its_runs_and_takes_new_ones(
    own_mlflow_server: Callable[..., MlflowServer], experiment_name: str, tmp_path: Path
) -> None:
    """Events of runs that the server has forgotten are kept, not discarded and not sent elsewhere."""
    server = own_mlflow_server()
    tracker = MLflowTracker(experiment_name, server.url, outbox_dir=tmp_path, settings=QUICK)
    old = tracker.start_run("old")
    old.log_metric("loss", 0.0, step=0)
    assert tracker.flush(60)
    server.wipe()
    server.start()
    old.log_metric("loss", 0.5, step=1)
    eventually(lambda: tracker.flush(5).parked == 1)
    assert 0 == tracker.flush(5).dead
    with tracker.start_run("new") as new:
        new.log_metric("loss", 1.0, step=1)
    eventually(lambda: ["new"] == [run.info.run_name for run in runs(server.url, experiment_name)])
    tracker.close(5)
