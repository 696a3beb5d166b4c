"""The sink against real stores and servers, and against servers that misbehave on the wire."""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import os
import socket
import sqlite3
import ssl
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from mlflow_outbox.errors import DestinationError, TrackingUnavailable
from mlflow_outbox_worker.mlflow_sink import open_client, open_sink
from mlflow_outbox_worker.outcome import classify
from mlflow_outbox_worker.sink import MetricPoint, Sink
from servers import MlflowServer
from sink_contract import NOW_MS, SinkContract, fails, new_run

pytestmark = pytest.mark.compatibility

SECRET = "s3cret-w0rd"


@contextlib.contextmanager
def closing(sink: Sink) -> Iterator[Sink]:
    """Close a sink after use."""
    yield sink
    sink.close()


class TestTrackingServer(SinkContract):
    """The contract, through HTTP."""

    @pytest.fixture
    def sink(self, mlflow_server: MlflowServer) -> Iterator[Sink]:
        """The sink under test."""
        with closing(open_sink(mlflow_server.url)) as sink:
            yield sink

    def test_requests_for_several_runs_may_be_under_way_at_once(self, sink: Sink) -> None:
        """A server is there for many."""
        assert sink.parallel

    def test_a_race_for_an_experiment_has_one_result(self, mlflow_server: MlflowServer, experiment_name: str) -> None:
        """Whoever comes second uses the experiment of who came first."""
        with closing(open_sink(mlflow_server.url)) as sink, ThreadPoolExecutor(4) as pool:
            assert 1 == len(set(pool.map(sink.experiment_id, [experiment_name] * 4)))

    def test_a_deleted_experiment_is_parked_with_advice(self, sink: Sink, experiment_name: str) -> None:
        """Its name is taken and it takes no runs, so a person has to decide."""
        experiment_id = sink.experiment_id(experiment_name)
        sink._store.delete_experiment(experiment_id)  # type: ignore[attr-defined]
        assert sink.find_experiment(experiment_name) is None
        error = fails(lambda: sink.experiment_id(experiment_name))
        assert "parked" == classify(error, "create_experiment").kind
        assert "restore it there, or rename it" in str(error)

    def test_an_mlflow_without_the_known_transport_is_served_all_the_same(
        self, mlflow_server: MlflowServer, experiment_name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where a future MLflow calls its transport otherwise, its own makes the one attempt."""
        from mlflow_outbox_worker.mlflow_sink import transport

        monkeypatch.setattr(transport, "_TRANSPORT_NAME", "a name of the future")
        with closing(open_sink(mlflow_server.url)) as sink:
            new_run(sink, sink.experiment_id(experiment_name))
        with closing(open_sink(f"http://127.0.0.1:{unused_port()}")) as sink:
            error = fails(lambda: sink.get_run("a" * 32))
        assert ("connection", False) == (error.kind, error.sent)


class TestSqlite(SinkContract):
    """The contract, on a database file."""

    @pytest.fixture
    def sink(self, sqlite_uri: str) -> Iterator[Sink]:
        """The sink under test."""
        with closing(open_sink(sqlite_uri)) as sink:
            yield sink

    def test_one_request_at_a_time(self, sink: Sink) -> None:
        """SQLite has one writer."""
        assert not sink.parallel

    def test_searches_and_histories_are_read_to_their_last_page(
        self, sink: Sink, experiment_name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Pages are the store's business."""
        from mlflow_outbox_worker.mlflow_sink import recorder

        monkeypatch.setattr(recorder, "RUNS_PER_PAGE", 2)
        monkeypatch.setattr(recorder, "POINTS_PER_PAGE", 2)
        experiment_id = sink.experiment_id(experiment_name)
        runs = [new_run(sink, experiment_id, "b" * 32, NOW_MS + later) for later in range(5)]
        assert runs == sink.find_runs(experiment_id, "b" * 32)
        assert runs[::-1] == [run.run_id for run in sink.search_runs(experiment_id)]
        points = [MetricPoint("m", 1.0, NOW_MS + step, step) for step in range(5)]
        sink.log_batch(runs[0], points, {}, {})
        assert points == sink.metric_history(runs[0], "m")

    def test_a_locked_database_is_retried(self, sqlite_uri: str, experiment_name: str) -> None:
        """Another writer goes away; nothing about the events is wrong."""
        with closing(open_sink(f"{sqlite_uri}?timeout=0.01")) as sink:
            run_id = new_run(sink, sink.experiment_id(experiment_name))
            with contextlib.closing(sqlite3.connect(sqlite_uri.removeprefix("sqlite:///"))) as other:
                other.execute("BEGIN EXCLUSIVE")
                wait_for_no_lock(sink._store)  # type: ignore[attr-defined]
                error = fails(lambda: sink.log_batch(run_id, [], {"p": "1"}, {}))
        assert "retry" == classify(error, "log_batch").kind
        assert "locked" in str(error)

    def test_a_schema_of_another_version_is_parked(self, sqlite_uri: str) -> None:
        """Somebody has to upgrade the database or MLflow."""
        with contextlib.closing(sqlite3.connect(sqlite_uri.removeprefix("sqlite:///"))) as database:
            database.execute("UPDATE alembic_version SET version_num = 'cc1f77228345'")
            database.commit()
        assert "parked" == classify(fails(lambda: open_sink(sqlite_uri)), "open").kind

    def test_a_file_that_is_no_database_does_not_block_or_lose_anything(self, tmp_path: Path) -> None:
        """The error comes at once and is not about an event."""
        (tmp_path / "broken.db").write_bytes(b"this is not SQLite" * 100)
        error = fails(lambda: open_sink(f"sqlite:///{tmp_path}/broken.db"))
        assert classify(error, "open").kind in {"retry", "parked"}


class TestFileStore(SinkContract):
    """The contract, on a directory."""

    deduplicates = False

    @pytest.fixture
    def sink(self, file_uri: str) -> Iterator[Sink]:
        """The sink under test."""
        with closing(open_sink(file_uri)) as sink:
            yield sink

    def test_a_path_is_a_file_store(self, tmp_path: Path, experiment_name: str) -> None:
        """Plain paths, also relative ones, keep their meaning when the program changes its directory."""
        with closing(open_sink("some/where")) as sink:
            os.chdir("/")
            sink.experiment_id(experiment_name)
        assert [] != list((tmp_path / "some" / "where").glob("*/meta.yaml"))

    def test_a_full_disk_is_retried(self, sink: Sink, file_uri: str, experiment_name: str) -> None:
        """The file store hides every error as INTERNAL_ERROR; the cause decides."""
        experiment_id = sink.experiment_id(experiment_name)
        run_id = new_run(sink, experiment_id)
        metrics = Path(file_uri.removeprefix("file://"), experiment_id, run_id, "metrics")
        metrics.mkdir(exist_ok=True)
        (metrics / "m").symlink_to("/dev/full")
        error = fails(lambda: sink.log_batch(run_id, [MetricPoint("m", 1.0, NOW_MS, 0)], {}, {}))
        assert ("retry", 503) == (classify(error, "log_batch").kind, error.status)

    def test_an_artifact_can_be_read_by_who_may_read_other_new_files(
        self, sink: Sink, experiment_name: str, tmp_path: Path
    ) -> None:
        """The private mode of the outbox's copy does not travel with it."""
        run_id = new_run(sink, sink.experiment_id(experiment_name))
        (tmp_path / "copy").write_bytes(b"x")
        (tmp_path / "copy").chmod(0o600)
        (tmp_path / "any new file").touch()
        sink.upload(run_id, tmp_path / "copy", "folder/name.txt")
        stored = Path(sink.get_run(run_id).artifact_uri.removeprefix("file://"), "folder", "name.txt")
        modes = [stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "any new file", stored, tmp_path / "copy")]
        assert [modes[0], modes[0], 0o600] == modes

    def test_mlflow_itself_still_asks_before_it_opens_a_file_store(self, sink: Sink, file_uri: str) -> None:
        """What is allowed to the sink is not allowed to the rest of the program."""
        from mlflow.exceptions import MlflowException
        from mlflow.store.tracking import file_store

        if hasattr(file_store, "MLFLOW_ALLOW_FILE_STORE"):
            with pytest.raises(MlflowException, match="maintenance mode"):
                file_store.FileStore(file_uri, file_uri)
        assert "MLFLOW_ALLOW_FILE_STORE" not in os.environ


