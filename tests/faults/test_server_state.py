"""The server itself changes: killed in the middle, wiped, its runs deleted, its limits met."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from contents import client, runs
from faults import workload
from faults.oracle import held
from faults.table import Row
from faults.test_network import PATIENT, Session
from mlflow_outbox import MLflowTracker
from servers import MlflowServer, eventually


@pytest.mark.fault("F62", "SIGKILL of the server while batches are under way, restarted on its database")
def test_a_server_killed_in_the_middle_holds_everything_once(
    part: slice, own_mlflow_server: Callable[..., MlflowServer], row: Row, rng: random.Random, tmp_path: Path
) -> None:
    """Batches that it may or may not have committed are there once after it is back."""
    server = own_mlflow_server()
    given = workload.settings(request_timeout=3.0, retry_max=0.2, batch_points=20)
    session = Session(server, server.url, "killed", tmp_path / "outbox", given)
    for _ in range(row.pick(2, 100, 1000))[part]:
        session.log(rng.randint(100, 400))
        session.tracker.flush(rng.uniform(0, 0.15))
        server.kill()
        session.log(20)
        server.start()
        session.settle(row, timeout=60)
        row.done()
    session.tracker.close(1)


@pytest.mark.fault("F63", "the server's database is wiped while events wait")
def test_a_wiped_server_never_makes_a_run_vanish_in_silence(
    own_mlflow_server: Callable[..., MlflowServer], row: Row, tmp_path: Path
) -> None:
    """The run that the server no longer knows waits for a person; nothing is discarded, and new runs go on."""
    for number in range(row.pick(1, 20, 100)):
        server = own_mlflow_server()
        tracker = MLflowTracker("wiped", server.url, outbox_dir=tmp_path / f"outbox{number}", settings=PATIENT)
        old = tracker.start_run("old")
        before = [n for n in range(20) if workload.log_event(old, n)]
        assert tracker.flush(30)
        server.wipe()
        more = [n for n in range(20, 40) if workload.log_event(old, n)]
        assert 40 == len(before + more)
        server.start()
        new = tracker.start_run("new")
        acked = {n for n in range(100, 120) if workload.log_event(new, n)}
        new.end()
        eventually(lambda acked=acked, server=server: acked <= set(held(server.database_uri, "wiped").events), 30)
        eventually(lambda tracker=tracker: 0 == tracker.flush(2).pending, 30)
        left = tracker.flush(0)
        there = set(held(server.database_uri, "wiped").events)
        # Either the run waits, parked, with its new events; or it was made again. It is never gone without a word.
        assert left.parked >= 20 or set(range(20, 40)) <= there, (left, sorted(there))
        assert 0 == left.dead
        tracker.close(1)
        row.done()


@pytest.mark.fault("F64", "one run is deleted, another ended, by somebody else, while events wait for both")
def test_a_deleted_run_waits_and_holds_up_no_other(
    mlflow_server: MlflowServer, experiment_name: str, row: Row, tmp_path: Path
) -> None:
    """Its events stay on disk until it is restored; then they arrive."""
    for number in range(row.pick(1, 20, 100)):
        experiment = f"{experiment_name}-{number}"
        tracker = MLflowTracker(
            experiment, mlflow_server.url, outbox_dir=tmp_path / f"outbox{number}", settings=PATIENT
        )
        gone, ended, other = (tracker.start_run(name) for name in ("gone", "ended", "other"))
        acked = {n for n in range(30) if workload.log_event((gone, ended, other)[n % 3], n)}
        assert tracker.flush(30)
        ids = {run.info.run_name: run.info.run_id for run in runs(mlflow_server.url, experiment)}
        with client(mlflow_server.url) as mlflow:
            mlflow.delete_run(ids["gone"])
            mlflow.set_terminated(ids["ended"], "KILLED")
        acked |= {n for n in range(30, 60) if workload.log_event((gone, ended, other)[n % 3], n)}
        eventually(lambda tracker=tracker: 0 == tracker.flush(2).pending, 30)
        left = tracker.flush(0)
        assert (10, 0) == (left.parked, left.dead)
        held(mlflow_server.database_uri, experiment).check({n for n in acked if n % 3})
        with client(mlflow_server.url) as mlflow:
            mlflow.restore_run(ids["gone"])
        eventually(lambda tracker=tracker: tracker.flush(2), 30, "the restored run is delivered")
        held(mlflow_server.database_uri, experiment).check(acked)
        tracker.close(1)
        row.done()


@pytest.mark.fault("F65", "a param has another value already, among 99 events that are fine (F53)")
def test_a_conflicting_param_is_the_only_dead_letter(
    mlflow_server: MlflowServer, experiment_name: str, row: Row, tmp_path: Path
) -> None:
    """Exactly that param is refused; the rest of its batch arrives."""
    for number in range(row.pick(1, 20, 100)):
        experiment = f"{experiment_name}-{number}"
        tracker = MLflowTracker(
            experiment, mlflow_server.url, outbox_dir=tmp_path / f"outbox{number}", settings=PATIENT
        )
        run = tracker.start_run("conflict")
        assert workload.log_event(run, 0)
        assert tracker.flush(30)
        (listed,) = runs(mlflow_server.url, experiment)
        with client(mlflow_server.url) as mlflow:
            mlflow.log_param(listed.info.run_id, "p53", "somebody else's")
        acked = {n for n in range(1, 100) if workload.log_event(run, n)} | {0}
        run.end()
        left = tracker.flush(30)
        assert (0, 0, 1) == (left.pending, left.parked, left.dead)
        found = held(mlflow_server.database_uri, experiment)
        assert ['param 53: "somebody else\'s"'] == found.wrong
        found.wrong.clear()
        found.check(acked)
        tracker.close(1)
        row.done()


@pytest.mark.fault("F66", "101 params, 1,001 metrics, 1 MB, keys of 251, values of 6,001 and 8,001 characters at once")
def test_what_is_over_mlflow_s_limits_is_split_or_refused_at_once(
    mlflow_server: MlflowServer, experiment_name: str, row: Row, tmp_path: Path
) -> None:
    """The large calls arrive whole in several requests; a key that cannot be is refused, and delivery goes on."""
    tracker = MLflowTracker(experiment_name, mlflow_server.url, outbox_dir=tmp_path / "outbox", settings=PATIENT)
    run = tracker.start_run("limits")
    assert run.log_params({f"param{n}": n for n in range(101)})
    assert run.log_metrics({f"metric{n}": float(n) for n in range(1001)}, step=1)
    assert run.set_tags({f"tag{n}": "x" * 5000 for n in range(250)}), "more than a megabyte"
    assert not run.log_metric("k" * 251, 1.0)
    run.log_param("long", "v" * 6001)
    run.set_tag("long", "v" * 8001)
    acked = {n for n in range(30) if workload.log_event(run, n)}
    run.end()
    left = tracker.flush(60)
    assert (0, 0, 0) == (left.pending, left.parked, left.dead), (left, tracker.counters)
    (listed,) = runs(mlflow_server.url, experiment_name)
    assert 1001 == len([key for key in listed.data.metrics if key.startswith("metric")])
    assert 101 == len([key for key in listed.data.params if key.startswith("param")])
    assert 250 == len([key for key in listed.data.tags if key.startswith("tag")])
    assert "v" * 6000 == listed.data.params["long"][:6000]
    held(mlflow_server.database_uri, experiment_name).check(acked)
    tracker.close(1)
    row.done(6)
