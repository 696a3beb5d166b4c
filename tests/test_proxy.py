from __future__ import annotations

import http.client
import json
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

import pytest

from asking import CREATE, HEALTH, ask, ask_in_vain, connect
from mlflow_outbox.testing import faults
from mlflow_outbox.testing.proxy import Action, FaultProxy
from servers import MlflowServer, eventually


@pytest.fixture
def proxy(mlflow_server: MlflowServer) -> Iterator[FaultProxy]:
    """A proxy in front of the shared MLflow server."""
    with FaultProxy(mlflow_server.url) as proxy:
        yield proxy


def experiment_exists(server: MlflowServer, name: str) -> bool:
    """Ask the server itself, not through the proxy."""
    parts = urlsplit(server.url)
    with closing(http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=20)) as connection:
        connection.request("GET", f"/api/2.0/mlflow/experiments/get-by-name?experiment_name={name}")
        return connection.getresponse().status == http.HTTPStatus.OK


class TestForwarding:
    def test_an_answer_passes_through_unchanged(
        self, proxy: FaultProxy, mlflow_server: MlflowServer, experiment_name: str
    ) -> None:
        """Status, body and effect are those of the server behind."""
        status, body = ask(proxy, "POST", CREATE, {"name": experiment_name})
        assert (200, True) == (status, "experiment_id" in json.loads(body))
        assert experiment_exists(mlflow_server, experiment_name)

    def test_an_error_of_the_server_passes_through_too(self, proxy: FaultProxy) -> None:
        """A 404 with MLflow's error code arrives as it was sent."""
        status, body = ask(proxy, path="/api/2.0/mlflow/runs/get?run_id=nothing")
        assert (404, "RESOURCE_DOES_NOT_EXIST") == (status, json.loads(body)["error_code"])

    def test_one_connection_serves_many_requests(self, proxy: FaultProxy) -> None:
        """A kept-alive connection stays usable through answers of every kind."""
        proxy.script(faults.forward(), faults.status(503), faults.html_page())
        with closing(connect(proxy)) as connection:
            connection.connect()
            port = connection.sock.getsockname()[1]
            statuses = []
            for method in ("GET", "GET", "GET", "HEAD", "GET"):
                connection.request(method, HEALTH)
                answer = connection.getresponse()
                answer.read()
                statuses.append(answer.status)
            assert [200, 503, 200, 200, 200] == statuses
            assert port == connection.sock.getsockname()[1]

    def test_a_chunked_body_is_passed_on_whole(self, proxy: FaultProxy, experiment_name: str) -> None:
        """A body sent in chunks is recorded and forwarded as one."""
        parts = [b'{"name": "', experiment_name.encode(), b'"}']
        with closing(connect(proxy)) as connection:
            connection.request("POST", CREATE, iter(parts), {"Content-Type": "application/json"}, encode_chunked=True)
            assert connection.getresponse().status == http.HTTPStatus.OK
        assert b"".join(parts) == proxy.requests[0].body

    def test_a_request_that_its_client_breaks_off_does_not_reach_the_server(
        self, proxy: FaultProxy, mlflow_server: MlflowServer, experiment_name: str
    ) -> None:
        """As of a program that is killed while it sends: what there is would be taken for the whole."""
        body = json.dumps({"name": experiment_name}).encode()
        head = f"POST {CREATE} HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: {len(body) + 1}\r\n\r\n"
        parts = urlsplit(proxy.url)
        with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=20) as client:
            client.sendall(head.encode() + body)
        eventually(lambda: 1 == proxy.accepted and not proxy._connections, message="the connection's thread ends")
        assert ([], False) == (proxy.requests, experiment_exists(mlflow_server, experiment_name))

    def test_an_idle_connection_outlives_the_servers_own_patience(self, mlflow_server: MlflowServer) -> None:
        """A request after the server behind has closed its idle connection is served and sent once."""
        with FaultProxy(mlflow_server.url) as proxy, closing(connect(proxy)) as connection:
            connection.request("GET", HEALTH)
            connection.getresponse().read()
            assert not threading.Event().wait(1.2)  # longer than the proxy reuses an idle connection
            connection.request("GET", HEALTH)
            assert connection.getresponse().status == http.HTTPStatus.OK
            assert [200, 200] == [request.backend_status for request in proxy.requests]

    def test_the_proxy_costs_less_than_two_milliseconds(self, proxy: FaultProxy) -> None:
        """The median overhead of the proxy itself is small enough not to disturb what is measured through it.

        Where the processors are slow or busy it may be ten times what a server costs that does nothing at all.
        """
        proxy.on(HEALTH, faults.status(200), times=None)

        def answer_all(listener: socket.socket) -> None:
            with listener.accept()[0] as client, client.makefile("rb") as heard:
                for line in heard:
                    if line == b"\r\n":
                        client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

        with socket.create_server(("127.0.0.1", 0)) as listener:
            bare = threading.Thread(target=answer_all, args=(listener,), daemon=True)
            bare.start()
            port = listener.getsockname()[1]
            with (
                closing(connect(proxy)) as through,
                closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as beside,
            ):
                took: dict[http.client.HTTPConnection, list[float]] = {through: [], beside: []}
                for _ in range(200):
                    for connection, durations in took.items():
                        start = time.perf_counter()
                        connection.request("GET", HEALTH)
                        connection.getresponse().read()
                        durations.append(time.perf_counter() - start)
            bare.join(60)
        assert statistics.median(took[through]) < max(0.002, 10 * statistics.median(took[beside]))

    def test_many_connections_are_served_at_once(self, proxy: FaultProxy) -> None:
        """Requests of several threads are all forwarded and all recorded."""
        threads = [threading.Thread(target=ask, args=(proxy,)) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [(number, 200) for number in range(16)] == [(each.ordinal, each.status) for each in proxy.requests]


class TestChoosing:
    def test_the_script_goes_by_the_order_of_requests(self, proxy: FaultProxy) -> None:
        """The first requests get the script's actions, the later ones are forwarded."""
        proxy.script(faults.status(500), faults.status(429, {"Retry-After": "7"}))
        assert [500, 429, 200, 200] == [ask(proxy)[0] for _ in range(4)]

    def test_a_rule_goes_by_method_and_path_and_before_the_script(self, proxy: FaultProxy) -> None:
        """A request that a rule takes leaves the script where it was."""
        proxy.script(faults.status(500))
        proxy.on(lambda method, path: method == "GET" and path.startswith("/version"), faults.status(418), times=2)
        assert [418, 500, 418, 200] == [
            ask(proxy, path=path)[0] for path in ("/version", HEALTH, "/version", "/version")
        ]

    def test_a_rule_about_the_body_takes_only_requests_that_hold_it(
        self, proxy: FaultProxy, experiment_name: str
    ) -> None:
        """By a text in it or by a function of its bytes; a request that does not fit uses nothing up."""
        proxy.on(CREATE, faults.status(422), body="canary")
        proxy.on(CREATE, faults.rst_request_after(3), body=lambda content: json.loads(content).get("name") == "gone")
        proxy.script(faults.status(500))
        assert [500, 200, 422, 400] == [
            ask(proxy, "POST", CREATE, {"name": name})[0] for name in ("first", experiment_name, "a canary", "")
        ]
        with pytest.raises(ConnectionError):
            ask(proxy, "POST", CREATE, {"name": "gone"})
        assert ["status(500)", "forward", "status(422)", "forward", "rst_request_after(3)"] == [
            request.action for request in proxy.requests
        ]
        assert b'{"n' == proxy.requests[-1].body

    @pytest.mark.parametrize("of", ["rule", "action"])
    def test_a_mistake_in_the_code_of_a_test_is_seen(
        self, of: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A body without JSON is a ValueError, as what is no HTTP is, which ends its connection in silence."""
        seen: list[threading.ExceptHookArgs] = []
        monkeypatch.setattr(threading, "excepthook", seen.append)
        if of == "rule":
            proxy.on(HEALTH, faults.status(503), body=lambda content: "name" in json.loads(content))
        else:
            proxy.on(HEALTH, Action("own", lambda exchange: json.loads(exchange.request.body)))
        with pytest.raises(ConnectionError):
            ask(proxy)
        eventually(lambda: seen)
        (found,) = seen
        assert of in str(found.exc_value)
        assert "raised JSONDecodeError" in str(found.exc_value)

    def test_clear_forwards_everything_from_then_on(self, proxy: FaultProxy) -> None:
        """Rules without an end and scripts are forgotten."""
        proxy.on("/", faults.status(500), times=None)
        proxy.script(faults.status(500))
        before = ask(proxy)[0]
        proxy.clear()
        assert (500, 200) == (before, ask(proxy)[0])


class TestRecording:
    def test_a_record_tells_what_was_sent_and_what_became_of_it(self, proxy: FaultProxy, experiment_name: str) -> None:
        """Method, path, headers, body and both statuses are there."""
        proxy.script(faults.forward_then_drop_response())
        with pytest.raises(ConnectionError):
            ask(proxy, "POST", CREATE, {"name": experiment_name})
        (request,) = proxy.requests
        assert ("POST", CREATE, "application/json") == (request.method, request.path, request.header("content-type"))
        assert {"name": experiment_name} == json.loads(request.body)
        assert (200, None) == (request.backend_status, request.status)

    def test_a_record_tells_when_it_came_and_when_it_was_over(self, proxy: FaultProxy) -> None:
        """Also of a request that its client gave up, and in the order in which things happened."""
        proxy.script(faults.delay(0.1), faults.accept_hang())
        before = time.monotonic()
        assert ask(proxy)[0] == http.HTTPStatus.OK
        eventually(lambda: proxy.requests[0].ended)  # the client has its answer a moment before
        with closing(connect(proxy)) as connection:
            connection.request("GET", HEALTH)
            eventually(lambda: 2 == len(proxy.requests))
            assert None is proxy.requests[1].ended
        given_up = eventually(lambda: proxy.requests[1].ended)
        first, second = proxy.requests
        assert before <= first.arrived <= (first.ended or 0) - 0.1
        assert (first.ended or 0) <= second.arrived <= given_up <= time.monotonic()

    def test_connections_are_counted_with_or_without_a_request(self, proxy: FaultProxy) -> None:
        """Two connections, one of which says nothing."""
        with closing(connect(proxy)) as silent:
            silent.connect()
            ask(proxy)
            eventually(lambda: 2 == proxy.accepted)
        assert 1 == len(proxy.requests)

    def test_a_record_shows_no_secrets_when_printed(self, proxy: FaultProxy) -> None:
        """Headers and bodies stay out of repr, so out of logs and failed assertions."""
        with closing(connect(proxy)) as connection:
            connection.request("GET", HEALTH, headers={"Authorization": "Bearer canary"})
            connection.getresponse().read()
        assert "canary" not in repr(proxy.requests)
        assert "Bearer canary" == proxy.requests[0].header("authorization")


class TestFaults:
    @pytest.mark.parametrize(
        ("action", "error"),
        [
            (faults.drop(), http.client.RemoteDisconnected),
            (faults.forward_then_drop_response(), http.client.RemoteDisconnected),
            (faults.rst_after(0), ConnectionResetError),
            (faults.forward_then_truncate_body(), http.client.IncompleteRead),
            (faults.forward_then_truncate_body(keep=0), http.client.IncompleteRead),
            (faults.garbage(), http.client.BadStatusLine),
            (faults.refuse(), ConnectionResetError),
        ],
        ids=lambda value: getattr(value, "name", ""),
    )
    def test_the_client_sees_the_fault_that_was_asked_for(
        self, proxy: FaultProxy, action: Any, error: type[Exception]
    ) -> None:
        """Each action that breaks the connection breaks it in its own way."""
        proxy.script(action)
        with pytest.raises(error) as caught:
            ask(proxy)
        assert error is caught.type

    def test_a_reset_in_the_middle_of_an_answer_follows_its_first_bytes(self, proxy: FaultProxy) -> None:
        """The client gets n bytes, and then the reset."""
        proxy.script(faults.rst_after(12))
        parts = urlsplit(proxy.url)
        with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=20) as client:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            received = b""
            with pytest.raises(ConnectionResetError):
                while data := client.recv(4096):
                    received += data
        # A reset may overtake bytes that the client has not read yet, as it does on a real network.
        assert b"HTTP/1.1 200".startswith(received)

    def test_a_reset_in_the_middle_of_a_request_keeps_it_from_the_server(
        self, proxy: FaultProxy, mlflow_server: MlflowServer, experiment_name: str
    ) -> None:
        """The part that arrived is recorded, and the server behind never sees it."""
        proxy.script(faults.rst_request_after(10))
        with pytest.raises(ConnectionError):
            ask(proxy, "POST", CREATE, {"name": experiment_name})
        assert b'{"name": "' == proxy.requests[0].body
        assert not experiment_exists(mlflow_server, experiment_name)

    @pytest.mark.parametrize(
        ("make", "committed"),
        [
            (faults.forward_then_drop_response, True),
            (lambda: faults.rst_after(0), True),
            (faults.forward_then_truncate_body, True),
            (faults.drop, False),
            (lambda: faults.status(503), False),
        ],
    )
    def test_the_server_behind_has_carried_it_out_or_has_not(
        self,
        proxy: FaultProxy,
        mlflow_server: MlflowServer,
        experiment_name: str,
        make: Callable[[], Any],
        committed: bool,
    ) -> None:
        """Actions that forward first leave the effect behind; the others leave none."""
        proxy.script(make())
        try:
            ask(proxy, "POST", CREATE, {"name": experiment_name})
        except (ConnectionError, http.client.HTTPException):
            assert None is proxy.requests[0].status or committed
        assert committed is experiment_exists(mlflow_server, experiment_name)

    def test_a_hanging_request_is_recorded_and_ends_with_the_proxy(self, mlflow_server: MlflowServer) -> None:
        """Nothing is answered while the proxy is up; going down resets the connection."""
        failures: list[type[ConnectionError]] = []
        with FaultProxy(mlflow_server.url, [faults.accept_hang()]) as proxy:
            client = threading.Thread(target=ask_in_vain, args=(proxy, failures))
            client.start()
            eventually(lambda: proxy.requests, message="the request is recorded")
            assert client.is_alive()
        client.join(10)
        assert [ConnectionResetError] == failures

    def test_a_dripping_answer_takes_as_long_as_its_bytes(self, proxy: FaultProxy) -> None:
        """The whole answer arrives, slowly."""
        proxy.script(faults.drip(500))
        start = time.monotonic()
        assert (200, b"OK") == ask(proxy)
        assert time.monotonic() - start > 0.2  # about 150 bytes

    def test_a_delay_comes_before_the_request_is_passed_on(self, proxy: FaultProxy) -> None:
        """After the delay the action that follows is carried out."""
        proxy.script(faults.delay(0.1, faults.status(504)))
        start = time.monotonic()
        assert ask(proxy)[0] == http.HTTPStatus.GATEWAY_TIMEOUT
        assert time.monotonic() - start >= 0.1

    def test_a_redirect_names_the_other_host_with_the_same_path(self, proxy: FaultProxy) -> None:
        """A location without a path gets the path of the request."""
        proxy.script(faults.redirect("http://other.example", 307))
        with closing(connect(proxy)) as connection:
            connection.request("GET", HEALTH)
            answer = connection.getresponse()
            assert (307, "http://other.example/health") == (answer.status, answer.getheader("Location"))

    def test_a_gzip_bomb_is_small_on_the_wire(self, proxy: FaultProxy) -> None:
        """Ten million bytes are announced as compressed, and few are sent."""
        proxy.script(faults.gzip_bomb(10_000_000))
        status, body = ask(proxy)
        assert (200, True) == (status, len(body) < 20_000)
