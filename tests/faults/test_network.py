"""Networks and servers that fail, scripted by a proxy in front of a real server: retried, bounded, and exactly once."""

from __future__ import annotations

import dataclasses
import random
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from faults import workload
from faults.children import Nest
from faults.mounts import mount, own_namespace
from faults.oracle import at_rest, held
from faults.table import Row
from faults.test_space import check_manners
from mlflow_outbox import MLflowTracker
from mlflow_outbox.testing import faults
from mlflow_outbox.testing.proxy import Action, FaultProxy
from servers import MlflowServer, eventually

HURRIED = workload.settings(request_timeout=1.0, retry_max=0.1, parked_retry=0.1)
#: Where no slow answer is injected, one of a busy machine's shall not be another fault.
PATIENT = dataclasses.replace(HURRIED, request_timeout=30.0)


@pytest.fixture
def proxy(mlflow_server: MlflowServer) -> Iterator[FaultProxy]:
    """A proxy in front of the shared server."""
    with FaultProxy(mlflow_server.url) as made:
        yield made


class Session:
    """One tracker that logs numbered events and is judged by the server's own database."""

    def __init__(self, server: MlflowServer, uri: str, experiment: str, outbox: Path, given: Any = HURRIED) -> None:
        self.server, self.experiment = server, experiment
        self.tracker = MLflowTracker(experiment, uri, outbox_dir=outbox, settings=given)
        self.took: list[float] = []
        self.acked: set[int] = set()
        self._next = 0

    def log(self, count: int) -> None:
        """Log a run of some events and end it."""
        run = workload.timed(self.took, lambda: self.tracker.start_run(f"run {self._next}"))
        for number in range(self._next, self._next + count):
            if workload.timed(self.took, lambda number=number: workload.log_event(run, number)):
                self.acked.add(number)
        self._next += count
        workload.timed(self.took, run.end)

    def settle(self, row: Row, *, dead: int = 0, timeout: float = 30.0) -> None:
        """Check liveness with a fresh run, conservation, integrity, and how long logging took."""
        self.log(10)
        eventually(lambda: self.tracker.flush(5), timeout + 10, "everything is delivered")
        left = self.tracker.flush(timeout)
        assert (0, 0, dead) == (left.pending, left.parked, left.dead), (left, self.tracker.counters)
        self.judge(row)

    def judge(self, row: Row) -> None:
        """Check what the server's database holds, and how long logging took."""
        report = {
            "raised": [],
            "p999_ms": workload.quantile(self.took, 0.999),
            "max_ms": workload.quantile(self.took, 1),
        }
        check_manners(row, report)
        assert self.acked == set(range(self._next)), "a server's trouble is no reason to refuse an event"
        at_rest(self.server.database_uri, self.experiment, within=10.0).check(self.acked)


@pytest.fixture
def session(mlflow_server: MlflowServer, proxy: FaultProxy, experiment_name: str, tmp_path: Path) -> Iterator[Session]:
    """A session through the proxy; its worker is stopped at the end, whatever happens."""
    made = Session(mlflow_server, proxy.url, experiment_name, tmp_path / "outbox")
    yield made
    proxy.clear()
    proxy.up()
    made.tracker.close(5)


@pytest.mark.fault("F50", "connection refused, then accepted")
def test_a_refused_connection_is_retried_until_it_is_accepted(session: Session, proxy: FaultProxy, row: Row) -> None:
    """Nothing is dead-lettered or refused while nobody listens."""
    for _ in range(row.pick(1, 20, 200)):
        proxy.down()
        session.log(20)
        assert not session.tracker.flush(0.3)
        proxy.up()
        session.settle(row)
        row.done()


@pytest.mark.fault("F51", "408, 425, 429, 500, 502, 503, 504 for some requests in a row")
def test_statuses_that_pass_are_retried_and_never_dead_lettered(session: Session, proxy: FaultProxy, row: Row) -> None:
    """Each status, three times in a row, at whatever request comes next."""
    for _ in range(row.pick(1, 20, 200)):
        for status in (408, 425, 429, 500, 502, 503, 504):
            proxy.on("runs/log-batch", faults.status(status), times=2)  # the one request that carries events
            proxy.script(*[faults.status(status)] * 3)
            session.log(8)
            eventually(lambda: session.tracker.flush(5), 20)
            row.done()
    session.settle(row)


