"""Who is spoken to: refused logins, certificates that cannot be trusted, redirects, names without an address."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from certificates import Authority
from faults import workload
from faults.children import Nest
from faults.mounts import mount, own_namespace
from faults.network import HURRIED, PATIENT, Session
from faults.oracle import held
from faults.table import Row
from mlflow_outbox import MLflowTracker
from mlflow_outbox.testing import faults
from mlflow_outbox.testing.port import Port
from mlflow_outbox.testing.proxy import FaultProxy
from servers import MlflowServer, eventually


@pytest.mark.fault("F54", "401 and 403 to everything, then a token that works")
def test_a_refused_login_parks_and_goes_on_when_it_works(session: Session, proxy: FaultProxy, row: Row) -> None:
    """The events wait for a person, and are sent once the login works."""
    for status in (401, 403) * row.pick(1, 10, 100):
        proxy.on("/", faults.status(status), times=None)
        session.log(10)
        eventually(lambda: session.tracker.flush(2).parked, 60, "parked")
        proxy.clear()
        session.arrives(row)
        row.done()
    session.settle(row)


class Peer:
    """What answers on a TLS port and is not to be trusted; keeps all that it is told.

    Args:
        shows: what it answers a handshake with; None speaks no TLS.
        says: what it answers otherwise.

    Attributes:
        heard: what each client sent, as it came.
        understood: what was sent to it through TLS.
    """

    def __init__(self, shows: ssl.SSLContext | None, says: bytes) -> None:
        self._shows, self._says = shows, says
        self.heard: list[bytes] = []
        self.understood: list[bytes] = []
        self.port = Port("127.0.0.1", self._serve)
        self.port.open()

    def _serve(self, client: socket.socket) -> None:
        client.settimeout(2)
        with client, contextlib.suppress(OSError):
            if self._shows is not None:
                self.heard.append(client.recv(4096, socket.MSG_PEEK))
                with self._shows.wrap_socket(client, server_side=True) as trusted:
                    self.understood.append(trusted.recv(4096))
                return
            self.heard.append(client.recv(4096))
            client.sendall(self._says)
            while self._says and (more := client.recv(4096)):
                self.heard[-1] += more


def _peers(authority: Authority, folder: Path) -> dict[str, Callable[[], Peer]]:
    return {
        "self-signed": lambda: Peer(Authority(folder / "others").serving("localhost"), b""),
        "expired": lambda: Peer(authority.serving("localhost", expired=True), b""),
        "wrong host": lambda: Peer(authority.serving("elsewhere.example"), b""),
        "plain HTTP": lambda: Peer(None, b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"),
        "closed": lambda: Peer(None, b""),
    }


# Before 3.13, Python's own ssl leaves a socket open whose peer resets it before the handshake has begun.
@pytest.mark.filterwarnings("ignore:unclosed <ssl.SSLSocket:ResourceWarning")
@pytest.mark.fault("F60", "TLS: self-signed, expired, wrong host, plain HTTP on the TLS port, closed in the handshake")
@pytest.mark.parametrize("what", ["self-signed", "expired", "wrong host", "plain HTTP", "closed"])
def test_a_tls_peer_that_cannot_be_trusted_gets_nothing(
    what: str,
    mlflow_server: MlflowServer,
    experiment_name: str,
    row: Row,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is told no more than how a handshake begins; all waits, and arrives when a trusted server is in its place."""
    authority = Authority(tmp_path / "trusted")
    monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(authority.path))
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "canary-token")
    for number in range(row.pick(1, 5, 20)):
        peer = _peers(authority, tmp_path)[what]()
        port = peer.port.address[1]
        outbox = tmp_path / f"outbox{number}"
        session = Session(mlflow_server, f"https://localhost:{port}", f"{experiment_name}-{number}", outbox, HURRIED)
        session.log(20)
        eventually(lambda peer=peer: len(peer.heard) >= 3, 60, "it was tried again and again")
        left = session.tracker.flush(0.5)
        assert (0, 0, 22) == (left.delivered, left.dead, left.pending + left.parked)
        peer.port.release()
        assert [] == peer.understood
        for part in peer.heard:
            assert b"\x16\x03" == part[:2], "it begins a handshake"
            assert not [word for word in (b"POST", b"GET", b"Authorization", b"canary", b"mlflow") if word in part]
        with FaultProxy(mlflow_server.url, port=port, tls=authority.serving("localhost")) as proxy:
            session.settle(row)
            assert {"Bearer canary-token"} == {request.header("Authorization") for request in proxy.requests}
            session.tracker.close(1)
        row.measure(what=what)
        row.done()


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
        eventually(lambda: each.tracker.flush(1).parked, 60, "parked")
        assert [] == other.requests
        proxy.clear()
        each.settle(row)
        each.tracker.close(1)
    row.done()


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
