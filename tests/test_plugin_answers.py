"""What a server says no to, and fails at: raised as without an outbox, and no reason to take the server for away."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlflow_outbox.spool import provisional
from mlflow_outbox.testing.faults import drop, status
from mlflow_outbox.testing.proxy import Action, FaultProxy
from plugin_world import deliver, store, the_runs, tracking
from servers import MlflowServer

#: A run of somebody else.
_THEIRS = "e" * 32
#: What MLflow's server answers where it has no such address.
_NO_ADDRESS = status(
    404,
    {"Content-Type": "text/html; charset=utf-8"},
    "<!doctype html>\n<html lang=en>\n<title>404 Not Found</title>\n<h1>Not Found</h1>\n<p>The requested URL was not "
    "found on the server. If you entered the URL manually please check your spelling and try again.</p>\n",
)


def answer(code: int, error_code: str, message: str) -> Action:
    """Return an action that answers as MLflow does."""
    body = json.dumps({"error_code": error_code, "message": message})
    return status(code, {"Content-Type": "application/json"}, body)


def raised_by(mlflow: Any, call: Any) -> tuple[str, str, str]:
    """Return class, code and words of what a call raises."""
    from mlflow.exceptions import MlflowException

    with pytest.raises(MlflowException) as raised:
        call(mlflow)
    return type(raised.value).__name__, raised.value.error_code, str(raised.value)


def test_a_run_that_the_server_forbids_is_no_outage(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """The error is the one of the plain URI, and the next run begins with an id of the server's."""
    with FaultProxy(mlflow_server.url) as proxy:
        proxy.on(_THEIRS, answer(403, "PERMISSION_DENIED", "Permission denied"), times=None)
        with tracking(proxy.url, tmp_path) as mlflow:
            expected = raised_by(mlflow, lambda mlflow: mlflow.get_run(_THEIRS))
        uri = f"outbox+{proxy.url}"
        with tracking(uri, tmp_path) as mlflow:
            mlflow.set_experiment(experiment_name)
            assert expected == raised_by(mlflow, lambda mlflow: mlflow.get_run(_THEIRS))
            assert not store(uri).server.is_away()
            with mlflow.start_run() as run:
                assert not provisional.is_provisional(run.info.run_id)
            deliver(uri)
    assert [run.info.run_id] == [found.info.run_id for found in the_runs(mlflow_server.url, experiment_name)]