@pytest.mark.fault("F51", "503 to every batch while segments rotate")
def test_no_segment_is_moved_or_deleted_before_its_events_are_answered(
    mlflow_server: MlflowServer, proxy: FaultProxy, experiment_name: str, row: Row, tmp_path: Path
) -> None:
    """As long as a batch is refused, every segment from the first on is where the writer left it."""
    given = dataclasses.replace(HURRIED, segment_bytes=1024)  # one window spans several segments
    each = Session(mlflow_server, proxy.url, experiment_name, tmp_path / "outbox", given)
    proxy.on("runs/log-batch", faults.status(503), times=None)
    each.log(60)
    eventually(lambda: 3 <= sum("log-batch" in request.path for request in proxy.requests), 30, "three refusals")
    assert each.tracker.outbox_path is not None
    ordinals = sorted(int(path.stem.rpartition("-")[2]) for path in each.tracker.outbox_path.glob("runs/*/*.log"))
    assert list(range(len(ordinals))) == ordinals
    assert len(ordinals) > 3
    assert [] == list((each.tracker.outbox_path / "delivered").glob("*"))
    proxy.clear()
    row.done()
    each.settle(row)
    each.tracker.close(5)


@pytest.mark.fault("F52", "429 and 503 with Retry-After: seconds, a date, the past, 10^9, garbage")
def test_every_form_of_retry_after_is_honoured_up_to_the_cap(session: Session, proxy: FaultProxy, row: Row) -> None:
    """None of them stops delivery for longer than the cap, and none is taken for an answer about an event."""
    forms = [
        "1",
        "0",
        formatdate(time.time() + 5, usegmt=True),
        formatdate(0, usegmt=True),
        "1000000000",
        "-3",
        "soon",
        "",
    ]
    for _ in range(row.pick(1, 10, 100)):
        for form in forms:
            proxy.script(faults.status(random.choice([429, 503]), {"Retry-After": form}))
            session.log(5)
            started = time.monotonic()
            eventually(lambda: session.tracker.flush(5), 20)
            assert time.monotonic() - started < HURRIED.retry_max + 5
            row.done()
    session.settle(row)


@pytest.mark.fault("F54", "401 and 403 to everything, then a token that works")
def test_a_refused_login_parks_and_goes_on_when_it_works(session: Session, proxy: FaultProxy, row: Row) -> None:
    """The events wait for a person, and are sent once the login works."""
    for status in (401, 403) * row.pick(1, 10, 100):
        proxy.on("/", faults.status(status), times=None)
        session.log(10)
        eventually(lambda: session.tracker.flush(2).parked, 20, "parked")
        proxy.clear()
        eventually(lambda: session.tracker.flush(2), 20)
        row.done()
    session.settle(row)


@pytest.mark.fault("F55", "the server carries a request out and its answer is lost, at each request of a session")
def test_an_answer_lost_at_any_request_doubles_nothing(
    session: Session, proxy: FaultProxy, mlflow_server: MlflowServer, row: Row, tmp_path: Path
) -> None:
    """Also the create: there is one run, with every event once."""
    session.log(60)
    assert session.tracker.flush(30)
    count = len(proxy.requests)
    assert count > 5
    for place in row.sample(range(count), 10, count) * row.pick(1, 1, 5):
        proxy.script(*[faults.forward()] * place, faults.forward_then_drop_response())
        each = Session(mlflow_server, proxy.url, f"{session.experiment}-{row.times}", tmp_path / f"outbox{row.times}")
        each.log(60)
        eventually(lambda each=each: each.tracker.flush(5), 30)
        each.judge(row)
        proxy.clear()
        each.tracker.close(1)
        row.done()
    row.measure(requests=count)
    session.settle(row)


@pytest.mark.fault("F58", "reset after n bytes of the answer, and of the request, for every n")
def test_a_reset_at_any_byte_doubles_and_loses_nothing(
    part: slice, session: Session, proxy: FaultProxy, row: Row
) -> None:
    """The batch is sent again, and the server holds each event once."""
    for size in row.sample(range(513), 8, 513)[part]:
        for action in (faults.rst_after(size), faults.rst_request_after(size)):
            proxy.on("runs/log-batch", action)
            session.log(5)
            row.done()
        eventually(lambda: session.tracker.flush(5), 30)
        proxy.clear()
    session.settle(row)


