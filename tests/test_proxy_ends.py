"""The two ends of a ``FaultProxy``: TLS before it, servers behind it that go and come, and its port."""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from asking import CREATE, HEALTH, ask, ask_in_vain, ask_safely, connect, fail_safely
from certificates import Authority
from mlflow_outbox.testing import faults
from mlflow_outbox.testing.proxy import FaultProxy
from servers import MlflowServer, eventually, unused_port


@pytest.fixture
def proxy(mlflow_server: MlflowServer) -> Iterator[FaultProxy]:
    """A proxy in front of the shared MLflow server."""
    with FaultProxy(mlflow_server.url) as proxy:
        yield proxy


@contextlib.contextmanager
def forked_child() -> Iterator[None]:
    """A child that was forked a moment ago, as a data loader's are, and lives as long as the block."""
    ear, bell = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(bell)
            os.read(ear, 1)
        finally:
            os._exit(0)
    os.close(ear)
    try:
        yield
    finally:
        os.close(bell)
        os.waitpid(pid, 0)


class TestTls:
    def test_a_client_that_trusts_the_certificate_is_served(self, mlflow_server: MlflowServer, tmp_path: Path) -> None:
        """The address says https, a request passes through, and another certificate can be put in at any time."""
        authority = Authority(tmp_path / "ca")
        with FaultProxy(mlflow_server.url, tls=authority.serving("localhost")) as proxy:
            assert proxy.url.startswith("https://127.0.0.1:")
            assert 200 == ask_safely(proxy, authority)
            proxy.tls = Authority(tmp_path / "other").serving("localhost")
            with pytest.raises(ssl.SSLCertVerificationError):
                ask_safely(proxy, authority)
            proxy.tls = authority.serving("localhost")
            assert 200 == ask_safely(proxy, authority)
            assert 2 == len(proxy.requests)

    def test_down_ends_connections_with_tls_too(self, mlflow_server: MlflowServer, tmp_path: Path) -> None:
        """One that is in the middle of a handshake and one that waits for its answer; no thread is left behind."""
        authority = Authority(tmp_path)
        proxy = FaultProxy(mlflow_server.url, [faults.accept_hang()], tls=authority.serving("localhost"))
        failures: list[OSError] = []
        client = threading.Thread(target=fail_safely, args=(proxy, authority, failures))
        client.start()
        with socket.create_connection(("127.0.0.1", urlsplit(proxy.url).port or 0)) as silent:
            eventually(lambda: proxy.requests and 2 == proxy.accepted)
            threads = [connection.thread for connection in proxy._connections]
            proxy.close()
            silent.settimeout(20)
            with contextlib.suppress(ConnectionResetError):
                while silent.recv(100):  # TLS may say goodbye
                    pass
        client.join(10)
        assert 1 == len(failures)
        assert [] == [thread for thread in threads if thread.is_alive()]

    def test_a_port_can_be_asked_for(self, mlflow_server: MlflowServer) -> None:
        """A proxy can take the place of something else."""
        number = unused_port()
        with FaultProxy(mlflow_server.url, port=number) as proxy:
            assert f"http://127.0.0.1:{number}" == proxy.url
            assert ask(proxy)[0] == http.HTTPStatus.OK


class TestBackend:
    def test_down_refuses_and_up_serves_at_the_same_address(self, proxy: FaultProxy) -> None:
        """Connections are refused while the proxy is down, as often as it goes down."""
        for _ in range(3):
            assert ask(proxy)[0] == http.HTTPStatus.OK
            proxy.down()
            with pytest.raises(ConnectionRefusedError):
                ask(proxy)
            proxy.up()

    def test_down_resets_connections_that_are_open(self, proxy: FaultProxy) -> None:
        """A kept-alive connection does not survive."""
        with closing(connect(proxy)) as connection:
            connection.request("GET", HEALTH)
            connection.getresponse().read()
            proxy.down()
            eventually(lambda: not proxy._connections, message="the connection's thread ends")
            with pytest.raises(ConnectionError):
                connection.request("GET", HEALTH)
                connection.getresponse()

    def test_a_forked_child_keeps_neither_the_port_nor_a_connection(self, proxy: FaultProxy) -> None:
        """While data loaders run new connections are refused, those there are reset, and a dropped one has an end."""
        with closing(connect(proxy)) as dropped, closing(connect(proxy)) as kept:
            for connection in (dropped, kept):
                connection.request("GET", HEALTH)
                connection.getresponse().read()
            with forked_child():
                proxy.script(faults.drop())
                dropped.request("GET", HEALTH)
                with pytest.raises(ConnectionError):
                    dropped.getresponse()
                proxy.down()
                with pytest.raises(ConnectionError):
                    kept.request("GET", HEALTH)
                    kept.getresponse()
                with pytest.raises(ConnectionRefusedError):
                    ask(proxy)
                proxy.up()
                assert ask(proxy)[0] == http.HTTPStatus.OK

    def test_another_backend_takes_over_at_once(
        self, proxy: FaultProxy, own_mlflow_server: Callable[[], MlflowServer], experiment_name: str
    ) -> None:
        """After swap_backend the same connection reaches the other server, which knows other things."""
        other = own_mlflow_server()
        assert ask(proxy, "POST", CREATE, {"name": experiment_name})[0] == http.HTTPStatus.OK
        path = f"/api/2.0/mlflow/experiments/get-by-name?experiment_name={experiment_name}"
        with closing(connect(proxy)) as connection:
            statuses = []
            for action in (faults.forward(), faults.swap_backend(other.url), faults.forward()):
                proxy.script(action)
                connection.request("GET", path)
                answer = connection.getresponse()
                answer.read()
                statuses.append(answer.status)
        assert [200, 404, 404] == statuses

    def test_a_killed_backend_looks_like_a_reset_until_it_is_back(
        self, own_mlflow_server: Callable[[], MlflowServer]
    ) -> None:
        """The proxy invents no answers for a server that is gone."""
        server = own_mlflow_server()
        with FaultProxy(server.url) as proxy:
            assert ask(proxy)[0] == http.HTTPStatus.OK
            server.kill()
            with pytest.raises(ConnectionResetError):
                ask(proxy)
            server.start()
            assert ask(proxy)[0] == http.HTTPStatus.OK
            assert [200, None, 200] == [request.backend_status for request in proxy.requests]

    def test_going_down_ends_a_request_that_a_paused_backend_holds_up(
        self, own_mlflow_server: Callable[[], MlflowServer]
    ) -> None:
        """Closing the proxy does not wait for a server that does not answer."""
        server = own_mlflow_server()
        server.pause()
        proxy = FaultProxy(server.url)
        client = threading.Thread(target=ask_in_vain, args=(proxy, []))
        client.start()
        eventually(lambda: proxy.requests, message="the request is recorded")
        start = time.monotonic()
        proxy.close()
        client.join(10)
        assert not client.is_alive()
        assert time.monotonic() - start < 5

    def test_a_closed_proxy_leaves_no_thread_behind(self, mlflow_server: MlflowServer) -> None:
        """All threads have ended when close returns."""
        with FaultProxy(mlflow_server.url) as proxy, closing(connect(proxy)) as connection:
            connection.request("GET", HEALTH)
            connection.getresponse().read()
            connections = list(proxy._connections)
            assert 1 == len(connections)
        assert [] == [each.thread for each in connections if each.thread.is_alive()]