def test_the_directory_of_a_database_is_created(tmp_path: Path, empty_database: Callable[[Path], Path]) -> None:
    """A relative database is where the program was when it was opened, and so are its artifacts."""
    template = empty_database(tmp_path / "template.db")
    (tmp_path / "new").mkdir()
    template.rename(tmp_path / "new" / "runs.db")
    with closing(open_sink("sqlite:///new/runs.db")) as sink:
        os.chdir("/")
        run = sink.get_run(new_run(sink, sink.experiment_id("e")))
    assert run.artifact_uri.startswith(str(tmp_path / "mlruns"))
    with closing(open_sink(f"sqlite:///{tmp_path}/new/runs.db", artifact_root=str(tmp_path / "art"))) as sink:
        run = sink.get_run(new_run(sink, sink.experiment_id("other")))
    assert run.artifact_uri.startswith(str(tmp_path / "art"))


@pytest.mark.parametrize("uri", ["uc://x", "ftp://x/y", "nonsense://", "http://"])
def test_a_uri_of_no_known_form_is_refused_at_once(uri: str) -> None:
    """It is a mistake in the settings, not a failure to wait out."""
    with pytest.raises(DestinationError):
        open_sink(uri)


@pytest.mark.parametrize("uri", ["databricks", "databricks://profile"])
def test_databricks_is_opened_without_being_called(uri: str) -> None:
    """Nothing is asked before there is something to deliver."""
    with closing(open_sink(uri)) as sink:
        assert sink.parallel
        assert sink.deduplicates_metrics


