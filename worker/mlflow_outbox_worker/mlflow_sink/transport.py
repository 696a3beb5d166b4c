"""One HTTP request, made once, within a deadline.

MLflow's ``http_request`` knows how to authenticate: tokens, basic authentication, certificates, signatures, header
plugins. Its transport is not usable here. It retries, it follows redirects, and its timeout is per read, so that a
server that sends one byte a second holds it for hours. So ``http_request`` is used with another transport
underneath, which

* makes one attempt, whatever the server answers, and follows no redirect;
* ends at the deadline: connecting, sending and receiving share it (the resolver of names is left to itself then);
* remembers whether the first byte was sent, because a request that was not cannot have been carried out;
* reads a limited number of bytes of the answer, so that no answer can fill the memory;
* keeps no connection on which the server failed;
* acknowledges what arrives at once. MLflow's server (uvicorn with several workers, whose listening socket asyncio does
  not recognise as one of TCP) sends head and body of an answer apart and leaves Nagle's algorithm on: the body waits
  until the head is acknowledged, which Linux puts off for 40 ms on every request of a connection but the first few.

The transport of MLflow itself stays as it is: ``rebound`` makes a second function of the code of ``http_request``, in
which one global name means something else. Where a future MLflow has no such name, its own transport serves, without
retries, and with a deadline per read only.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import io
import ipaddress
import json
import math
import netrc  # noqa: F401 - requests imports it at the first request, which is made in a thread that must not
import os
import socket
import threading
from collections.abc import Mapping
from typing import IO, Any, NamedTuple

import requests
import requests.adapters
import urllib3
import urllib3.exceptions
from mlflow.exceptions import MlflowException
from mlflow.utils import rest_utils

from mlflow_outbox import stopwatch
from mlflow_outbox.interrupts import forward
from mlflow_outbox_worker.mlflow_sink import credentials, failures, rebound
from mlflow_outbox_worker.sink import SinkError

#: Bytes of an answer after which it is no answer of MLflow; a page of 200 runs with long params stays far below.
MAX_ANSWER_BYTES = 64 * 1024 * 1024
#: The same where a program reads what it likes: the runs of a large experiment, which MLflow asks for in one page, or a
#: trace with files in it.
MAX_READ_BYTES = 1024 * 1024 * 1024
#: Bytes read at once; small, because one read of a compressed answer can grow a thousandfold.
_CHUNK_BYTES = 64 * 1024
#: Connections kept to one server; more may be open, and are closed after use.
_POOL_SIZE = 16
#: Linux's option; other systems have none.
_QUICKACK: int | None = getattr(socket, "TCP_QUICKACK", None)


class Answer(NamedTuple):
    """What the server answered: status, headers, body; the secrets that it was sent; the login that it refused."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    secrets: tuple[str, ...] = ()
    login: str = ""


class _Attempt:
    """One request under way: when it must be over, and whether any byte of it was sent."""

    def __init__(self, seconds: float, stall: float, *, sent: bool) -> None:
        self._deadline = stopwatch.seconds() + seconds
        self._stall = stall
        self.sent = sent

    def remaining(self) -> float:
        """Return the seconds that the next operation on the socket may take."""
        left = self._deadline - stopwatch.seconds()
        if left <= 0:
            msg = "the deadline of the request has passed"
            raise TimeoutError(msg)
        return min(left, self._stall)

    def sending(self, sock: socket.socket) -> None:
        sock.settimeout(self.remaining())
        self.sent = True

    def receiving(self, sock: socket.socket) -> None:
        # A server may be silent after an upload, while it passes the file on: only the deadline counts.
        self._stall = math.inf
        sock.settimeout(self.remaining())
        if _QUICKACK is not None and isinstance(sock, socket.socket):  # the kernel goes back to waiting by itself
            sock.setsockopt(socket.IPPROTO_TCP, _QUICKACK, 1)


_current = threading.local()


def _attempt() -> _Attempt | None:
    return getattr(_current, "attempt", None)


class _Reader(io.RawIOBase):
    """The receiving end of a socket, which asks before each read how long it may take."""

    def __init__(self, sock: socket.socket, attempt: _Attempt) -> None:
        super().__init__()
        self._socket = sock
        self._attempt = attempt
        self._raw = sock.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._attempt.receiving(self._socket)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    """An answer that is the last of its connection when the server failed.

    MLflow's server closes a connection soon after such an answer: the next request on it, of another run perhaps, would
    be lost now and then.
    """

    def begin(self) -> None:
        super().begin()
        if self.status >= 500:  # noqa: PLR2004 - the statuses of servers that fail
            self.will_close = True


