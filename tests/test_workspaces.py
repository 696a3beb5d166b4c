"""What is logged for a workspace of a tracking server arrives there, whichever process delivers it."""

from __future__ import annotations

import contextlib
import json
import pickle
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlflow_outbox import MLflowTracker
from mlflow_outbox.destination import Destination, named_for, place_of, resolve, with_credentials, workspace_of
from mlflow_outbox.spool.directory import OutboxDirectory, find_outboxes
from mlflow_outbox_worker.mlflow_sink import open_sink
from mlflow_outbox_worker.outcome import classify
from mlflow_outbox_worker.sink import MetricPoint
from sink_contract import closing, fails
from wires import Wire, says

SECRET = "canary"


@contextlib.contextmanager
def server(*, workspaces: bool) -> Iterator[Wire]:
    """A server that has workspaces, or none, and takes everything."""

    def behave(_: Wire, connection: socket.socket, request: bytes) -> None:
        asked = request.partition(b"\r\n")[0]
        body = json.dumps({"workspaces_enabled": workspaces} if b"server-info" in asked else {}).encode()
        connection.sendall(b"HTTP/1.1 200 X\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))

    wire = Wire(behave)
    try:
        yield wire
    finally:
        wire.close()


def batches(wire: Wire) -> list[bytes]:
    """The requests of points that came, in small letters."""
    return [request.lower() for request in wire.requests if b"log-batch" in request]


@pytest.mark.parametrize("here", [None, "another"])
def test_requests_go_to_the_workspace_of_the_destination(here: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the environment of the process says that makes them: it may be a shell, days later."""
    if here is None:
        monkeypatch.delenv("MLFLOW_WORKSPACE", raising=False)
    else:
        monkeypatch.setenv("MLFLOW_WORKSPACE", here)
    with server(workspaces=True) as wire:
        destination = resolve(wire.url, workspace="team-a")
        with closing(open_sink(destination.secret_uri)) as sink:
            sink.log_batch("a" * 32, [MetricPoint("m", 1.0, 1, 0)], {}, {})
    (request,) = batches(wire)
    assert b"\r\nx-mlflow-workspace: team-a\r\n" in request
    assert b"another" not in request


def test_a_server_without_workspaces_is_told_a_person(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would put everything into the same place; nothing is sent to it."""
    monkeypatch.delenv("MLFLOW_WORKSPACE", raising=False)
    with server(workspaces=False) as wire, closing(open_sink(f"{wire.url}#workspace=team-a")) as sink:
        error = fails(lambda: sink.log_batch("a" * 32, [MetricPoint("m", 1.0, 1, 0)], {}, {}))
    assert ("parked", True) == (classify(error, "log_batch").kind, "no workspaces" in str(error)), error
    assert [] == batches(wire)


@pytest.mark.parametrize("named_by", ["destination", "environment"])
@pytest.mark.parametrize(
    ("behave", "outcome"),
    [
        (says(404, "404 page not found"), "parked"),
        (says(401, "You are not authenticated"), "parked"),
        (says(302, Location="http://127.0.0.1:9/login"), "parked"),
        (says(200, "<html>please log in</html>"), "parked"),
        (says(502, "<html>bad gateway</html>"), "retry"),
    ],
    ids=["a proxy without the server", "login", "redirect", "portal", "away"],
)
def test_a_server_that_does_not_say_whether_it_has_workspaces_is_judged_by_its_answer(
    behave: Any, outcome: str, named_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No event is to blame for that; a proxy answers 404 while the server behind it is deployed anew."""
    monkeypatch.delenv("MLFLOW_WORKSPACE", raising=False)
    if named_by == "environment":
        monkeypatch.setenv("MLFLOW_WORKSPACE", "team-a")
    with contextlib.closing(Wire(behave)) as wire:
        uri = f"{wire.url}#workspace=team-a" if named_by == "destination" else wire.url
        with closing(open_sink(uri)) as sink:
            error = fails(lambda: sink.log_batch("a" * 32, [MetricPoint("m", 1.0, 1, 0)], {}, {}))
        assert outcome == classify(error, "log_batch").kind, error
        assert [] == batches(wire)


def test_a_server_that_is_given_workspaces_is_sent_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is started anew with them, as its user was told to; the process that delivers goes on meanwhile."""
    monkeypatch.delenv("MLFLOW_WORKSPACE", raising=False)
    held = {"workspaces_enabled": False}

    def behave(wire: Wire, connection: socket.socket, request: bytes) -> None:
        asked = request.partition(b"\r\n")[0]
        says(200, json.dumps(held if b"server-info" in asked else {}))(wire, connection, request)

    with contextlib.closing(Wire(behave)) as wire, closing(open_sink(f"{wire.url}#workspace=team-a")) as sink:
        assert "no workspaces" in str(fails(lambda: sink.log_batch("a" * 32, [MetricPoint("m", 1.0, 1, 0)], {}, {})))
        held["workspaces_enabled"] = True
        for _ in range(2):
            sink.log_batch("a" * 32, [MetricPoint("m", 1.0, 1, 0)], {}, {})
    assert 2 == len(batches(wire))
    assert 2 == sum(b"server-info" in request for request in wire.requests)


def test_a_tracker_remembers_the_workspace_in_its_outbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One outbox for each; MLflow is shown the URI that it knows, and a pickle leads to the same outbox."""
    uri = "http://127.0.0.1:9"
    monkeypatch.setenv("MLFLOW_WORKSPACE", "team-a")
    first = MLflowTracker("e", uri, outbox_dir=tmp_path, worker="none")
    monkeypatch.setenv("MLFLOW_WORKSPACE", "team-b")
    second = MLflowTracker("e", uri, outbox_dir=tmp_path, worker="none")
    monkeypatch.delenv("MLFLOW_WORKSPACE")
    again = pickle.loads(pickle.dumps(first))
    trackers = (first, second, again)
    assert [uri] * 3 == [tracker.tracking_uri for tracker in trackers]
    assert first.outbox_path == again.outbox_path
    found = {OutboxDirectory.open(path).destination.uri for path in find_outboxes(tmp_path)}
    assert {f"{uri}#workspace=team-a", f"{uri}#workspace=team-b"} == found
    for tracker in trackers:
        tracker.close(0)


@pytest.mark.parametrize(
    ("given", "workspace", "uri"),
    [
        ("http://host", "team-a", "http://host#workspace=team-a"),
        ("http://host#workspace=team-b", "team-a", "http://host#workspace=team-b"),
        (f"http://u:{SECRET}@host/p?x={SECRET}#{SECRET}", "a b", "http://host/p#workspace=a%20b"),
        ("http://host", " ", "http://host"),
        ("sqlite:////abs/m.db", "team-a", "sqlite:////abs/m.db"),
        ("databricks", "team-a", "databricks"),
    ],
)
def test_a_workspace_is_a_part_of_the_place(given: str, workspace: str, uri: str) -> None:
    """Of a tracking server alone, and the one in the URI before that of the environment."""
    found = resolve(given, workspace=workspace)
    assert (uri, uri) == (found.uri, resolve(found.uri).uri)
    assert workspace_of(found.uri) == workspace_of(found.secret_uri)
    assert found.slug != resolve(place_of(uri)).slug or uri == place_of(uri)


def test_credentials_of_a_server_are_those_of_all_its_workspaces() -> None:
    """A shell that delivers has the server's URI, and no workspace; and who names the server means the outbox's own."""
    stored = Destination("http://host#workspace=team-a")
    opened = f"http://user:{SECRET}@host"
    assert f"{opened}#workspace=team-a" == with_credentials(stored, opened).secret_uri
    assert stored == named_for(stored, resolve(opened))
    assert f"{opened}#workspace=team-a" == named_for(stored, resolve(opened)).secret_uri
    for other in ("http://host#workspace=team-b", "http://other"):
        assert other == named_for(stored, resolve(other)).uri
    assert "http://host" == named_for(None, resolve("http://host")).uri