def _bodies() -> dict[str, Action]:
    return {
        "hangs": faults.accept_hang(),
        "hangs after it was carried out": faults.forward_then_hang(),
        "drips a byte at a time": faults.drip(20),
        "is cut off": faults.forward_then_truncate_body(),
        "is a captive portal": faults.html_page(),
        "is not JSON": faults.status(200, {"Content-Type": "application/json"}, "[{"),
        "is empty": faults.status(200),
        "is no HTTP": faults.garbage(),
        "is a gzip bomb": faults.gzip_bomb(50_000_000),
        "has a wrong length": faults.status(200, {"Content-Length": "4000"}, "{}"),
        "redirects elsewhere": faults.redirect("http://127.0.0.1:9"),
        "is dropped": faults.drop(),
    }


@pytest.mark.fault(
    "F56", "an answer that hangs, drips, is cut, a portal, no JSON, empty, a gzip bomb, a redirect (F57, F59, F61)"
)
@pytest.mark.parametrize("what", list(_bodies()))
def test_an_answer_that_is_none_is_never_taken_for_success(
    what: str, session: Session, proxy: FaultProxy, row: Row
) -> None:
    """Whichever request it meets, everything arrives once when the answers are MLflow's again."""
    for place in range(row.pick(1, 10, 50)):
        proxy.script(*[faults.forward()] * (place % 7), _bodies()[what])
        proxy.on("runs/log-batch", _bodies()[what])
        session.log(20)
        eventually(lambda: session.tracker.flush(5), 40)
        proxy.clear()
        row.done()
    row.measure(what=what)
    session.settle(row)


@pytest.mark.fault("F61", "redirect of everything to another host")
def test_credentials_are_never_sent_to_the_host_of_a_redirect(
    mlflow_server: MlflowServer, experiment_name: str, row: Row, tmp_path: Path
) -> None:
    """The other host gets no request at all."""
    with FaultProxy(mlflow_server.url) as other, FaultProxy(mlflow_server.url) as proxy:
        proxy.on("/", faults.redirect(other.url.replace("127.0.0.1", "localhost")), times=None)
        given = proxy.url.replace("http://", "http://user:canary-password@")
        each = Session(mlflow_server, given, experiment_name, tmp_path / "outbox")
        each.log(10)
        eventually(lambda: each.tracker.flush(1).parked, 20, "parked")
        assert [] == other.requests
        proxy.clear()
        each.settle(row)
        each.tracker.close(1)
    row.done()


@pytest.mark.fault("F70", "the server goes up and down every 200 ms")
def test_a_flapping_server_gets_everything_without_a_storm(session: Session, proxy: FaultProxy, row: Row) -> None:
    """Delivery makes progress, and the number of attempts stays within bounds."""
    session.log(5)
    assert session.tracker.flush(30)
    started = time.monotonic()
    session.log(5)
    assert session.tracker.flush(30)
    up = max(0.2, 2 * (time.monotonic() - started))  # a busy machine may need longer for one run
    before, over = session.tracker.flush(0).delivered, threading.Event()

    def flap() -> None:
        while not over.is_set():
            proxy.down()
            over.wait(0.2)
            proxy.up()
            over.wait(up)

    flapper = threading.Thread(target=flap)
    flapper.start()
    seconds = max(row.pick(3, 120, 3600), 4 * up)
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        if session.tracker.flush(0).pending < 100:  # what a busy machine cannot deliver in time is not logged either
            session.log(10)
            row.done()
        over.wait(0.25)
    delivered = session.tracker.flush(0).delivered - before
    over.set()
    flapper.join()
    attempts = len(proxy.requests)
    assert delivered > 0, "no progress while flapping"
    row.measure(delivered=delivered, requests_per_s=attempts / seconds, up_s=up)
    session.settle(row, timeout=60)


