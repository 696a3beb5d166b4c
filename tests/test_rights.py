"""A server with users: what one of them may not do holds up nothing that he may."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from commands import run
from contents import QUICK, artifact_text, numbered, points, runs
from mlflow_outbox import MLflowTracker
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox.testing import faults
from mlflow_outbox.testing.proxy import Action, FaultProxy
from mlflow_outbox_worker.ledger import Ledger
from mlflow_outbox_worker.notes import destination_note
from nursery import ADMINISTRATOR
from servers import MlflowServer, eventually
from test_outage import after_the_next, creates

#: What is parked is not tried again by itself while a test lasts.
PATIENT = dataclasses.replace(QUICK, parked_retry=600.0)


@contextlib.contextmanager
def logged_in(name: str, password: str) -> Iterator[None]:
    """Be a user for MLflow's clients."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_USERNAME", name)
        patch.setenv("MLFLOW_TRACKING_PASSWORD", password)
        yield


@pytest.fixture
def shared(own_mlflow_server: Callable[..., MlflowServer]) -> Iterator[MlflowServer]:
    """A server with ada, who has an experiment, and bob, who is the user here and may only read in it."""
    from mlflow import MlflowClient
    from mlflow.server.auth.client import AuthServiceClient

    server = own_mlflow_server(users=True)
    with logged_in(*ADMINISTRATOR):
        for name in ("ada", "bob"):
            AuthServiceClient(server.url).create_user(name, f"the password of {name}")
    with logged_in("ada", "the password of ada"):
        MlflowClient(server.url).create_experiment("hers")
    with logged_in("bob", "the password of bob"):
        yield server


def granted(server: MlflowServer) -> None:
    """Let bob write to ada's experiment."""
    from mlflow import MlflowClient
    from mlflow.server.auth.client import AuthServiceClient

    with logged_in(*ADMINISTRATOR):
        experiment = MlflowClient(server.url).get_experiment_by_name("hers")
        AuthServiceClient(server.url).grant_user_permission("bob", "experiment", experiment.experiment_id, "EDIT")


def log(uri: str, experiment: str, outbox: Path, name: str, **named: Any) -> MLflowTracker:
    """Log a run with twenty points, and return its tracker."""
    tracker = MLflowTracker(experiment, uri, outbox_dir=outbox, **{"settings": PATIENT, **named})
    with tracker.start_run(name) as run:
        for step in range(20):
            assert run.log_metric("loss", step / 2, step=step)
    return tracker


@contextlib.contextmanager
def reading(tracker: MLflowTracker) -> Iterator[Ledger]:
    """Open the ledger of a tracker's outbox, for a look."""
    assert tracker.outbox_path is not None
    with contextlib.closing(Ledger.open(OutboxDirectory.open(tracker.outbox_path).ledger, read_only=True)) as ledger:
        yield ledger


def standing(tracker: MLflowTracker) -> str:
    """Return how the destination stands."""
    with reading(tracker) as ledger:
        return destination_note(ledger).state


def whole(uri: str, experiment: str) -> list[str]:
    """Return the names of an experiment's runs that have all their points, once."""
    found = runs(uri, experiment)
    return sorted(run.info.run_name for run in found if numbered(20) == points(uri, run.info.run_id, "loss"))


def test_a_run_that_a_user_may_not_log_holds_up_no_other(shared: MlflowServer, tmp_path: Path) -> None:
    """It is parked alone, with the experiment's name, and arrives once the right is given; others come and go."""
    hers = log(shared.url, "hers", tmp_path, "forbidden")
    eventually(lambda: hers.counters.get("parked", 0))
    his = log(shared.url, "his", tmp_path, "first")
    eventually(lambda: ["first"] == whole(shared.url, "his"))
    log(shared.url, "his", tmp_path, "second")
    eventually(lambda: ["first", "second"] == whole(shared.url, "his"))
    result = his.flush(60)
    assert (0, 0) == (result.pending, result.dead)
    assert result.parked > 20
    assert "ok" == standing(his)
    with reading(his) as ledger:
        [reason] = [record.reason for record in ledger.records() if record.state == "parked"]
    assert "403: Permission denied; a right is missing for that in the experiment 'hers'" in reason
    granted(shared)
    assert hers.close(60)
    assert his.close(60)
    assert ["forbidden"] == whole(shared.url, "hers")
    assert 2 == len(runs(shared.url, "his"))


def test_a_replay_leaves_out_what_a_user_may_not_log_and_sends_the_rest(shared: MlflowServer, tmp_path: Path) -> None:
    """What is refused is named as skipped, whichever comes first; a second replay has that alone to send."""
    for number in range(12):
        experiment = "hers" if number % 4 == 0 else "his"
        log(shared.url, experiment, tmp_path, f"run{number:02}", worker="none").close(0)
    forbidden, allowed = ["run00", "run04", "run08"], [f"run{number:02}" for number in range(12) if number % 4]
    first = run("replay", str(tmp_path), "--to", shared.url, "--timeout", "60")
    assert 4 == first.code, first
    assert "in the experiment 'hers'" in first.out + first.err
    assert (allowed, []) == (whole(shared.url, "his"), whole(shared.url, "hers"))
    granted(shared)
    second = run("replay", str(tmp_path), "--to", shared.url, "--timeout", "60")
    assert 0 == second.code, second
    assert (allowed, forbidden) == (whole(shared.url, "his"), whole(shared.url, "hers"))