def test_a_database_that_cannot_be_reached_fails_at_once_without_its_password() -> None:
    """One attempt; a missing driver waits for a person, a missing server is retried."""
    begun = time.monotonic()
    error = fails(lambda: open_sink(f"postgresql://ada:{SECRET}@127.0.0.1:{unused_port()}/mlflow"))
    assert classify(error, "open").kind in {"retry", "parked"}
    assert SECRET not in str(error)
    assert time.monotonic() - begun < 15


# --- misbehaviour on the wire ---------------------------------------------------------------------------------------


class Wire:
    """A server that does with each connection what the test says, and remembers what was asked."""

    def __init__(
        self, behave: Callable[[Wire, socket.socket, bytes], None], context: ssl.SSLContext | None = None
    ) -> None:
        self.requests: list[bytes] = []
        self.over = threading.Event()
        self._behave = behave
        self._context = context
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while not self.over.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(connection,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            connection.settimeout(20)
            if self._context is not None:
                connection = self._context.wrap_socket(connection, server_side=True)
            with connection:
                request = _read_request(connection)
                if request:
                    self.requests.append(request)
                    self._behave(self, connection, request)

    def close(self) -> None:
        """End all connections and wait for their threads."""
        self.over.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(20)


def _read_request(connection: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        part = connection.recv(65536)
        if not part:
            return b""
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    lengths = [line.split(b":")[1] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    while lengths and len(body) < int(lengths[0]):
        body += connection.recv(65536)
    return head + b"\r\n\r\n" + body


def says(status: int, body: bytes | str = b"", **headers: str) -> Callable[[Wire, socket.socket, bytes], None]:
    """Answer every request with this."""
    body = body.encode() if isinstance(body, str) else body
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]

    def behave(wire: Wire, connection: socket.socket, request: bytes) -> None:
        connection.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + body)

    return behave


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


def unused_port() -> int:
    """Return a port on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def wait_for_no_lock(store: Any) -> None:
    """Let SQLite give up at once, where MLflow lets it wait for 20 s in each session."""
    from sqlalchemy import event

    def shorten(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> Any:
        return statement.replace("busy_timeout = 20000", "busy_timeout = 10"), parameters

    event.listen(store.engine, "before_cursor_execute", shorten, retval=True)


def log_one(sink: Sink) -> None:
    """Send one point to a run that the server need not know."""
    sink.log_batch("a" * 32, [MetricPoint("m", 1.0, NOW_MS, 0)], {}, {})


def test_a_refused_connection_was_certainly_not_carried_out() -> None:
    """Nothing listens, so nothing was sent: no search for a ghost is needed before the next create."""
    with closing(open_sink(f"http://127.0.0.1:{unused_port()}")) as sink:
        error = fails(lambda: log_one(sink))
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
        (says(200, gzip.compress(b" " * 100_000_000), Content_Encoding="gzip"), "parked"),
        (says(200, b"not gzip", Content_Encoding="gzip"), "parked"),
    ],
)
def test_an_answer_is_judged_by_status_and_by_who_gave_it(wire: Callable[..., Wire], behave: Any, outcome: str) -> None:
    """Only MLflow itself can make an event a dead letter; pages of proxies and portals wait for a person."""
    with closing(open_sink(wire(behave).url)) as sink:
        error = fails(lambda: log_one(sink))
    assert outcome == classify(error, "log_batch").kind
    assert len(str(error)) < 600


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
            error = fails(lambda sink=sink: log_one(sink))  # type: ignore[misc]
            assert basic == _authorization(server)
            assert SECRET not in f"{error} {error!r} {sink!r} {sink._opened.host!r}"  # type: ignore[attr-defined]
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


# --- manners of a guest ---------------------------------------------------------------------------------------------


def test_the_package_is_imported_without_mlflow() -> None:
    """The import of MLflow waits for the first sink."""
    code = (
        "import sys, mlflow_outbox_worker.mlflow_sink, mlflow_outbox_worker.outcome, mlflow_outbox_worker.retry;"
        "assert not {'mlflow', 'requests', 'sqlalchemy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_host_is_left_as_it_was(tmp_path: Path) -> None:
    """No new variable, tracking URI, log line or handler, also while a database is created or cannot be opened."""
    code = f"""
import logging, os, sys
import mlflow
before = dict(os.environ)
from mlflow_outbox_worker.mlflow_sink import open_client, open_sink
from mlflow_outbox_worker.sink import SinkError
def loggers():
    names = [None, "mlflow"]
    return [(l.level, list(l.handlers), list(l.filters), l.propagate) for l in map(logging.getLogger, names)]
held, uri = loggers(), mlflow.get_tracking_uri()
sink = open_sink("sqlite:///{tmp_path}/deep/er/new.db")
sink.create_run(sink.experiment_id("e"), run_name=None, start_time_ms=1, user="", tags={{}})
open_sink("file:{tmp_path}/files").close()
open_client("sqlite:///{tmp_path}/deep/er/new.db").search_experiments()
try:
    open_sink("sqlite:////proc/no/such.db")
except SinkError:
    pass
sink.close()
assert dict(os.environ) == before
assert loggers() == held
assert mlflow.get_tracking_uri() == uri
"""
    command = [sys.executable, "-W", "ignore:Versions of mlflow", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "" == done.stderr
    assert (0, "") == (done.returncode, done.stdout)


def test_the_clients_of_all_stores_work(mlflow_server: MlflowServer, sqlite_uri: str, file_uri: str) -> None:
    """What the tracker hands out is MLflow's own client, ready for use."""
    from mlflow import MlflowClient

    for uri in (mlflow_server.url, sqlite_uri, file_uri):
        client = open_client(uri)
        assert isinstance(client, MlflowClient)
        with closing(open_sink(uri)) as sink:
            run_id = new_run(sink, sink.experiment_id("read by a client"))
        assert run_id == client.get_run(run_id).info.run_id
    assert logging.getLogger("mlflow").level <= logging.INFO


def test_a_client_for_a_server_that_is_away_fails_soon() -> None:
    """MLflow's own first call would take minutes to say so."""
    begun = time.monotonic()
    with pytest.raises(TrackingUnavailable):
        open_client(f"http://ada:{SECRET}@127.0.0.1:{unused_port()}", timeout=1.0)
    assert time.monotonic() - begun < 10


def test_a_name_that_a_server_refuses_is_a_dead_letter(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """A server takes no '#' in a name; the answer is final, and no file is stored under half of the name."""
    (tmp_path / "copy").write_bytes(b"x")
    with closing(open_sink(mlflow_server.url)) as sink:
        run_id = new_run(sink, sink.experiment_id(experiment_name))
        error = fails(lambda: sink.upload(run_id, tmp_path / "copy", "a#b.txt"))
        assert "dead_letter" == classify(error, "upload").kind
        assert {} == sink.list_artifacts(run_id, "")