def test_a_server_with_passwords_forbids_in_words_of_its_own(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    """MLflow's basic authentication answers in plain text; a gateway's 403 is still a reason to wait."""
    with FaultProxy(mlflow_server.url) as proxy:
        proxy.on(_THEIRS, status(403, body="Permission denied"), times=None)
        proxy.on("f" * 32, status(403, body="<html>blocked</html>"), times=None)
        uri = f"outbox+{proxy.url}"
        with tracking(uri, tmp_path, worker="none") as mlflow:
            assert "PERMISSION_DENIED" == raised_by(mlflow, lambda mlflow: mlflow.get_run(_THEIRS))[1]
            assert not store(uri).server.is_away()
            assert "TEMPORARILY_UNAVAILABLE" == raised_by(mlflow, lambda mlflow: mlflow.get_run("f" * 32))[1]
            assert store(uri).server.is_away()


def test_what_is_written_to_a_run_that_may_not_be_read_waits_for_a_person(
    mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    """A write is an event: it is parked with the server's reason, not lost in an exception."""
    with FaultProxy(mlflow_server.url) as proxy:
        proxy.on(lambda _method, path: "runs/" in path, answer(403, "PERMISSION_DENIED", "no"), times=None)
        uri = f"outbox+{proxy.url}"
        with tracking(uri, tmp_path) as mlflow:
            mlflow.MlflowClient().log_metric(_THEIRS, "m", 1.0)
            assert 0 < store(uri).outbox.flush(20).parked


def test_what_a_server_is_too_old_for_is_refused_at_the_call_and_is_no_outage(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """A model that began offline would wait there for ever, and its run's end behind it."""
    with FaultProxy(mlflow_server.url) as proxy:
        proxy.on("mlflow/logged-models", _NO_ADDRESS, times=None)
        uri = f"outbox+{proxy.url}"
        with tracking(uri, tmp_path) as mlflow:
            mlflow.set_experiment(experiment_name)
            with mlflow.start_run():
                _, code, words = raised_by(mlflow, lambda mlflow: mlflow.initialize_logged_model(name="m"))
                assert ("ENDPOINT_NOT_FOUND", True) == (code, "mlflow/logged-models: 404" in words)
                assert not store(uri).server.is_away()
                mlflow.log_metric("behind", 1.0)
            deliver(uri)
    (found,) = the_runs(mlflow_server.url, experiment_name)
    assert ("FINISHED", {"behind": 1.0}) == (found.info.status, found.data.metrics)


def test_an_address_at_which_there_is_no_mlflow_is_asked_for_nothing_for_a_while(
    mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    """Another program's server may be made of the same parts; it knows none of MLflow's addresses."""
    with FaultProxy(mlflow_server.url) as proxy:
        proxy.on("/", _NO_ADDRESS, times=None)
        uri = f"outbox+{proxy.url}"
        with tracking(uri, tmp_path, worker="none") as mlflow:
            assert "TEMPORARILY_UNAVAILABLE" == raised_by(mlflow, lambda mlflow: mlflow.get_run(_THEIRS))[1]
            assert store(uri).server.is_away()


@pytest.mark.parametrize("code", [500, 503])
def test_an_error_inside_of_mlflow_is_about_one_question(
    code: int, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """It is raised for that call alone; 503 says that the server is not there, with MLflow's JSON too."""
    error_code = {500: "INTERNAL_ERROR", 503: "TEMPORARILY_UNAVAILABLE"}[code]
    with FaultProxy(mlflow_server.url) as proxy:
        proxy.on("logged-models/search", answer(code, error_code, "Bad filter: foo"), times=None)
        uri = f"outbox+{proxy.url}"
        with tracking(uri, tmp_path) as mlflow:
            number = mlflow.create_experiment(experiment_name)

            def search(mlflow: Any) -> None:
                mlflow.MlflowClient().search_logged_models([number], filter_string="foo = 1")

            kind, found, words = raised_by(mlflow, search)
            assert (error_code, code == 503) == (found, store(uri).server.is_away())
            assert ("RestException" if code == 500 else "MlflowException") == kind
            assert "Bad filter: foo" in words


@pytest.mark.parametrize("kind", ["http", "sqlite"])
def test_an_experiment_that_is_deleted_is_not_renamed(
    kind: str, mlflow_server: MlflowServer, sqlite_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """MLflow says so with a status that its own client takes for a passing failure; the words are the same."""
    outcomes = []
    for uri in (sqlite_uri, f"outbox+{ {'http': mlflow_server.url, 'sqlite': sqlite_uri}[kind] }"):
        with tracking(uri, tmp_path, worker="none") as mlflow:
            api = mlflow.MlflowClient()
            number = api.create_experiment(f"{experiment_name}-{uri.partition(':')[0]}")
            api.delete_experiment(number)
            found = raised_by(mlflow, lambda _, api=api, number=number: api.rename_experiment(number, "another"))
            outcomes.append((found[1], found[2].removeprefix(f"{found[1]}: ").replace(str(number), "<number>")))
    assert outcomes[0] == outcomes[1]


def test_a_run_of_ones_own_is_answered_from_the_disk_while_its_server_fails_inside(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """A failure of the server costs neither the answer nor a pause; it is counted."""
    with FaultProxy(mlflow_server.url) as proxy:
        uri = f"outbox+{proxy.url}"
        with tracking(uri, tmp_path, worker="none") as mlflow:
            mlflow.set_experiment(experiment_name)
            with mlflow.start_run() as run:
                mlflow.log_metric("m", 1.0)
                proxy.on("runs/get", answer(500, "INTERNAL_ERROR", "the database is gone"), times=None)
                assert {"m": 1.0} == mlflow.get_run(run.info.run_id).data.metrics
                assert not store(uri).server.is_away()
                assert 0 < store(uri).outbox.counters["questions_failed"]


@pytest.mark.parametrize("filed", [True, False])
def test_files_are_listed_and_read_from_the_disk_when_the_server_goes_away_between_two_questions(
    filed: bool, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has answered whose they are, and not what they are: that MLflow's own client asks, which raises its own."""
    with FaultProxy(mlflow_server.url) as proxy:
        uri = f"outbox+{proxy.url}"
        with tracking(uri, tmp_path, worker="thread" if filed else "none") as mlflow:
            mlflow.set_experiment(experiment_name)
            with mlflow.start_run() as run:
                mlflow.log_text("hello", "notes/a.txt")
            if filed:
                deliver(uri)
            monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
            proxy.on("mlflow-artifacts/artifacts", drop(), times=None)
            found = mlflow.MlflowClient().list_artifacts(run.info.run_id, "notes")
            assert ["notes/a.txt"] == [info.path for info in found]
            assert "hello" == mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/notes/a.txt")