def _response(sock: socket.socket, *args: Any, **kwargs: Any) -> http.client.HTTPResponse:
    response = _Response(sock, *args, **kwargs)
    attempt = _attempt()
    if attempt is not None:
        response.fp.close()
        response.fp = io.BufferedReader(_Reader(sock, attempt))
    return response


def _look_up(host: str, port: int, seconds: float) -> list[str]:
    """Return what the resolver finds for a name, which may take it half a minute and more, whatever times a socket has.

    Few resolvers remember: whoever asked once more would wait as long again, where the first server of names is dead.

    Returns:
        Nothing for what is an address itself, or is not found; who connects meets that.

    Raises:
        ConnectTimeoutError: it has not found it in time.
    """
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(host.strip("[]"))
        return []
    over, found = threading.Event(), list[str]()

    def ask() -> None:
        try:
            with contextlib.suppress(OSError, UnicodeError):  # who connects meets it too
                family = urllib3.util.connection.allowed_gai_family()
                held = socket.getaddrinfo(host, port, family, socket.SOCK_STREAM)
                found.extend(dict.fromkeys(str(address[0]) for *_, address in held))
        finally:
            over.set()

    try:
        threading.Thread(target=ask, name="mlflow-outbox-name", daemon=True).start()
    except RuntimeError:  # no threads left, or the interpreter is about to end
        return []
    if not over.wait(seconds):
        msg = f"the address of {host} was not found in time"
        raise urllib3.exceptions.ConnectTimeoutError(msg)
    return found


class _Deadline:
    """What both kinds of connection do about the deadline of the attempt of their thread."""

    response_class = staticmethod(_response)
    sock: Any
    timeout: Any
    port: Any
    _dns_host: str
    _found: tuple[str, ...] = ()

    def connect(self) -> None:
        attempt = _attempt()
        if attempt is not None:
            if not hasattr(self, "_socks_options"):  # such a proxy may be who looks names up
                self._found = tuple(_look_up(self._dns_host, self.port, attempt.remaining()))
            self.timeout = attempt.remaining()
        super().connect()  # type: ignore[misc]  # a mixin of HTTPConnection

    def _new_conn(self) -> Any:
        """Connect to one address after the other that was found for the name, which is kept for the certificate."""
        name, found, self._found = self._dns_host, self._found, ()
        try:
            for address in found[:-1]:
                self._dns_host = address
                with contextlib.suppress(urllib3.exceptions.NewConnectionError, urllib3.exceptions.ConnectTimeoutError):
                    return super()._new_conn()  # type: ignore[misc]  # a mixin of HTTPConnection
            self._dns_host = found[-1] if found else name
            return super()._new_conn()  # type: ignore[misc]  # as above
        finally:
            self._dns_host = name

    def send(self, data: Any) -> None:
        if self.sock is None:
            self.connect()
        attempt = _attempt()
        if attempt is not None:
            attempt.sending(self.sock)
        super().send(data)  # type: ignore[misc]  # a mixin of HTTPConnection


@functools.cache
def _within_deadline(pool: Any) -> Any:
    """Return a class of pools of connections like another one, with connections that keep to the deadline."""
    connection = pool.ConnectionCls
    if issubclass(connection, _Deadline):
        return pool
    kept = type(connection.__name__, (_Deadline, connection), {})
    return type(pool.__name__, (pool,), {"ConnectionCls": kept})


class _Session(requests.Session):
    """Reads no address of a redirect, which is not followed: one that is none would be an error of ours."""

    def get_redirect_target(self, resp: requests.Response) -> None:
        """Return that there is none."""


class _Adapter(requests.adapters.HTTPAdapter):
    """requests' adapter, with connections that keep to the deadline, also through a proxy."""

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        _keep_to_deadline(self.poolmanager)

    def proxy_manager_for(self, *args: Any, **kwargs: Any) -> Any:
        return _keep_to_deadline(super().proxy_manager_for(*args, **kwargs))


def _keep_to_deadline(manager: Any) -> Any:
    # Those of a manager for SOCKS are of its own kind, which leads through the proxy.
    pools = manager.pool_classes_by_scheme
    manager.pool_classes_by_scheme = {scheme: _within_deadline(pool) for scheme, pool in pools.items()}
    return manager


