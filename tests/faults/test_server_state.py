"""The server itself changes: killed in the middle, wiped, its runs deleted, its limits met."""

from __future__ import annotations

import contextlib
import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from contents import client, runs
from faults import workload
from faults.network import PATIENT, Session
from faults.oracle import held, kind_of
from faults.table import Row
from mlflow_outbox import MLflowTracker
from mlflow_outbox.spool.events import decode
from mlflow_outbox.testing import faults
from mlflow_outbox.testing.proxy import Action, FaultProxy
from mlflow_outbox_worker.cli import main
from mlflow_outbox_worker.ledger import Ledger
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
        server.warm_up()
        session.settle(row, timeout=60)
        row.done()
    session.tracker.close(1)


@pytest.mark.fault("F63", "the server's database is wiped while events wait")
def test_a_wiped_server_never_makes_a_run_vanish_in_silence(
    own_mlflow_server: Callable[..., MlflowServer], row: Row, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What the server no longer knows waits, new runs go on, and what the warning says to do brings all of it back."""
    for number in range(row.pick(1, 20, 100)):
        server, outbox = own_mlflow_server(), tmp_path / f"outbox{number}"
        tracker = MLflowTracker("wiped", server.url, outbox_dir=outbox, settings=PATIENT)
        old = tracker.start_run("old")
        lost = {n for n in range(20) if workload.log_event(old, n)}
        assert tracker.flush(30)
        server.wipe()
        lost |= {n for n in range(20, 40) if workload.log_event(old, n)}
        server.start()
        new = tracker.start_run("new")
        acked = {n for n in range(100, 120) if workload.log_event(new, n)}
        new.end()
        assert {*range(40), *range(100, 120)} == lost | acked
        caplog.clear()
        eventually(lambda acked=acked, server=server: acked <= set(held(server.database_uri, "wiped").events))
        eventually(lambda tracker=tracker: 0 == tracker.flush(2).pending)
        left = tracker.flush(0)
        assert (20, 0) == (left.parked, left.dead), "what was not delivered before"
        held(server.database_uri, "wiped").check(acked)
        said = eventually(lambda old=old: [text for text in caplog.messages if f"run {old.run_id} waits" in text])
        remedy = f"mlflow-outbox replay --again {tracker.outbox_path}"
        assert [True] == [remedy in text for text in said]
        old.end()
        tracker.close(1)
        assert 0 == main(remedy.split()[1:])
        held(server.database_uri, "wiped").check(lost | acked)
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
        eventually(lambda tracker=tracker: 0 == tracker.flush(2).pending)
        left = tracker.flush(0)
        assert (10, 0) == (left.parked, left.dead)
        held(mlflow_server.database_uri, experiment).check({n for n in acked if n % 3})
        with client(mlflow_server.url) as mlflow:
            mlflow.restore_run(ids["gone"])
        eventually(lambda tracker=tracker: tracker.flush(2), 60, "the restored run is delivered")
        held(mlflow_server.database_uri, experiment).check(acked)
        tracker.close(1)
        row.done()


@pytest.mark.fault("F64", "an experiment is deleted by somebody else while events wait for it")
def test_a_deleted_experiment_waits_and_holds_up_no_other(
    mlflow_server: MlflowServer, experiment_name: str, row: Row, tmp_path: Path
) -> None:
    """Its runs, old and new, stay on disk until it is restored; then they arrive."""
    for number in range(row.pick(1, 20, 100)):
        gone, outbox = f"{experiment_name}-{number}", tmp_path / f"outbox{number}"
        tracker = MLflowTracker(gone, mlflow_server.url, outbox_dir=outbox, settings=PATIENT)
        other = MLflowTracker(f"{gone}-other", mlflow_server.url, outbox_dir=outbox, settings=PATIENT)
        old, others = tracker.start_run("old"), other.start_run("others")
        acked = {n for n in range(20) if workload.log_event(old, n)}
        assert tracker.flush(30)
        held(mlflow_server.database_uri, gone).check(acked)
        with client(mlflow_server.url) as mlflow:
            experiment = mlflow.get_experiment_by_name(gone)
            mlflow.delete_experiment(experiment.experiment_id)
        acked |= {n for n in range(20, 40) if workload.log_event(old, n)}
        new = tracker.start_run("new")
        acked |= {n for n in range(40, 60) if workload.log_event(new, n)}
        at_other = {n for n in range(100, 120) if workload.log_event(others, n)}
        eventually(lambda tracker=tracker: 0 == tracker.flush(2).pending)
        left = tracker.flush(0)
        assert (41, 0) == (left.parked, left.dead), "twenty of the old run, the new one's start and its twenty"
        held(mlflow_server.database_uri, f"{gone}-other").check(at_other)
        assert (60, 20) == (len(acked), len(at_other))
        with client(mlflow_server.url) as mlflow:
            mlflow.restore_experiment(experiment.experiment_id)
        eventually(lambda tracker=tracker: tracker.flush(2), 60, "the restored experiment's runs are delivered")
        held(mlflow_server.database_uri, gone).check(acked)
        tracker.close(1)
        other.close(1)
        row.done()


def _refusals() -> dict[str, Action]:
    """Return the answers that say for good what is wrong with a request's content."""
    said = json.dumps({"error_code": "INVALID_PARAMETER_VALUE", "message": "it holds what is not taken"})
    return {
        "400": faults.status(400, {}, said),
        "404": faults.status(404, {}, said),
        "413": faults.status(413, {}, "<html>too large</html>"),  # by the server that stands before MLflow's
        "422": faults.status(422, {}, json.dumps({"detail": "it holds what is not taken"})),
    }


@pytest.mark.fault("F53", "400, 404, 413, 422 for one event of a batch of 100")
@pytest.mark.parametrize("answer", list(_refusals()))
def test_one_refused_event_of_a_batch_is_the_only_dead_letter(
    answer: str,
    mlflow_server: MlflowServer,
    proxy: FaultProxy,
    experiment_name: str,
    row: Row,
    rng: random.Random,
    tmp_path: Path,
) -> None:
    """It is found by halving, in as few requests as that takes; the other 99 arrive."""
    numbers = [n for n in range(200) if "metric" == kind_of(n)][:100]
    for number in range(row.pick(1, 12, 125)):
        experiment, outbox = f"{experiment_name}-{number}", tmp_path / f"outbox{number}"
        bad = rng.choice(numbers)

        def holds(body: bytes, bad: int = bad) -> bool:
            return bad in [point["step"] for point in json.loads(body).get("metrics", ())]

        proxy.clear()
        proxy.on("runs/log-batch", _refusals()[answer], times=None, body=holds)
        # Nothing is delivered before all is logged, so that it is one batch.
        offline = MLflowTracker(experiment, proxy.url, outbox_dir=outbox, settings=PATIENT, worker="none")
        run = offline.start_run("refused")
        acked = {n for n in numbers if workload.log_event(run, n)}
        run.end()
        offline.close(1)
        before = len(proxy.requests)
        tracker = MLflowTracker(experiment, proxy.url, outbox_dir=outbox, settings=PATIENT)
        left = tracker.flush(30)
        assert (0, 0, 1) == (left.pending, left.parked, left.dead)
        batches = [request for request in proxy.requests[before:] if "log-batch" in request.path]
        assert 100 == len(json.loads(batches[0].body)["metrics"]), "all in one"
        extra = len(batches) - 1
        assert extra <= 2 * math.log2(100) + 1
        found = held(mlflow_server.database_uri, experiment)
        assert bad not in found.events
        assert 99 == len(found.events)
        found.check(acked, dead={bad})
        with contextlib.closing(Ledger.open(Path(str(tracker.outbox_path)) / "delivery", read_only=True)) as ledger:
            (letter,) = ledger.dead_letters()
        assert (int(answer), bad) == (letter.status, getattr(decode(letter.payload), "step", None))
        tracker.close(1)
        row.measure(extra_requests=max(extra, int(row.measured.get("extra_requests", 0))))
        row.done()


@pytest.mark.fault("F53", "404 without a word of MLflow's, and 404 for the run, for a batch of 100")
@pytest.mark.parametrize(
    "said", ["<html>not found</html>", '{"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "?"}']
)
def test_a_404_that_is_not_about_an_event_makes_no_dead_letter(
    said: str, session: Session, proxy: FaultProxy, row: Row
) -> None:
    """A wrong URL and a run that is gone are no event's fault: all waits, and arrives."""
    for _ in range(row.pick(1, 5, 50)):
        proxy.on("runs/log-batch", faults.status(404, {}, said), times=None)
        session.log(100)
        eventually(lambda: session.tracker.flush(2).parked, 60, "it waits")
        assert 0 == session.tracker.flush(0).dead
        proxy.clear()
        session.arrives(row)
        row.done()
    session.settle(row)


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
