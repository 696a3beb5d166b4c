"""A proxy in front of a tracking server that fails the way networks and servers do, on command.

Put it between the outbox and a real server, tell it what to do with which request, and look at what has arrived:

    with FaultProxy("http://127.0.0.1:5000") as proxy:
        proxy.on("runs/log-batch", forward_then_drop_response())  # the next batch is committed, its answer lost
        tracker = MLflowTracker("experiment", proxy.url)
        ...
        assert [200, 200] == [request.backend_status for request in proxy.requests if "log-batch" in request.path]

* Each request gets one ``Action`` (see ``mlflow_outbox.testing.faults``): from the first rule made by ``on()`` that
  fits and is not used up, otherwise the next of the script, otherwise it is forwarded.
* Every request is recorded before its action runs, so a request that is never answered can be seen too. A record says
  which action that is, what the server behind answered and, separately, what the client was sent, and when.
* A request is sent to the server behind at most once, whatever happens: a repeated one comes from the client.
* An error of a rule's function, or a ValueError of an action, is one of the connection's thread: see
  ``threading.excepthook``.
* One thread per connection, kept alive as HTTP/1.1 says; connections are to loopback, without TLS unless a context
  for it is given. The connection to the server behind is always without.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterable
from io import BufferedReader
from types import TracebackType
from typing import final
from urllib.parse import urlsplit

from mlflow_outbox import stopwatch
from mlflow_outbox.testing.port import Port, not_in_children
from mlflow_outbox.testing.rules import Rules, shown
from mlflow_outbox.testing.wire import Answer, Headers, Request, end_to_end, read_body

#: Seconds after which an idle connection to the server behind is not used again: servers close them after some.
_IDLE = 1.0
#: Seconds the server behind may take for one answer, and ``close()`` for each thread.
_PATIENCE = 60.0
#: SO_LINGER on, with zero seconds: closing sends RST instead of FIN.
_RESET = struct.pack("ii", 1, 0)


@dataclasses.dataclass(frozen=True)
class Action:
    """What happens to one request; ``mlflow_outbox.testing.faults`` makes the usual ones."""

    #: For messages.
    name: str
    #: Called with the exchange in the connection's own thread; whatever it leaves open can take the next request.
    run: Callable[[Exchange], object]
    #: Bytes of the request's body that are read before; None means all.
    reads: int | None = None


class Exchange:
    """One request and the connection it came on: the means from which actions are made."""

    def __init__(self, proxy: FaultProxy, connection: _Connection, request: Request) -> None:
        self.proxy = proxy
        self._connection = connection
        self._request = request

    @property
    def request(self) -> Request:
        """The request with what became of it so far."""
        return self._request

    def _note(self, request: Request) -> None:
        self._request = request
        self.proxy._record(request)  # noqa: SLF001 - the two classes are one mechanism

    def run(self, action: Action) -> None:
        """Carry an action out, and note when it is over."""
        try:
            with shown(f"the action {action.name}", ValueError):
                action.run(self)
        finally:
            self._note(dataclasses.replace(self._request, ended=stopwatch.seconds()))

    def fetch(self) -> Answer | None:
        """Pass the request on to the server behind; None when that server is gone or breaks off."""
        answer = self._connection.fetch(self._request)
        if answer is not None:
            self._note(dataclasses.replace(self._request, backend_status=answer.status))
        return answer

    def send(self, answer: Answer, upto: int | None = None) -> None:
        """Send an answer, or only its first bytes.

        Args:
            answer: what to send.
            upto: bytes to send, the head included; None means all.
        """
        self._note(dataclasses.replace(self._request, status=answer.status))
        self.send_bytes(answer.encode(head_only=self._request.method == "HEAD")[:upto])

    def send_bytes(self, data: bytes) -> None:
        """Send bytes as they are."""
        self._connection.client.sendall(data)

    def forward(self) -> None:
        """Pass the request on and the answer back; a server that is gone looks to the client like a reset."""
        answer = self.fetch()
        if answer is None:
            self.reset()
        else:
            self.send(answer)

    def close(self) -> None:
        """Close the connection in an orderly way (FIN)."""
        self._connection.close()

    def reset(self) -> None:
        """Close the connection with a reset (RST)."""
        self._connection.close(reset=True)

    def wait(self, seconds: float) -> bool:
        """Wait; False when the proxy went down meanwhile.

        Args:
            seconds: how long, by the monotonic clock.
        """
        return not self._connection.closed.wait(seconds)

    def hang(self) -> None:
        """Keep the connection open and silent until the client gives it up or the proxy goes down."""
        self._connection.drain()


_FORWARD = Action("forward", Exchange.forward)


@final
class FaultProxy:
    """A scripted HTTP proxy on a free loopback port; a context manager, safe to use from several threads.

    Args:
        backend: address of the server behind, ``http://host:port`` with an optional path.
        script: the actions of the first requests, in order; later requests are forwarded.
        host: loopback address to listen on.
        port: number of the port; 0 takes a free one.
        tls: what answers handshakes, with a certificate; None speaks without TLS.

    Attributes:
        backend: as given; whoever changes it moves the later requests.
        tls: as given; whoever changes it changes the certificate of later connections.
    """

    def __init__(
        self,
        backend: str,
        script: Iterable[Action] = (),
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.backend = backend
        self.tls = tls
        self._lock = threading.Lock()
        self._rules = Rules(script)
        self._records: list[Request] = []
        self._connections: set[_Connection] = set()
        self._accepted = 0
        self._port = Port(host, self._serve, port)
        self.up()

    @property
    def url(self) -> str:
        """The proxy's own address, the same whether it is up or down."""
        host, number = self._port.address
        return f"{'https' if self.tls else 'http'}://{host}:{number}"

    @property
    def requests(self) -> list[Request]:
        """Every request so far, in the order of arrival, with what became of it up to now."""
        with self._lock:
            return list(self._records)

    @property
    def accepted(self) -> int:
        """How many connections were accepted so far, those included on which no request came."""
        with self._lock:
            return self._accepted

    def script(self, *actions: Action) -> None:
        """Append actions for the requests to come that no rule fits."""
        self._rules.script(actions)

    def on(
        self,
        fits: str | Callable[[str, str], bool],
        action: Action,
        times: int | None = 1,
        *,
        body: str | Callable[[bytes], bool] | None = None,
    ) -> None:
        """Add a rule.

        Args:
            fits: a part of the path, or a function of method and path.
            action: what happens to a request that fits.
            times: number of requests after which the rule is used up; None means never.
            body: text that the request's body has to contain, or a function of its bytes; None means any body. To
                tell, the body is read whole before the action begins, also where that would read less.
        """
        self._rules.add(fits, action, times, body)

    def clear(self) -> None:
        """Forget all rules and the rest of the script: from now on everything is forwarded."""
        self._rules.clear()

    def down(self) -> None:
        """Refuse new connections and reset those there are; the port stays reserved."""
        self._port.shut()
        for connection in self._open_connections():
            connection.close(reset=True)

    def up(self) -> None:
        """Listen again after ``down()``."""
        self._port.open()

    def close(self) -> None:
        """Go down for good and wait for the threads of the connections."""
        self._port.release()
        self.down()
        for connection in self._open_connections():
            if connection.thread is not threading.current_thread():
                connection.thread.join(_IDLE)
                # Still there: it waits for a client that does not read what it is sent.
                connection.close()
                connection.thread.join(_PATIENCE)

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _serve(self, client: socket.socket) -> None:
        connection = _Connection(self, client)
        with self._lock:
            self._accepted += 1
            self._connections.add(connection)
            connection.thread.start()

    def _open_connections(self) -> list[_Connection]:
        with self._lock:
            return list(self._connections)

    def _forget(self, connection: _Connection) -> None:
        with self._lock:
            self._connections.discard(connection)

    def _arrived(self, method: str, path: str, headers: Headers, stream: BufferedReader) -> tuple[Request, Action]:
        """Read a request's body, as much of it as its action wants, and record the request."""
        body = read_body(stream, headers) if self._rules.ask_for_body(method, path) else None
        action = self._rules.choose(method, path, body) or _FORWARD
        body = read_body(stream, headers, action.reads) if body is None else body[: action.reads]
        with self._lock:
            request = Request(
                len(self._records), method, path, headers, body, action=action.name, arrived=stopwatch.seconds()
            )
            self._records.append(request)
            return request, action

    def _record(self, request: Request) -> None:
        with self._lock:
            self._records[request.ordinal] = request