def log_without_names(fd: int, port: int, experiment: str, folder: str) -> None:
    """Log while the server's name cannot be resolved, then while it resolves to a dead address and a good one."""

    def work() -> dict[str, Any]:
        own_namespace()
        hosts, resolver = Path(folder, "hosts"), Path(folder, "resolv.conf")
        hosts.write_text("127.0.0.1 nobody\n")
        resolver.write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")  # where nobody answers
        mount("--bind", str(hosts), "/etc/hosts")
        mount("--bind", str(resolver), "/etc/resolv.conf")
        try:
            socket.getaddrinfo("localhost", port)
        except socket.gaierror:
            unresolved = True
        else:
            unresolved = False
        uri = f"http://localhost:{port}"
        tracker = MLflowTracker(experiment, uri, outbox_dir=Path(folder, "outbox"), settings=PATIENT)
        run = tracker.start_run("names")
        took: list[float] = []
        for number in range(20):
            if workload.timed(took, lambda number=number: workload.log_event(run, number)):
                workload.ack(fd, number)
        before = tracker.flush(1)
        hosts.write_text("::1 localhost\n127.0.0.1 localhost\n")
        found = [address[4][0] for address in socket.getaddrinfo("localhost", port, type=socket.SOCK_STREAM)]
        run.end()
        after = tracker.flush(40)
        return {
            "unresolved": unresolved,
            "found": found,
            "before": [before.delivered, before.dead],
            "after": [after.pending, after.parked, after.dead],
            "max_ms": workload.quantile(took, 1),
        }

    workload.reported(fd, work)


@pytest.mark.needs("mounts")
@pytest.mark.fault("F69", "the server's name does not resolve; then to a dead IPv6 address before a good IPv4 one")
def test_a_name_that_does_not_resolve_is_tried_again(
    mlflow_server: MlflowServer, proxy: FaultProxy, experiment_name: str, nest: Nest, row: Row, tmp_path: Path
) -> None:
    """Nothing is dead-lettered meanwhile, and no call waits for a resolver."""
    for number in range(row.pick(1, 20, 50)):
        folder = tmp_path / str(number)
        folder.mkdir()
        experiment = f"{experiment_name}-{number}"
        port = int(proxy.url.rpartition(":")[2])
        child = nest.start(log_without_names, port, experiment, str(folder))
        report = child.report()
        assert report["unresolved"], "the name was resolved all the same"
        assert "127.0.0.1" in report["found"]
        assert [0, 0] == report["before"], report
        assert [0, 0, 0] == report["after"], report
        assert 20 == len(child.acked())
        held(mlflow_server.database_uri, experiment).check(child.acked())
        row.measure(slowest_call_ms=report["max_ms"], addresses=" ".join(report["found"]))
        row.done()


def _certificate(folder: Path, host: str, *, expired: bool = False) -> Path:
    """Make a certificate that nobody has signed, and its key, in one file."""
    import datetime as dt

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
    now = dt.datetime.now(dt.timezone.utc)
    ends = now - dt.timedelta(days=1) if expired else now + dt.timedelta(days=1)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - dt.timedelta(days=9))
        .not_valid_after(ends)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    plain = serialization.NoEncryption()
    text = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    path = folder / "certificate.pem"
    path.write_bytes(text + made.public_bytes(serialization.Encoding.PEM))
    return path


@pytest.mark.fault("F60", "TLS: self-signed, expired, wrong host, plain HTTP on the TLS port, closed in the handshake")
@pytest.mark.parametrize("what", ["self-signed", "expired", "wrong host", "plain HTTP", "closed"])
def test_a_tls_peer_that_cannot_be_trusted_gets_nothing(
    what: str, experiment_name: str, row: Row, tmp_path: Path
) -> None:
    """No byte of a request goes to it, the events stay on disk, and no call waits or raises."""
    host = "elsewhere.example" if what == "wrong host" else "localhost"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(_certificate(tmp_path, host, expired=what == "expired"))
    said: list[bytes] = []
    met = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            met.set()
            with client:
                client.settimeout(2)
                try:
                    if what == "plain HTTP":
                        client.recv(4096)
                        client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
                    elif what != "closed":
                        with context.wrap_socket(client, server_side=True) as trusted:
                            said.append(trusted.recv(4096))
                except OSError:
                    continue

    threading.Thread(target=serve, daemon=True).start()
    uri = f"https://localhost:{listener.getsockname()[1]}"
    tracker = MLflowTracker(experiment_name, uri, outbox_dir=tmp_path / "outbox", settings=HURRIED)
    run = tracker.start_run("tls")
    took: list[float] = []
    kept = [workload.timed(took, lambda n=n: workload.log_event(run, n)) for n in range(20)]
    assert all(kept)
    assert met.wait(30)
    left = tracker.flush(0.5)
    assert 0 == left.delivered + left.dead
    assert 22 > left.pending + left.parked >= 20
    assert [] == [part for part in said if part]
    tracker.close(0.1)
    listener.close()
    row.measure(what=what, max_ms=workload.quantile(took, 1))
    row.done()
