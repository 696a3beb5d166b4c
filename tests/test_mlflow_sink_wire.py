"""The sink against servers that misbehave on the wire, TLS, and where credentials go."""

from __future__ import annotations

import base64
import contextlib
import gzip
import http.client
import importlib
import json
import os
import socket
import ssl
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import requests.adapters

from mlflow_outbox_worker.gate import concerns_destination
from mlflow_outbox_worker.mlflow_sink import artifacts, open_sink
from mlflow_outbox_worker.outcome import classify
from mlflow_outbox_worker.sink import MetricPoint, Sink
from servers import unused_port
from sink_contract import NOW_MS, SECRET, closing, fails
from wires import Wire, read_request, says

pytestmark = pytest.mark.compatibility


@pytest.fixture
def wire() -> Iterator[Callable[..., Wire]]:
    """Start wires that end with the test."""
    wires: list[Wire] = []

    def make(*args: Any, **kwargs: Any) -> Wire:
        wires.append(Wire(*args, **kwargs))
        return wires[-1]

    yield make
    for each in wires:
        each.close()


def log_one(sink: Sink) -> None:
    """Send one point to a run that the server need not know."""
    sink.log_batch("a" * 32, [MetricPoint("m", 1.0, NOW_MS, 0)], {}, {})


def test_a_refused_connection_was_certainly_not_carried_out() -> None:
    """Nothing listens, so nothing was sent: no search for a ghost is needed before the next create."""
    with closing(open_sink(f"http://127.0.0.1:{unused_port()}")) as sink:
        error = fails(lambda: log_one(sink))
    assert ("connection", False, "retry") == (error.kind, error.sent, classify(error, "log_batch").kind)