class Transport:
    """Makes requests to one tracking server; safe to use from several threads, and after a fork.

    Args:
        timeout: seconds that one request may take in all.
        reads: a program reads what it likes.
    """

    def __init__(self, timeout: float, *, reads: bool = False) -> None:
        self._timeout = timeout
        self._most = MAX_READ_BYTES if reads else MAX_ANSWER_BYTES
        self._lock = threading.RLock()  # a signal handler may ask through the plugin while its thread does
        self._session: requests.Session | None = None
        self._session_pid = 0
        self._http_request = rebound.http_request_over(self._perform)

    def request(
        self,
        host_creds: Any,
        method: str,
        endpoint: str,
        *,
        allowance: float = 0.0,
        into: IO[bytes] | None = None,
        most: int | None = None,
        **kwargs: Any,
    ) -> Answer:
        """Make one request and return whatever was answered.

        Args:
            host_creds: MLflow's host and credentials.
            method: HTTP method.
            endpoint: path below the host, quoted.
            allowance: seconds that the request may take on top of the timeout, for a file.
            into: takes the body of a success, which is empty in the answer then.
            most: bytes that the body may have; None is what an answer of MLflow has at most.
            **kwargs: what ``http_request`` and ``requests`` take: params, json, data, extra_headers; ``json`` may be
                bytes, which are JSON already.

        Raises:
            SinkError: there was no answer, or one that was too large, or no request could be made.
            ImportError: what is to authenticate it is not installed.
        """
        # Transports that are not ours (the Databricks SDK, a future MLflow) do not tell whether they sent anything.
        secrets = credentials.secrets_of(host_creds)
        unseen = self._http_request is rest_utils.http_request or getattr(host_creds, "use_databricks_sdk", False)
        if unseen and isinstance(kwargs.get("json"), bytes):
            kwargs["json"] = json.loads(kwargs["json"])
        attempt = _Attempt(self._timeout + allowance, self._timeout, sent=unseen)
        _current.attempt = attempt
        try:
            response = self._http_request(
                host_creds,
                endpoint,
                method,
                max_retries=0,
                raise_on_status=False,
                respect_retry_after_header=False,
                retry_timeout_seconds=1,  # for the Databricks SDK, where 0 means its default of minutes
                timeout=self._timeout,
                allow_redirects=False,
                stream=True,
                **kwargs,
            )
            secrets = credentials.with_sent(secrets, response)
            body = _body(response, into, self._most if most is None else most)
            login = credentials.login_of(host_creds) if response.status_code in credentials.REFUSALS else ""
            return Answer(response.status_code, response.headers, body, secrets, login)
        except (MlflowException, requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            forward(error)  # the plugin asks in the program's own thread
            host = str(getattr(host_creds, "host", ""))
            failure = failures.without_answer(error, f"{method} {endpoint}", secrets, host, sent=attempt.sent)
        except (SinkError, ImportError, RecursionError, OverflowError, TypeError):  # the last three: of what is sent
            raise
        except Exception as error:  # what finds credentials may raise anything else, for which no event is to blame
            if isinstance(error, UnicodeError) and credentials.fit_in_a_header(host_creds):
                raise  # of what is sent, too
            forward(error)
            failure = failures.never_made(error, f"{method} {endpoint}", secrets, sent=attempt.sent)
        finally:
            _current.attempt = None
        raise failure

    def close(self) -> None:
        """Close the connections that are kept."""
        with self._lock:
            session, self._session = self._session, None
        if session is not None and self._session_pid == os.getpid():
            session.close()

    def _perform(self, method: str, url: str, *_policy: Any, **kwargs: Any) -> requests.Response:
        taken = {name: kwargs[name] for name in _REQUEST_ARGUMENTS if name in kwargs}
        if isinstance(taken.get("json"), bytes):
            taken["data"] = taken.pop("json")
            taken["headers"] = {"Content-Type": "application/json", **(taken.get("headers") or {})}
        return self._open_session().request(method, url, allow_redirects=False, **taken)

    def _open_session(self) -> requests.Session:
        with self._lock:
            if self._session is None or self._session_pid != os.getpid():
                # Connections are not shared with a parent process: both would read the other's answers.
                self._session = _Session()
                self._session_pid = os.getpid()
                for prefix in ("http://", "https://"):
                    self._session.mount(prefix, _Adapter(max_retries=0, pool_maxsize=_POOL_SIZE))
            return self._session


#: What of the arguments of MLflow's transport is an argument of ``requests``; the rest is about retries.
_REQUEST_ARGUMENTS = ("headers", "verify", "timeout", "cert", "auth", "params", "json", "data", "stream")


def _body(response: requests.Response, into: IO[bytes] | None, most: int) -> bytes:
    if response.raw is None:  # http_request's own answer for what the Databricks SDK raised: there is no stream
        return response.content or b""
    parts: list[bytes] = []
    size = 0
    try:
        for part in response.iter_content(_CHUNK_BYTES):
            size += len(part)
            if size > most:
                msg = f"the answer is larger than {most} bytes, which no answer of MLflow is"
                raise SinkError(msg, kind="not_mlflow", status=response.status_code)
            if into is not None and 200 <= response.status_code < 300:  # noqa: PLR2004 - a success
                into.write(part)
            else:
                parts.append(part)
    except BaseException:  # raised again: the rest of the answer stays unread
        response.close()
        raise
    return b"".join(parts)