class _Connection:
    """One client's connection, and the one to the server behind that serves it."""

    def __init__(self, proxy: FaultProxy, client: socket.socket) -> None:
        not_in_children(client)
        client.settimeout(None)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.client = client
        self.thread = threading.Thread(target=self._run, name="fault-proxy-connection", daemon=True)
        self._proxy = proxy
        self.closed = threading.Event()
        self._backend: tuple[str, http.client.HTTPConnection, float] | None = None

    def _run(self) -> None:
        stream: BufferedReader | None = None
        try:
            tls = self._proxy.tls
            if tls is not None:
                # A client that has gone again ends here: CPython gives no socket back, and closes none, where that is
                # noticed in the middle of the wrapping (``SSLSocket._create``, a reset).
                self.client.getpeername()
                self.client = tls.wrap_socket(self.client, server_side=True, do_handshake_on_connect=False)
                not_in_children(self.client)
                self.client.do_handshake()
            stream = self.client.makefile("rb")
            while not self.closed.is_set() and self._take(stream):
                pass
        except (OSError, ValueError, http.client.HTTPException):
            pass  # the client went away, or what it sent is no HTTP: in both cases there is nobody to answer
        finally:
            if stream is not None:
                stream.close()
            self.close()
            self.client.close()
            if self._backend:
                self._backend[1].close()
            self._proxy._forget(self)  # noqa: SLF001 - the two classes are one mechanism

    def _take(self, stream: BufferedReader) -> bool:
        """Serve one request; False when there will be no other."""
        line = stream.readline()
        if not line:
            return False
        method, path, version = line.decode("latin-1").split()
        headers: Headers = tuple(http.client.parse_headers(stream).items())
        named = {name.lower(): value.lower() for name, value in headers}
        if named.get("expect") == "100-continue":
            self.client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        request, action = self._proxy._arrived(method, path, headers, stream)  # noqa: SLF001 - one mechanism
        Exchange(self._proxy, self, request).run(action)
        return version == "HTTP/1.1" and named.get("connection") != "close"

    def fetch(self, request: Request) -> Answer | None:
        """Send a request to the server behind, once."""
        target = self._proxy.backend
        parts = urlsplit(target)
        try:
            connection = self._connect(target, parts.hostname or "", parts.port or 80)
            connection.putrequest(
                request.method, parts.path.rstrip("/") + request.path, skip_host=True, skip_accept_encoding=True
            )
            connection.putheader("Host", parts.netloc)
            for name, value in end_to_end(request.headers):
                if name.lower() not in {"host", "expect"}:
                    connection.putheader(name, value)
            if request.body or request.method in {"POST", "PUT", "PATCH"}:
                connection.putheader("Content-Length", str(len(request.body)))
            connection.endheaders(request.body)
            response = connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException):
            if self._backend:
                self._backend[1].close()
            self._backend = None
            return None
        self._backend = (target, connection, stopwatch.seconds())
        kept = end_to_end(tuple(response.getheaders()))
        if request.method == "HEAD" and (length := response.getheader("Content-Length")):
            kept += (("Content-Length", length),)
        return Answer(response.status, kept, body)

    def _connect(self, target: str, host: str, port: int) -> http.client.HTTPConnection:
        if self._backend:
            before, connection, used = self._backend
            if before == target and stopwatch.seconds() - used < _IDLE:
                return connection
            connection.close()
        connection = http.client.HTTPConnection(host, port, timeout=_PATIENCE)
        self._backend = (target, connection, stopwatch.seconds())
        return connection

    def drain(self) -> None:
        """Read and ignore what the client sends until one of the two ends the connection."""
        while not self.closed.is_set() and self.client.recv(65536):
            pass
        self.closed.set()

    def close(self, *, reset: bool = False) -> None:
        """End the connection from any thread; the connection's own thread then frees the socket."""
        self.closed.set()
        with contextlib.suppress(OSError):
            if reset:
                self.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            if self.thread is not threading.current_thread():
                # Shut for reading only, a reset is sent by the thread that this wakes, when it closes the socket.
                # The method of TLS sockets takes away what that thread is reading with.
                socket.socket.shutdown(self.client, socket.SHUT_RD if reset else socket.SHUT_RDWR)
        backend = self._backend
        if backend and backend[1].sock and self.thread is not threading.current_thread():
            with contextlib.suppress(OSError):
                backend[1].sock.shutdown(socket.SHUT_RDWR)
