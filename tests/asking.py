"""Asks a server through a ``FaultProxy``, one request on a connection of its own, as tests of the proxy do."""

from __future__ import annotations

import http.client
import json
import ssl
from contextlib import closing
from urllib.parse import urlsplit

from certificates import Authority
from mlflow_outbox.testing.proxy import FaultProxy

HEALTH = "/health"
CREATE = "/api/2.0/mlflow/experiments/create"


def connect(proxy: FaultProxy) -> http.client.HTTPConnection:
    """Open a keep-alive connection to the proxy."""
    parts = urlsplit(proxy.url)
    return http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=20)


def ask(proxy: FaultProxy, method: str = "GET", path: str = HEALTH, body: object = None) -> tuple[int, bytes]:
    """Send one request on a connection of its own; return the status and the body of the answer."""
    with closing(connect(proxy)) as connection:
        data = None if body is None else json.dumps(body)
        connection.request(method, path, data, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()


def ask_in_vain(proxy: FaultProxy, failures: list[type[ConnectionError]]) -> None:
    """Send a request that ends in an error, from a thread of its own, and note the error."""
    try:
        ask(proxy)
    except ConnectionError as error:
        failures.append(type(error))


def ask_safely(proxy: FaultProxy, authority: Authority) -> int:
    """Send one request through TLS, trusting one authority; return the status of the answer."""
    context = ssl.create_default_context(cafile=str(authority.path))
    port = urlsplit(proxy.url).port
    with closing(http.client.HTTPSConnection("localhost", port, timeout=20, context=context)) as connection:
        connection.request("GET", HEALTH)
        return connection.getresponse().status


def fail_safely(proxy: FaultProxy, authority: Authority, failures: list[OSError]) -> None:
    """Send a request through TLS that ends in an error, from a thread of its own, and note the error."""
    try:
        ask_safely(proxy, authority)
    except OSError as error:
        failures.append(error)
