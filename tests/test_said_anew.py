"""What was said of trouble is said again when it comes again, in a program that runs for weeks."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from contents import client
from mlflow_outbox import counters
from mlflow_outbox.testing.proxy import FaultProxy
from plugin_world import deliver, store, tracking
from servers import MlflowServer, eventually


@pytest.fixture(autouse=True)
def _minutes_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let trouble that was over be news at once, and not only after some minutes."""
    monkeypatch.setattr(counters, "_AGAIN", 0.0)


def said(caplog: pytest.LogCaptureFixture, text: str) -> int:
    """Return how often something was said."""
    return sum(text in record.getMessage() for record in caplog.records)


def test_a_run_that_waits_for_a_person_once_more_is_named_once_more(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And once each time, however often it is tried meanwhile."""
    uri = f"outbox+{mlflow_server.url}"
    with (
        caplog.at_level(logging.WARNING, "mlflow_outbox"),
        client(mlflow_server.url) as plain,
        tracking(uri, tmp_path, parked_retry=0.1, create_timeout=20) as mlflow,
    ):
        mlflow.set_experiment(experiment_name)
        run_id = mlflow.start_run().info.run_id
        deliver(uri)
        found = store(uri).outbox
        for number in (1, 2):
            plain.delete_run(run_id)
            mlflow.log_metric("m", float(number))
            eventually(lambda: found.flush(1).parked == 1, message="it is parked")
            tries = found.counters["parked"]
            eventually(lambda tries=tries: found.counters["parked"] > tries + 1, 60)  # type: ignore[misc]  # mypy infers no default
            assert number == said(caplog, f"run {run_id} waits for a person")
            plain.restore_run(run_id)
            deliver(uri)


def test_a_search_says_in_each_outage_that_it_found_only_what_is_here(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever reads the second answer must not take it for the server's."""
    with FaultProxy(mlflow_server.url) as proxy, caplog.at_level(logging.WARNING, "mlflow_outbox"):
        uri = f"outbox+{proxy.url}"
        with tracking(uri, tmp_path, create_timeout=20) as mlflow:
            number = mlflow.set_experiment(experiment_name).experiment_id
            with mlflow.start_run():
                pass
            deliver(uri)
            for outage in (1, 2):
                proxy.down()
                for _ in range(2):
                    assert 1 == len(mlflow.MlflowClient().search_runs([number]))
                assert outage == said(caplog, "a search for runs found only those of this outbox")
                proxy.up()
                eventually(store(uri).server.answers, message="the server is asked again")