def test_a_wrong_password_still_parks_the_destination(
    shared: MlflowServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is about who asks, whatever is asked for, and the log says where that was taken from."""
    with logged_in("bob", "another one"), caplog.at_level(logging.WARNING):
        tracker = log(shared.url, "his", tmp_path, "run")
        result = tracker.flush(60)
        assert (0, 0) == (result.pending, result.dead)
        assert "parked" == standing(tracker)
        assert "are those of MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD. Events stay" in caplog.text
        tracker.close(0)
    with logged_in("bob", "the password of bob"), MLflowTracker("his", shared.url, outbox_dir=tmp_path) as again:
        assert again.flush(60)
    assert ["run"] == whole(shared.url, "his")


def test_a_second_run_that_may_not_be_deleted_is_named_and_parks_nothing(
    shared: MlflowServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Who may write to an experiment may not delete from it: the empty run of a late create stays, which is said."""
    granted(shared)
    with FaultProxy(shared.url) as proxy, caplog.at_level(logging.WARNING):
        proxy.on("runs/create", after_the_next(proxy), times=1)
        settings = dataclasses.replace(PATIENT, request_timeout=3.0)
        tracker = log(proxy.url, "hers", tmp_path, "run", settings=settings)
        assert tracker.close(60)
        eventually(lambda: 2 == creates(proxy))
    assert tracker.counters.get("twins_left", 0)
    assert 1 == caplog.text.count("may not be deleted by this user, and stays")
    assert 2 == len(runs(shared.url, "hers"))
    assert ["run"] == whole(shared.url, "hers")


def test_a_gateway_that_forbids_everything_parks_the_destination(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Runs are refused, and so is the question that names none of them."""
    with FaultProxy(mlflow_server.url) as proxy:
        proxy.on(lambda _method, _path: True, faults.status(403), times=None)
        for name in ("one", "two"):
            log(proxy.url, experiment_name, tmp_path, name, worker="none").close(0)
        with MLflowTracker(experiment_name, proxy.url, outbox_dir=tmp_path, settings=PATIENT) as tracker:
            eventually(lambda: 44 == tracker.flush(0).parked)
            assert "parked" == standing(tracker)
            assert any("experiments/search" in request.path for request in proxy.requests)
            proxy.clear()
            assert tracker.flush(60)
    assert ["one", "two"] == whole(mlflow_server.url, experiment_name)


@pytest.mark.parametrize(
    "answer", [faults.html_page(), faults.status(404), faults.status(403)], ids=["page", "404", "403"]
)
def test_an_answer_that_is_not_mlflows_to_one_run_holds_up_no_other(
    answer: Action, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """A firewall dislikes a text, or the server does not know the address: everything else is taken as before."""
    with (
        FaultProxy(mlflow_server.url) as proxy,
        MLflowTracker(experiment_name, proxy.url, outbox_dir=tmp_path, settings=PATIENT) as tracker,
    ):
        with tracker.start_run("disliked") as disliked:
            assert tracker.flush(60)
            [held] = runs(mlflow_server.url, experiment_name)
            proxy.on(lambda method, path: "PUT" == method and held.info.run_id in path, answer, times=None)
            disliked.log_text("'; DROP TABLE runs; --", "notes.txt")
        eventually(lambda: 2 == tracker.flush(0).parked)
        for number, name in enumerate(("first", "second"), 1):
            log(proxy.url, experiment_name, tmp_path, name)
            eventually(lambda number=number: number == len(whole(mlflow_server.url, experiment_name)))
        assert "ok" == standing(tracker)
        proxy.clear()
        assert tracker.flush(60)
    assert "'; DROP TABLE runs; --" == artifact_text(mlflow_server.url, held.info.run_id, "notes.txt")


def test_a_user_who_may_store_files_and_not_list_them_has_runs_that_are_done(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As the roles of storages allow that only write: what was stored is not read back, which is said once."""
    with FaultProxy(mlflow_server.url) as proxy, caplog.at_level(logging.WARNING):
        proxy.on("artifacts/list", faults.status(403), times=None)
        with MLflowTracker(experiment_name, proxy.url, outbox_dir=tmp_path, settings=PATIENT) as tracker:
            for number in range(2):
                with tracker.start_run() as run:
                    assert run.log_text(f"text {number}", "notes/text.txt")
            eventually(lambda: 2 == tracker.counters.get("runs_verified", 0))
            assert 0 == tracker.counters.get("parked", 0)
    assert 1 == caplog.text.count("may not be listed by this user")
    held = [run.info.run_id for run in runs(mlflow_server.url, experiment_name)]
    assert ["text 0", "text 1"] == sorted(artifact_text(mlflow_server.url, run_id, "notes/text.txt") for run_id in held)