@pytest.mark.parametrize(
    "proxy",
    ["http://me:{}#x@127.0.0.1:9", "http://me:{}[@127.0.0.1:9", "http://"],
)
def test_a_proxy_whose_address_is_none_is_named_as_one_without_its_secret(
    proxy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F93: what libraries say of an address has a part of its password in it; a server's own is said as ever."""
    monkeypatch.setenv("HTTP_PROXY", proxy.format(SECRET))
    monkeypatch.setenv("NO_PROXY", "")
    with closing(open_sink("http://tracking.example:5000")) as sink:
        error = fails(lambda: log_one(sink))
    assert (False, True) == (SECRET in str(error), "the address of a proxy" in str(error)), error
    assert "parked" == classify(error, "log_batch").kind
    monkeypatch.delenv("HTTP_PROXY")
    with closing(open_sink("http://tracking..example:5000")) as sink:
        assert "label empty or too long" in str(fails(lambda: log_one(sink)))


def test_a_proxy_that_speaks_socks_is_gone_through(wire: Callable[..., Wire], monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of ``ssh -D``, where PySocks is installed; here something in its place leads to a server."""
    server = wire(says(200, "{}"))
    asked: list[tuple[Any, ...]] = []

    def create_connection(place: Any, *, proxy_addr: str, proxy_port: int, timeout: float, **_: Any) -> socket.socket:
        asked.append((place, proxy_addr, proxy_port))
        return socket.create_connection(("127.0.0.1", server.port), timeout)

    socks = types.SimpleNamespace(
        create_connection=create_connection, PROXY_TYPE_SOCKS4=1, PROXY_TYPE_SOCKS5=2, ProxyError=ConnectionError
    )
    name = "urllib3.contrib.socks"
    monkeypatch.setitem(sys.modules, "socks", socks)
    monkeypatch.setitem(sys.modules, name, None)  # whatever there is then goes with the test
    del sys.modules[name]
    monkeypatch.setattr(requests.adapters, "SOCKSProxyManager", importlib.import_module(name).SOCKSProxyManager)
    monkeypatch.setenv("HTTP_PROXY", "socks5h://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "")
    with closing(open_sink("http://tracking.example:5000")) as sink:
        log_one(sink)
        log_one(sink)
    assert [(("tracking.example", 5000), "127.0.0.1", 9)] * 2 == asked
    assert server.requests[0].startswith(b"POST /api/2.0/mlflow/runs/log-batch ")


def test_what_a_server_sends_is_acknowledged_at_once(wire: Callable[..., Wire]) -> None:
    """MLflow's sends the body of an answer when its head was acknowledged, which else takes 40 ms a request.

    Beside it a connection that leaves that to the system, so that the server is seen to wait.
    """

    def in_two(wire: Wire, connection: socket.socket, _request: bytes) -> None:
        while not wire.over.is_set():
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n")
            connection.sendall(b"{}")
            if not read_request(connection):
                return

    server = wire(in_two)
    took: dict[str, list[float]] = {"sink": [], "system": []}
    plain = http.client.HTTPConnection("127.0.0.1", server.port)
    with closing(open_sink(server.url)) as sink, contextlib.closing(plain):

        def ask() -> None:
            plain.request("POST", "/", b"{}")
            plain.getresponse().read()

        for _ in range(30):
            for name, call in (("sink", lambda: log_one(sink)), ("system", ask)):
                begun = time.perf_counter()
                call()
                took[name].append(time.perf_counter() - begun)
    # The sink's faster ones, for on a busy machine any request may wait for the processor, and half of them did.
    assert statistics.quantiles(took["sink"], n=4)[0] < statistics.median(took["system"]) / 2, took


def test_a_secret_that_an_answer_repeats_is_in_no_message(
    wire: Callable[..., Wire], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is, quoted as in a URL, and as it was sent in a header; in refusals, pages, and what is no HTTP."""
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "a/secret token")
    sent = base64.b64encode(b"someone:pass/word").decode()
    told = f"pass/word pass%2Fword a/secret token a%2Fsecret%20token Basic {sent}"

    def no_http(_wire: Wire, connection: socket.socket, _request: bytes) -> None:
        connection.sendall(f"HTTP/9 {told}\r\n\r\n".encode())

    for answers in (
        says(403, told),
        says(400, json.dumps({"error_code": "X", "message": told})),
        says(200, told),
        no_http,
    ):
        server = wire(answers)
        address = f"http://someone:pass%2Fword@127.0.0.1:{server.port}"
        with closing(open_sink(address)) as sink:
            said = str(fails(lambda sink=sink: log_one(sink)))
        assert "***" in said
        assert [] == [word for word in ("pass", "secret", sent) if word in said], said


@pytest.mark.parametrize("kind", ["netrc", "basic", "key"])
def test_a_secret_of_another_tool_that_an_answer_repeats_is_in_no_message(
    kind: str, wire: Callable[..., Wire], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes along with a request without being one of MLflow's credentials."""
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1 login ada password {SECRET}\n" if kind == "netrc" else "")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    sent = base64.b64encode(f"ada:{SECRET}".encode()).decode()

    def authenticate(request: Any) -> Any:
        request.headers.update({"Authorization": f"Basic {sent}"} if kind == "basic" else {"X-Api-Key": SECRET})
        return request

    if kind != "netrc":
        monkeypatch.setenv("MLFLOW_TRACKING_AUTH", "theirs")
        monkeypatch.setattr("mlflow.tracking.request_auth.registry.fetch_auth", lambda _name: authenticate)
    server = wire(says(403, f"{SECRET} Basic {sent}" if kind != "key" else SECRET))
    with closing(open_sink(server.url)) as sink:
        said = str(fails(lambda: log_one(sink)))
    assert (sent if kind != "key" else SECRET).encode() in server.requests[-1]
    assert "***" in said
    assert [] == [word for word in (SECRET, sent) if word in said], said


@pytest.mark.parametrize("more", ["\n", "\u2026"])
def test_a_token_that_is_no_header_is_in_no_message_and_no_fault_of_an_event(
    more: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that was read from a file, or copied: requests shows what it refuses as Python would write it."""
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", f"{SECRET}{more}")
    with closing(open_sink(f"http://127.0.0.1:{unused_port()}")) as sink:
        error = fails(lambda: log_one(sink))
    assert ("parked", False) == (classify(error, "log_batch").kind, SECRET in str(error)), error


@pytest.mark.parametrize("name", ["MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"])
def test_a_login_of_another_encoding_is_in_no_message_and_no_fault_of_an_event(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a shell or a file in Latin-1: Python has characters for its bytes that nothing encodes."""
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ada")
    monkeypatch.setenv(name, os.fsdecode(f"{SECRET}\xe9".encode("latin-1")))
    with closing(open_sink(f"http://127.0.0.1:{unused_port()}")) as sink:
        error = fails(lambda: log_one(sink))
    assert ("parked", False) == (classify(error, "log_batch").kind, SECRET in str(error)), error


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"MLFLOW_TRACKING_INSECURE_TLS": "yes"}, "MLFLOW_TRACKING_INSECURE_TLS"),
        ({"MLFLOW_TRACKING_INSECURE_TLS": "1", "MLFLOW_TRACKING_SERVER_CERT_PATH": "/ca"}, "must not be set"),
        ({"MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1.5"}, "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR"),
    ],
    ids=["no boolean", "two that exclude each other", "no number"],
)
def test_a_wrong_variable_of_mlflow_is_no_fault_of_an_event(
    given: dict[str, str], said: str, wire: Callable[..., Wire], monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow says so by the errors of a wrong value, at each request; nothing is sent, and a person is told which."""
    server = wire(says(200, "{}"))
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with closing(open_sink(server.url)) as sink:
        error = fails(lambda: log_one(sink))
    assert ("parked", False, True) == (classify(error, "log_batch").kind, error.sent, said in str(error)), error
    assert [] == server.requests


def test_a_file_of_credentials_that_cannot_be_read_is_told_without_what_is_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A heading that is missing, a percent sign, another encoding: Python's words hold the line, or no file's name."""
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / ".mlflow" / "credentials"
    file.parent.mkdir()
    line = f"mlflow_tracking_password = {SECRET}"
    with closing(open_sink(f"http://127.0.0.1:{unused_port()}")) as sink:
        for content in (line, f"[mlflow]\nmlflow_tracking_username = ada\n{line}%", f"[mlflow]\n{line}é"):
            file.write_bytes(content.encode("latin-1"))
            error = fails(lambda: log_one(sink))
            assert ("parked", False) == (classify(error, "log_batch").kind, SECRET in str(error)), error
            assert "~/.mlflow/credentials" in str(error)


class _Expired(Exception):
    """As botocore's own where a role's token cannot be renewed."""

    response = {"Error": {"Code": "ExpiredTokenException"}, "ResponseMetadata": {"HTTPStatusCode": 400}}  # noqa: RUF012 - as there


@pytest.mark.parametrize(
    ("raised", "outcome"),
    [(ValueError("invalid_client: the secret has expired"), "parked"), (_Expired("the token has expired"), "retry")],
    ids=["databricks", "aws"],
)
def test_a_token_that_cannot_be_renewed_is_no_fault_of_an_event(
    raised: Exception, outcome: str, wire: Callable[..., Wire], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the tool that renews it raises, the ValueErrors of the Databricks SDK and AWS's status 400 too."""
    server = wire(says(200, "{}"))

    def renew(_name: str) -> None:
        raise raised

    monkeypatch.setenv("MLFLOW_TRACKING_AUTH", "renewing")
    monkeypatch.setattr("mlflow.tracking.request_auth.registry.fetch_auth", renew)
    with closing(open_sink(server.url)) as sink:
        error = fails(lambda: log_one(sink))
    assert (outcome, False) == (classify(error, "log_batch").kind, error.sent), error
    assert "has expired" in str(error)
    assert [] == server.requests


def test_a_variable_that_goes_while_the_environment_is_read_is_no_reason_to_wait_for_a_person(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Requests looks for proxies there for each request; a program may change it in another thread at any time."""
    monkeypatch.setenv("VANISHING_PROXY", "soon")
    decoded = os.environ.decodekey  # type: ignore[attr-defined]  # what the mapping asks for the name of each variable

    def vanish(key: bytes) -> str:
        os.environ._data.pop(b"VANISHING_PROXY", None)  # type: ignore[attr-defined]  # not in the stubs
        return str(decoded(key))

    with closing(open_sink(f"http://127.0.0.1:{unused_port()}")) as sink:
        log_one_refused = fails(lambda: log_one(sink))  # all that is imported for the first request is there now
        monkeypatch.setenv("VANISHING_PROXY", "soon")
        monkeypatch.setattr(os.environ, "decodekey", vanish)
        error = fails(lambda: log_one(sink))
    assert "environment" not in str(log_one_refused)
    assert "the environment changed" in str(error)
    assert ("connection", False, "retry") == (error.kind, error.sent, classify(error, "log_batch").kind)


@pytest.mark.parametrize(
    "begin", [b"", b"HTTP/1.1 200 OK\r\nContent-Type: applic", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"]
)
def test_a_request_whose_answer_is_cut_off_may_have_been_carried_out(wire: Callable[..., Wire], begin: bytes) -> None:
    """The connection ends before the answer does; there is no second attempt."""
    server = wire(lambda _, connection, request: connection.sendall(begin))
    with closing(open_sink(server.url)) as sink:
        error = fails(lambda: log_one(sink))
    assert ("connection", True, "retry") == (error.kind, error.sent, classify(error, "log_batch").kind)
    assert 1 == len(server.requests)


def silent(wire: Wire, connection: socket.socket, request: bytes) -> None:
    """Take the request and answer nothing."""
    wire.over.wait(20)


def dripping(before: bytes) -> Callable[[Wire, socket.socket, bytes], None]:
    """Answer with a beginning and then a byte now and then."""

    def behave(wire: Wire, connection: socket.socket, request: bytes) -> None:
        connection.sendall(before)
        while not wire.over.wait(0.05):
            connection.sendall(b"x")

    return behave


@pytest.mark.parametrize(
    "behave",
    [silent, dripping(b"HTTP/1.1 200 OK\r\nX-Slow: "), dripping(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")],
    ids=["silence", "slow headers", "slow body"],
)
def test_the_deadline_is_for_the_whole_request(wire: Callable[..., Wire], behave: Any) -> None:
    """A server that sends a byte now and then is given no more time than one that sends nothing."""
    server = wire(behave)
    begun = time.monotonic()
    with closing(open_sink(server.url, timeout=0.5)) as sink:
        error = fails(lambda: log_one(sink))
        assert 0.4 < time.monotonic() - begun < 10
    assert ("timeout", True, "retry") == (error.kind, error.sent, classify(error, "log_batch").kind)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry_After": "7"}, 7.0),
        ({"Retry_After": "Tue, 14 Nov 2023 22:13:50 GMT", "Date": "Tue, 14 Nov 2023 22:13:20 GMT"}, 30.0),
        ({"Retry_After": "Tue, 14 Nov 2023 22:13:50 GMT"}, 0.0),
        ({"Retry_After": "soon"}, None),
        ({}, None),
    ],
)
def test_a_busy_server_says_how_long_and_is_asked_once(
    wire: Callable[..., Wire], headers: dict[str, str], seconds: float | None
) -> None:
    """The pause is handed on, a date by the clock of the server; MLflow's own retries are off."""
    server = wire(says(503, "<html>busy</html>", **headers))
    with closing(open_sink(server.url)) as sink:
        error = fails(lambda: log_one(sink))
    assert (503, seconds, "retry") == (error.status, error.retry_after, classify(error, "log_batch").kind)
    assert 1 == len(server.requests)


@pytest.mark.parametrize(
    ("behave", "outcome"),
    [
        (says(200, "<html>please log in</html>"), "parked"),
        (says(200, "[1, 2]"), "parked"),
        (says(200, '{"run": '), "parked"),
        (says(404, "<html>not here</html>"), "parked"),
        (says(404, '{"detail": "Not Found"}'), "parked"),
        (says(400, "The plain HTTP request was sent to HTTPS port"), "parked"),
        (says(405, "no"), "parked"),
        (says(401, "who are you?"), "parked"),
        (says(403, '{"error_code": "PERMISSION_DENIED", "message": "no"}'), "parked"),
        (says(413, "<html>too large</html>"), "split"),
        (says(429, "slow down"), "retry"),
        (says(502, "<html>bad gateway</html>"), "retry"),
        (says(500, '{"error_code": "TEMPORARILY_UNAVAILABLE", "message": "later"}'), "retry"),
        (says(400, '{"error_code": "INVALID_PARAMETER_VALUE", "message": "bad"}'), "dead_letter"),
        (says(400, '{"error_code": "A_CODE_OF_THE_FUTURE", "message": "bad"}'), "dead_letter"),
        (says(422, '{"detail": "bad"}'), "dead_letter"),
        (says(200, gzip.compress(b" " * 100_000_000, 1), Content_Encoding="gzip"), "parked"),
        (says(200, b"not gzip", Content_Encoding="gzip"), "parked"),
    ],
)
def test_an_answer_is_judged_by_status_and_by_who_gave_it(wire: Callable[..., Wire], behave: Any, outcome: str) -> None:
    """Only MLflow itself can make an event a dead letter; pages of proxies and portals wait for a person."""
    with closing(open_sink(wire(behave).url)) as sink:
        error = fails(lambda: log_one(sink))
    assert outcome == classify(error, "log_batch").kind
    assert len(str(error)) < 600


@pytest.mark.parametrize(
    ("said", "name", "outcome"),
    [
        ("(psycopg2.errors.ReadOnlySqlTransaction) cannot execute INSERT in a read-only transaction", "2j85", "retry"),
        ("(pyodbc.Error) ('40001', 'chosen as the deadlock victim. Rerun the transaction.')", "dbapi", "retry"),
        ("(pymysql.err.InterfaceError) (0, '')", "rvf5", "retry"),
        ("(psycopg2.DatabaseError) SSL SYSCALL error: EOF detected", "4xp6", "retry"),
        ("QueuePool limit of size 5 overflow 10 reached, connection timed out, timeout 30.00", "3o7r", "retry"),
        ("(mysql.connector.errors.DatabaseError) 1205 (HY000): Lock wait timeout exceeded", "4xp6", "retry"),
        ("(mysql.connector.errors.DatabaseError) 1366 (HY000): Incorrect string value", "4xp6", "dead_letter"),
        ("(psycopg2.errors.StringDataRightTruncation) value too long", "9h9h", "dead_letter"),
        ("(psycopg2.errors.NotNullViolation) null value in https://sqlalche.me/e/20/2j85)", "gkpj", "dead_letter"),
    ],
)
def test_a_database_behind_a_server_that_fails_is_no_fault_of_an_event(
    wire: Callable[..., Wire], said: str, name: str, outcome: str
) -> None:
    """MLflow answers 400 to whatever SQLAlchemy does not call operational; behind the statement stands what it was."""
    statement = f"[SQL: INSERT INTO metrics VALUES {'(%s), ' * 200}]"
    message = f"{said}\n{statement}\n(Background on this error at: https://sqlalche.me/e/20/{name})"
    server = wire(says(400, json.dumps({"error_code": "BAD_REQUEST", "message": message})))
    with closing(open_sink(server.url)) as sink:
        error = fails(lambda: log_one(sink))
    assert outcome == classify(error, "log_batch").kind
    assert said[:60] in str(error)


@pytest.mark.parametrize(
    ("said", "outcome"),
    [
        ("(MySQLdb.OperationalError) (1366, \"Incorrect string value for column 'value' at row 1\")", "dead_letter"),
        ("(pymysql.err.OperationalError) (1267, 'Illegal mix of collations')", "dead_letter"),
        ("(MySQLdb.OperationalError) (1205, 'Lock wait timeout exceeded; try restarting transaction')", "retry"),
        ("(MySQLdb.OperationalError) (2006, 'MySQL server has gone away')", "retry"),
    ],
)
def test_a_text_that_mysql_never_takes_is_told_from_an_outage(
    wire: Callable[..., Wire], said: str, outcome: str
) -> None:
    """Its drivers call both operational, and a server says of both that they pass: the run would wait without end."""
    message = f"{said}\n[SQL: INSERT INTO params]\n(Background on this error at: https://sqlalche.me/e/20/e3q8)"
    server = wire(says(503, json.dumps({"error_code": "TEMPORARILY_UNAVAILABLE", "message": message})))
    with closing(open_sink(server.url)) as sink:
        error = fails(lambda: log_one(sink))
    assert outcome == classify(error, "log_batch").kind


@pytest.mark.parametrize("operation", ["create_run", "experiment_id", "get_run"])
def test_an_empty_success_is_not_taken_for_an_answer(wire: Callable[..., Wire], operation: str) -> None:
    """A proxy that answers everything with an empty object creates no runs."""
    with closing(open_sink(wire(says(200, "{}")).url)) as sink:
        requests: dict[str, Callable[[], Any]] = {
            "create_run": lambda: sink.create_run("1", run_name=None, start_time_ms=1, user="", tags={}),
            "experiment_id": lambda: sink.experiment_id("e"),
            "get_run": lambda: sink.get_run("a" * 32),
        }
        assert "parked" == classify(fails(requests[operation]), operation).kind


def test_a_redirect_is_not_followed_and_gets_no_credentials(wire: Callable[..., Wire]) -> None:
    """Another host learns nothing, and the URL waits for a person."""
    other = wire(says(200, "{}"))
    server = wire(says(302, Location=other.url))
    with closing(open_sink(server.url, username="ada", password=SECRET)) as sink:
        error = fails(lambda: log_one(sink))
    assert ("not_mlflow", 302, "parked") == (error.kind, error.status, classify(error, "log_batch").kind)
    assert [] == other.requests


@pytest.mark.parametrize(
    ("location", "said"),
    [
        (f"https://ada:{SECRET}@login.example:8443/{SECRET}?state={SECRET}", "https://login.example:8443"),
        (f"/oauth2/sign_in?rd={SECRET}", "a page of its own"),
        (f"http://[portal/{SECRET}", "what is no address"),
    ],
)
def test_a_redirect_is_told_with_its_host_and_nothing_else(location: str, said: str, wire: Callable[..., Wire]) -> None:
    """Whoever reads it knows a login page by that, or the address that the tracking URI has to have."""
    with closing(open_sink(wire(says(302, Location=location)).url)) as sink:
        error = fails(lambda: log_one(sink))
    assert (True, False) == (f"redirects (302) to {said}," in str(error), SECRET in str(error)), error
    assert "parked" == classify(error, "log_batch").kind


def run_json(artifact_uri: str) -> str:
    """What a server answers to a question for a run."""
    info = {"run_id": "a" * 32, "experiment_id": "1", "status": "RUNNING", "artifact_uri": artifact_uri}
    return json.dumps({"run": {"info": info, "data": {}}})


def test_a_server_that_serves_no_artifacts_parks_the_upload(wire: Callable[..., Wire], tmp_path: Path) -> None:
    """Its 503 looks like a busy server and never goes away."""
    disabled = (
        "Endpoint: /api/2.0/mlflow-artifacts/artifacts/<path:artifact_path> disabled due to the mlflow server "
        "running with `--no-serve-artifacts`. To enable artifacts server functionality, run `mlflow server` with "
        "`--serve-artifacts`"
    )

    def behave(server: Wire, connection: socket.socket, request: bytes) -> None:
        answer = (
            says(503, disabled)
            if request.startswith(b"PUT")
            else says(200, run_json("mlflow-artifacts:/1/a/artifacts"))
        )
        answer(server, connection, request)

    server = wire(behave)
    (tmp_path / "copy").write_bytes(b"content")
    with closing(open_sink(f"{server.url}/prefix")) as sink:
        error = fails(lambda: sink.upload("a" * 32, tmp_path / "copy", "plots/a b.png"))
    assert (503, "parked") == (error.status, classify(error, "upload").kind)
    assert server.requests[1].startswith(
        b"PUT /prefix/api/2.0/mlflow-artifacts/artifacts/1/a/artifacts/plots/a%20b.png "
    )
    assert server.requests[1].endswith(b"\r\n\r\ncontent")


def test_a_file_goes_to_where_the_files_of_its_run_were_moved(wire: Callable[..., Wire], tmp_path: Path) -> None:
    """Where they are is remembered, and a worker that goes on for weeks would try the old place for good."""
    places = ["old"]

    def behave(server: Wire, connection: socket.socket, request: bytes) -> None:
        answer = says(200, run_json(f"mlflow-artifacts:/{places[0]}"))
        if request.startswith(b"PUT"):
            answer = says(200, "{}") if b"/new/" in request.partition(b"\r\n")[0] else says(500, "gone")
        answer(server, connection, request)

    server = wire(behave)
    (tmp_path / "copy").write_bytes(b"content")
    with closing(open_sink(server.url)) as sink:
        assert "retry" == classify(fails(lambda: sink.upload("a" * 32, tmp_path / "copy", "x")), "upload").kind
        places[0] = "new"
        sink.upload("a" * 32, tmp_path / "copy", "x")
        sink.upload("a" * 32, tmp_path / "copy", "y")
    assert 2 == sum(request.startswith(b"GET") for request in server.requests), "a place that is good is remembered"


def test_what_a_server_says_of_a_file_is_told_however_long_its_path_is(
    wire: Callable[..., Wire], tmp_path: Path
) -> None:
    """A person reads it, and what it means is read from it: the 503 of a server that serves no artifacts never ends."""

    def behave(server: Wire, connection: socket.socket, request: bytes) -> None:
        refused = says(503, "disabled due to the mlflow server running with `--no-serve-artifacts`")
        answer = refused if request.startswith(b"PUT") else says(200, run_json("mlflow-artifacts:/1/a/artifacts"))
        answer(server, connection, request)

    (tmp_path / "copy").write_bytes(b"content")
    with closing(open_sink(wire(behave).url)) as sink:
        error = fails(lambda: sink.upload("a" * 32, tmp_path / "copy", f"{'folder/' * 60}x.png"))
    assert str(error).startswith("PUT folder/")
    assert "503: disabled due to" in str(error)
    assert "parked" == classify(error, "upload").kind


def test_a_file_that_is_read_back_takes_no_more_room_than_it_may_have(
    wire: Callable[..., Wire], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compressed, a server can send gigabytes within the time of a request."""
    monkeypatch.setattr(artifacts, "_GROWN", 1000)
    answer = says(200, run_json("mlflow-artifacts:/1/a/artifacts"))
    bomb = says(200, gzip.compress(bytes(10_000_000)), Content_Encoding="gzip")

    def behave(server: Wire, connection: socket.socket, request: bytes) -> None:
        (bomb if b"/artifacts/x " in request else answer)(server, connection, request)

    with closing(open_sink(wire(behave).url)) as sink:
        error = fails(lambda: sink.download("a" * 32, "x", tmp_path / "copy", 7))
    assert ("parked", True) == (classify(error, "download").kind, "larger than 1007 bytes" in str(error)), error
    assert (tmp_path / "copy").stat().st_size <= 1007


def test_a_link_in_the_place_of_a_copy_is_not_followed(wire: Callable[..., Wire], tmp_path: Path) -> None:
    """Whoever has the outbox may put it there when the copy was looked at: it would show a file of who delivers it."""
    server = wire(says(200, run_json("mlflow-artifacts:/1/a/artifacts")))
    (tmp_path / "private").write_text(SECRET)
    (tmp_path / "copy").symlink_to(tmp_path / "private")
    with closing(open_sink(server.url)) as sink:
        fails(lambda: sink.upload("a" * 32, tmp_path / "copy", "x"))
    assert [] == [request for request in server.requests if request.startswith(b"PUT")]


@pytest.mark.parametrize(
    "location", ["http://evil.example/x", "https://a@evil.example", "mlflow-artifacts://evil.example/x"]
)
def test_no_experiment_of_a_journal_sends_the_login_to_another_host(location: str, wire: Callable[..., Wire]) -> None:
    """It may be a bundle's, which anybody may have written; a person can make the experiment, which is taken then."""
    server = wire(says(404, json.dumps({"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "none"})))
    with closing(open_sink(server.url)) as sink:
        error = fails(lambda: sink.create_experiment("e", location, {}))
    assert ("parked", True) == (classify(error, "create_experiment").kind, "evil.example" in str(error)), error
    assert [] == [request for request in server.requests if request.startswith(b"POST")]


class S3UploadFailedError(Exception):
    """As boto3's, which it raises in the place of an answer, with that as its context."""


class NoCredentialsError(Exception):
    """As botocore's."""


def _s3(status: int, code: str) -> Exception:
    answer, error = Exception(f"An error occurred ({code})"), S3UploadFailedError(f"Failed to upload: {code}")
    answer.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}  # type: ignore[attr-defined]  # as botocore's
    error.__context__ = answer
    return error


def _gs(status: int) -> Exception:
    error = Exception("Anonymous caller does not have storage.objects.create access")
    error.code = status  # type: ignore[attr-defined]  # as Google's
    return error


@pytest.mark.parametrize(
    ("raised", "outcome"),
    [
        (_gs(401), "parked"),
        (_gs(503), "retry"),
        (_s3(403, "AccessDenied"), "parked"),
        (_s3(400, "ExpiredToken"), "parked"),
        (_s3(404, "NoSuchBucket"), "parked"),
        (_s3(400, "RequestTimeout"), "retry"),
        (_s3(503, "SlowDown"), "retry"),
        (NoCredentialsError("Unable to locate credentials"), "parked"),
    ],
    ids=str,
)
def test_what_a_storage_refuses_concerns_the_run_and_not_the_server(
    raised: Exception, outcome: str, wire: Callable[..., Wire], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who may not write to a bucket, or has no login there, is still let in by the tracking server."""

    def log_artifact(*_: Any) -> None:
        raise raised

    repository = types.SimpleNamespace(log_artifact=log_artifact)
    monkeypatch.setattr(artifacts, "get_artifact_repository", lambda *_, **__: repository)
    server = wire(says(200, run_json("s3://bucket/1/a/artifacts")))
    (tmp_path / "copy").write_bytes(b"content")
    with closing(open_sink(server.url)) as sink:
        error = fails(lambda: sink.upload("a" * 32, tmp_path / "copy", "x"))
        assert outcome == classify(error, "upload").kind, error
        assert not concerns_destination(error, sink) or outcome == "retry"


# --- TLS and credentials --------------------------------------------------------------------------------------------


@pytest.fixture
def self_signed(tmp_path: Path) -> Path:
    """A certificate for 127.0.0.1 that nobody vouches for, with its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=2))
        .not_valid_after(now + timedelta(days=2))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    pem = tmp_path / "server.pem"
    pem.write_bytes(
        key.private_bytes(encoding, form, serialization.NoEncryption()) + certificate.public_bytes(encoding)
    )
    return pem


def test_a_certificate_that_is_not_trusted_is_parked(
    wire: Callable[..., Wire], self_signed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Verification is never given up; MLflow's variable for a private authority is respected."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(self_signed)
    server = wire(says(200, "{}"), context)
    with closing(open_sink(f"https://localhost:{server.port}", username="ada", password=SECRET)) as sink:
        error = fails(lambda: log_one(sink))
        assert ("connection", "TLS", False) == (error.kind, error.code, error.sent)
        assert "parked" == classify(error, "log_batch").kind
        assert [] == server.requests
        monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(self_signed))
        log_one(sink)
        assert 1 == len(server.requests)


def test_tls_to_a_port_without_tls_is_parked(wire: Callable[..., Wire]) -> None:
    """A wrong scheme in the URL is a person's mistake."""
    server = wire(says(400, "what?"))
    with closing(open_sink(f"https://127.0.0.1:{server.port}", timeout=2)) as sink:
        outcome = classify(fails(lambda: log_one(sink)), "log_batch").kind
    assert outcome in {"parked", "retry"}  # the server may also close the connection, which is no proof
    assert [] == server.requests


def _authorization(server: Wire) -> bytes:
    lines = server.requests[-1].split(b"\r\n")
    return next((line.split(b": ")[1] for line in lines if line.lower().startswith(b"authorization:")), b"")


def test_credentials_are_found_where_mlflow_finds_them_and_shown_nowhere(
    wire: Callable[..., Wire], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arguments win over the URL, the URL over the environment, which is read anew for each request."""
    server = wire(says(500, "no"))
    basic = b"Basic YWRhOnMzY3JldC13MHJk"  # ada:s3cret-w0rd
    with_userinfo = server.url.replace("//", f"//ada:{SECRET}@")
    for sink in (open_sink(server.url, username="ada", password=SECRET), open_sink(with_userinfo)):
        with closing(sink):
            error = fails(lambda sink=sink: log_one(sink))  # type: ignore[misc]  # mypy infers no default
            assert basic == _authorization(server)
            assert SECRET not in f"{error} {error!r} {sink!r} {sink._opened.host!r}"  # type: ignore[attr-defined]  # not in the stubs
    with closing(open_sink(server.url)) as sink:
        for token in ("old", "new"):
            monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", token)
            fails(lambda: log_one(sink))
            assert f"Bearer {token}".encode() == _authorization(server)
    with closing(open_sink(f"http://ada:{SECRET}@127.0.0.1:{unused_port()}")) as sink:
        assert SECRET not in str(fails(lambda: log_one(sink)))


def test_credentials_of_the_url_go_to_no_other_host(wire: Callable[..., Wire], tmp_path: Path) -> None:
    """Artifacts may be kept by another host, which is not the one that the person trusted."""
    other = wire(says(200, "{}"))
    server = wire(says(200, run_json(f"mlflow-artifacts://127.0.0.1:{other.port}/1/a/artifacts")))
    (tmp_path / "copy").write_bytes(b"content")
    with closing(open_sink(server.url, username="ada", password=SECRET)) as sink:
        sink.upload("a" * 32, tmp_path / "copy", "x")
    assert b"" != _authorization(server)
    assert b"" == _authorization(other)
