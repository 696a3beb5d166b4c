"""``outbox+databricks://profile``, with an open MLflow server in the place of a workspace.

A workspace has tracking calls that are MLflow's own, and these are tested for real, through the Databricks SDK. What it
has of its own, above all the storage of ``dbfs:`` that files go to with credentials from
``/api/2.0/mlflow/artifacts/credentials-for-write``, an MLflow server has not: experiments here keep their files in a
directory.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import plugin_scenarios
from contents import client
from mlflow_outbox.plugin.registry_store import OutboxRegistry
from mlflow_outbox.plugin.tracking_store import OutboxStore
from mlflow_outbox.spool import provisional
from mlflow_outbox.testing.faults import accept_hang
from mlflow_outbox.testing.proxy import FaultProxy
from mlflow_outbox_worker.mlflow_sink import calls, open_sink
from mlflow_outbox_worker.mlflow_sink.rest import DatabricksStore
from mlflow_outbox_worker.outcome import classify
from mlflow_outbox_worker.sink import MetricPoint, SinkError
from plugin_world import deliver, differences, picture, store, tracking
from servers import MlflowServer, eventually
from sink_contract import closing, fails
from wires import Wire

_TOKEN = "dapi-5ecret-t0ken"


def profile(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the profile "work" lead to a server."""
    (tmp_path / "databrickscfg").write_text(f"[work]\nhost = {url}\ntoken = {_TOKEN}\n")
    monkeypatch.setenv("DATABRICKS_CONFIG_FILE", str(tmp_path / "databrickscfg"))


def files_with_the_token(directory: Path) -> list[Path]:
    """Return the files below a directory that hold the token."""
    return [path for path in directory.rglob("*") if path.is_file() and _TOKEN.encode() in path.read_bytes()]


def test_a_profile_says_where_the_workspace_is(
    mlflow_server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it does not answer, no call waits beyond its deadline, and runs begin offline. The token stays there."""
    uri = "outbox+databricks://work"
    with FaultProxy(mlflow_server.url) as proxy:
        profile(proxy.url, tmp_path, monkeypatch)
        proxy.on("", accept_hang(), times=None)
        waits = {"create_timeout": 0.5, "request_timeout": 2, "exit_timeout": 0, "worker": "none"}
        with tracking(uri, tmp_path / "outbox", **waits) as mlflow:
            held = store(uri)
            assert isinstance(held, OutboxStore)
            assert isinstance(mlflow.MlflowClient()._get_registry_client().store, OutboxRegistry)
            begin = time.monotonic()
            mlflow.set_experiment("/Users/ada/experiment")
            with mlflow.start_run(run_name="offline") as run:
                mlflow.log_metric("m", 1.0)
                assert {"m": 1.0} == mlflow.get_run(run.info.run_id).data.metrics
            assert time.monotonic() - begin < 60.0, "the SDK alone waits for five minutes at the first call"
            assert provisional.is_provisional(run.info.run_id)
            proxy.clear()
            # The SDK gives up a minute after the question was put, whenever that was.
            eventually(lambda: not held.server._under_way, 100, "the questions that hung are over")
            opened = held.server.opened()
            assert isinstance(opened.store, DatabricksStore)
            assert (proxy.url, _TOKEN) == (opened.store.get_host_creds().host, opened.store.get_host_creds().token)
    assert [] == files_with_the_token(tmp_path / "outbox")


@pytest.mark.parametrize("name", ["fluent", "datasets", "traces"])
def test_a_workspace_holds_what_it_holds_without_an_outbox(
    name: str, mlflow_server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Field by field; traces are files there, because a workspace takes no spans for an experiment."""
    profile(mlflow_server.url, tmp_path, monkeypatch)
    monkeypatch.setenv("MLFLOW_ENABLE_ASYNC_TRACE_LOGGING", "false")
    pictures: list[dict[str, Any]] = []
    for uri in ("databricks://work", "outbox+databricks://work"):
        experiment = f"workspace-{name}-{uuid.uuid4().hex[:8]}"
        with client(mlflow_server.url) as api:
            api.create_experiment(experiment, artifact_location=(tmp_path / "files").as_uri())
        with tracking(uri, tmp_path / "outbox", create_timeout=30) as mlflow:
            plugin_scenarios.ALL[name](mlflow, experiment, plugin_scenarios.nothing)
            deliver(uri)
        pictures.append(picture(mlflow_server.url, experiment))
    assert [] == differences(*pictures)
    assert [] == files_with_the_token(tmp_path / "outbox")


def test_a_workspace_of_the_environment_needs_no_profile(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ``databricks`` is without an outbox, as on a cluster of Databricks."""
    monkeypatch.setenv("DATABRICKS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("DATABRICKS_HOST", mlflow_server.url)
    monkeypatch.setenv("DATABRICKS_TOKEN", _TOKEN)
    uri = "outbox+databricks:"
    with tracking(uri, tmp_path / "outbox", create_timeout=30) as mlflow:
        mlflow.set_experiment(experiment_name)
        with mlflow.start_run() as run:
            mlflow.log_metric("m", 1.0)
        deliver(uri)
    with client(mlflow_server.url) as api:
        assert {"m": 1.0} == api.get_run(run.info.run_id).data.metrics


def test_what_a_workspace_refuses_is_an_answer(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The SDK raises it, and MLflow makes a response of it that has no stream: nobody may try to read one."""
    from mlflow.exceptions import MlflowException

    profile(mlflow_server.url, tmp_path, monkeypatch)
    uri = "outbox+databricks://work"
    with tracking(uri, tmp_path / "outbox", create_timeout=30) as mlflow:
        assert mlflow.get_experiment_by_name(experiment_name) is None
        with pytest.raises(MlflowException, match="not found"):
            mlflow.get_run(uuid.uuid4().hex)
        number = mlflow.create_experiment(experiment_name)
        with mlflow.start_run(experiment_id=number) as run:
            mlflow.log_param("p", 1)
            deliver(uri)
            with client(mlflow_server.url) as api:
                api.set_tag(run.info.run_id, "seen", "yes")
            assert "yes" == mlflow.get_run(run.info.run_id).data.tags["seen"]
        with pytest.raises(ValueError, match="the store has no log_spans"):
            calls.call(store(uri).server.opened().store, "log_spans", '{"location": "1", "spans": []}')


def refuses(line: str, body: str) -> Callable[[Wire, socket.socket, bytes], None]:
    """Answer to a batch with this; the SDK's question for the workspace finds nothing."""

    def behave(_: Wire, connection: socket.socket, request: bytes) -> None:
        status, said = (line, body) if b"log-batch" in request.partition(b"\r\n")[0] else ("404 Not Found", "")
        head = f"HTTP/1.1 {status}\r\nContent-Length: {len(said)}\r\nConnection: close\r\n\r\n"
        connection.sendall(f"{head}{said}".encode())

    return behave


@pytest.mark.parametrize(
    ("line", "body", "outcome"),
    [
        ("403 Forbidden", '{"error_code": 403, "message": "JWT has expired"}', "parked"),
        ("401 Unauthorized", "", "parked"),
        ("403 Forbidden", "<title>Error 403 Invalid access token.</title>", "parked"),
        ("400 Bad Request", "<pre>    io.jsonwebtoken.ExpiredJwtException: JWT expired</pre>", "parked"),
        ("400 Bad Request", '{"error_code": 400, "message": "io.jsonwebtoken.ExpiredJwtException"}', "parked"),
        ("413 Request Entity Too Large", "<title>413 Request Entity Too Large</title>", "split"),
        ("400 Bad Request", '{"error_code": "MALFORMED_REQUEST", "message": "bad"}', "dead_letter"),
        ("400 Bad Request", '{"error_code": "INVALID_PARAMETER_VALUE", "message": "bad"}', "dead_letter"),
        ("400 Bad Request", "INVALID_PARAMETER_VALUE: bad", "dead_letter"),
        ("502 Bad Gateway", "<title>502 Bad Gateway</title>", "retry"),
        ("429 Too Many Requests", '{"error_code": "REQUEST_LIMIT_EXCEEDED", "message": "slow down"}', "retry"),
        ("429 Too Many Requests", "REQUEST_LIMIT_EXCEEDED: slow down", "retry"),
        ("503 Service Unavailable", "<title>503 Service Unavailable</title>", "retry"),
    ],
)
def test_a_workspace_is_judged_by_its_answer_and_not_by_what_mlflow_makes_of_it(
    line: str, body: str, outcome: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A login that is over does not pass by waiting, and is no fault of an event, however the gateway says so."""
    with contextlib.closing(Wire(refuses(line, body))) as wire:
        profile(wire.url, tmp_path, monkeypatch)
        with closing(open_sink("databricks://work")) as sink:
            error = fails(lambda: sink.log_batch("a" * 32, [MetricPoint("m", 1.0, 1, 0)], {}, {}))
    assert (int(line[:3]), outcome) == (error.status, classify(error, "log_batch").kind), error
    assert 1 == sum(b"log-batch" in request for request in wire.requests)


def test_a_pause_that_a_workspace_asks_for_is_made_where_it_can_be_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The SDK sleeps for it, however long it is, and no flush and no end of a program wakes it up."""
    errors: list[SinkError] = []
    with contextlib.closing(Wire(refuses("503 Service Unavailable\r\nRetry-After: 600", ""))) as wire:
        profile(wire.url, tmp_path, monkeypatch)
        with closing(open_sink("databricks://work")) as sink:

            def send() -> None:
                errors.append(fails(lambda: sink.log_batch("a" * 32, [MetricPoint("m", 1.0, 1, 0)], {}, {})))

            thread = threading.Thread(target=send, daemon=True)
            thread.start()
            thread.join(120)
            assert not thread.is_alive(), "it sleeps"
    assert [(503, 600.0)] == [(error.status, error.retry_after) for error in errors]
    assert "retry" == classify(errors[0], "log_batch").kind
    assert 1 == sum(b"log-batch" in request for request in wire.requests)
