"""The store of a tracking server: MLflow's RestStore with one attempt per request and a judgement by HTTP status.

MLflow's classes build and parse the messages. That matters: a server answers 200 to malformed JSON and stores part
of it, so nothing but protobuf may write a request. One exception is made, for the request that nearly all are: a batch
of a server's own REST interface is written by msgspec from typed structs, which takes a thirtieth of the time (18 ms of
a thousand points, during which the experiment's own threads wait). A batch with a value that JSON has no number for
(NaN, infinities) goes the long way. A test compares both ways.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import unquote, urlsplit, urlunsplit

import msgspec
from google.protobuf.json_format import ParseError  # type: ignore[import-untyped]  # no stubs in the package
from mlflow.entities import Metric, Param, RunTag
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, ErrorCode
from mlflow.protos.service_pb2 import LogBatch
from mlflow.store.tracking.databricks_rest_store import DatabricksTracingRestStore
from mlflow.store.tracking.rest_store import RestStore
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.proto_json_utils import parse_dict

from mlflow_outbox_worker.mlflow_sink import credentials
from mlflow_outbox_worker.mlflow_sink.boundary import OF_A_TEXT, Refused, clean
from mlflow_outbox_worker.mlflow_sink.transport import Answer, Transport
from mlflow_outbox_worker.mlflow_sink.workspace import WorkspaceTransport
from mlflow_outbox_worker.retry import parse_retry_after
from mlflow_outbox_worker.sink import MetricPoint, SinkError

#: Where a server says whether it has workspaces; the first that had them knows the second alone.
_SERVER_INFO: Final = ("/api/3.0/mlflow/server-info", "/api/3.0/mlflow/server-features")
#: Statuses that proxies and load balancers give on a server's behalf, with any body.
_ANYBODYS_STATUSES = frozenset({401, 403, 407, 408, 413, 425, 429})
#: What MLflow's server (since 3.5) says who is asked by a name that it was not told, whatever the login.
_OTHER_HOST = "Invalid Host header"
_ALLOW_HOST = "the server has to be told of this host name, by --allowed-hosts or MLFLOW_SERVER_ALLOWED_HOSTS"
#: How what SQLAlchemy says of a database's errors ends where they are about no content: a connection, a pool without
#: one, a deadlock, a transaction that may only read, as after a failover. MLflow's server answers all but operational
#: errors with 400, as it does where a row is refused.
_OF_THE_DATABASE: Final = re.compile(r"sqlalche\.me/e/\w+/(?:rvf5|4xp6|e3q8|2j85|dbapi|3o7r|8s2b)\)\s*\Z")
#: What drivers of MySQL say in the same way, mysqlclient as an operational error, since MySQL gives it no state: a text
#: that a column or its collation cannot hold, such as an emoji where it is not utf8mb4. No later moment changes that.
_OF_A_TEXT: Final = re.compile(r"\([\w.]+\.(?:DatabaseError|OperationalError)\) " + OF_A_TEXT.pattern)


def checked(answer: Answer, what: str, *, empty_is_success: bool = False) -> dict[str, Any]:
    """Return the JSON object of a successful answer.

    Args:
        answer: what the server answered.
        what: method and endpoint, for messages.
        empty_is_success: take a success without a body for one; MLflow answers so to an upload, and to nothing else.

    Raises:
        SinkError: it was not MLflow that answered.
        Refused: MLflow, or a proxy on its behalf, said no.
    """
    status, headers, body, secrets, login = answer
    found = _json_object(body)
    if 200 <= status < 300:  # noqa: PLR2004 - success
        if not body and not ("Content-Length" in headers or "Transfer-Encoding" in headers):
            msg = f"{what}: the answer was cut off"
            raise SinkError(msg, kind="connection", status=status)
        if found is None and empty_is_success and not body:
            return {}
        if found is None:
            msg = (
                f"{what}: the answer is not MLflow's (a login page, a proxy or a wrong URL?): {_excerpt(body, secrets)}"
            )
            raise SinkError(msg, kind="not_mlflow", status=status)
        return found
    if 300 <= status < 400:  # noqa: PLR2004 - redirects
        msg = (
            f"{what}: the server redirects ({status}) to {_place(headers, secrets)}, which is not followed: it wants a "
            "login, or the tracking URI has to be that address (mlflow-outbox replay DIR --to URI sends what waits)"
        )
        raise SinkError(msg, kind="not_mlflow", status=status)
    code = str((found or {}).get("error_code", ""))
    text = str(found["message"]) if found and "message" in found else _excerpt(body, secrets)
    if code == str(status):  # a gateway's words in JSON, as those of Databricks' about a token, and none of MLflow's
        code, found = "", None
    message = clean(f"{what}: {status} {code}: {text}" if code else f"{what}: {status}: {text}", secrets)
    if status == 403 and _OTHER_HOST in text:  # noqa: PLR2004 - forbidden
        login = _ALLOW_HOST
    if status < 500 and not _is_mlflows(status, code, found):  # noqa: PLR2004 - server errors come from anybody
        code = code or ("ENDPOINT_NOT_FOUND" if status == 404 else "")  # noqa: PLR2004 - not found
        raise SinkError(message, kind="not_mlflow", status=status, code=code, login=login)
    if code == "BAD_REQUEST" and _OF_THE_DATABASE.search(text) and not _OF_A_TEXT.search(text):
        status, code = HTTPStatus.SERVICE_UNAVAILABLE, "TEMPORARILY_UNAVAILABLE"  # as ``boundary`` has it
    elif code == "TEMPORARILY_UNAVAILABLE" and _OF_A_TEXT.search(text):
        status, code = HTTPStatus.BAD_REQUEST, "BAD_REQUEST"
    wait = _retry_after(headers)
    raise refused(SinkError(message, kind="answer", status=status, code=code, retry_after=wait, login=login))


def refused(error: SinkError) -> Refused:
    """Return the exception that MLflow's stores understand for an answer that said no."""
    known = error.code in ErrorCode.keys()  # noqa: SIM118 - a protobuf enum, not a dict
    return Refused(error, ErrorCode.Value(error.code) if known else INTERNAL_ERROR)


class _OneAttempt:
    """Replaces how MLflow's stores call a server."""

    transport: Transport
    _has_workspaces = False

    @property
    def supports_workspaces(self) -> bool:
        """Whether the server has workspaces; asked like all else, until it has.

        MLflow's own question says of a 404, as a proxy gives while a server is deployed anew, that a parameter is
        wrong, and of a refused login that it passes. The first would be the fault of the events.
        """
        if self._has_workspaces:
            return True
        store: Any = self
        for path in _SERVER_INFO:
            answer = self.transport.request(store.get_host_creds(), "GET", path)
            if answer.status != HTTPStatus.NOT_FOUND:
                self._has_workspaces = bool(checked(answer, f"GET {path}").get("workspaces_enabled"))
                return self._has_workspaces
        msg = f"GET {_SERVER_INFO[0]}: 404: the server is none of MLflow's, or is older than workspaces"
        raise SinkError(msg, kind="not_mlflow", status=HTTPStatus.NOT_FOUND, code="ENDPOINT_NOT_FOUND")

    def _call_endpoint(
        self,
        api: Any,
        json_body: str | bytes | None = None,
        endpoint: str | None = None,
        retry_timeout_seconds: float | None = None,  # noqa: ARG002 - MLflow's signature
        response_proto: Any = None,
    ) -> Any:
        store: Any = self
        endpoints = store._V3_METHOD_TO_INFO if api in store._V3_APIS else store._METHOD_TO_INFO  # noqa: SLF001 - its own tables
        if isinstance(self.transport, WorkspaceTransport):
            self.transport.check_support(store)
        elif hasattr(store, "_validate_workspace_support_if_specified"):  # MLflow with workspaces
            store._validate_workspace_support_if_specified()  # noqa: SLF001 - as the method replaced here does
        path, method = endpoints[api]
        path = endpoint or path
        # Bytes are passed on as they are.
        content = json.loads(json_body) if isinstance(json_body, str) else json_body
        arguments: dict[str, Any] = {"params" if method == "GET" else "json": content}
        answer = self.transport.request(store.get_host_creds(), method, path, **arguments)
        message = response_proto if response_proto is not None else api.Response()
        what = f"{method} {path}"
        try:
            parse_dict(js_dict=checked(answer, what), message=message)
        except ParseError as error:
            msg = f"{what}: the answer is not MLflow's: {clean(error, answer.secrets)}"
            raise SinkError(msg, kind="not_mlflow", status=answer.status) from None
        return message


class ServerStore(_OneAttempt, RestStore):  # type: ignore[misc]  # mlflow is not followed by mypy
    """The store of ``http(s)://``."""

    def __init__(self, get_host_creds: Callable[[], Any], transport: Transport) -> None:
        super().__init__(get_host_creds)
        self.transport = transport

    def send_batch(
        self, run_id: str, points: Sequence[MetricPoint], params: Mapping[str, str], tags: Mapping[str, str]
    ) -> None:
        """Do what ``log_batch`` does, with little work for each point."""
        body = _encode(
            _LogBatch(
                run_id,
                [_Point(key, value, time_ms, step) for key, value, time_ms, step in points],
                [_Label(key, value) for key, value in params.items()],
                [_Label(key, value) for key, value in tags.items()],
            )
        )
        if b'"value":null' in body:  # what msgspec makes of NaN and infinities
            self.log_batch(
                run_id,
                metrics=[Metric(point.key, point.value, point.time_ms, point.step) for point in points],
                params=[Param(key, value) for key, value in params.items()],
                tags=[RunTag(key, value) for key, value in tags.items()],
            )
        else:
            self._call_endpoint(LogBatch, body)


class _Point(msgspec.Struct, gc=False):
    key: str
    value: float
    timestamp: int
    step: int


class _Label(msgspec.Struct, gc=False):
    key: str
    value: str


class _LogBatch(msgspec.Struct, omit_defaults=True):
    """The JSON of MLflow's LogBatch message: names and types of service.proto, empty lists left out."""

    run_id: str
    metrics: list[_Point] = []
    params: list[_Label] = []
    tags: list[_Label] = []


_encode = msgspec.json.Encoder().encode


class DatabricksStore(_OneAttempt, DatabricksTracingRestStore):  # type: ignore[misc]  # mlflow is not followed by mypy
    """The store of ``databricks``; the Databricks SDK makes its requests."""

    def __init__(self, get_host_creds: Callable[[], Any], transport: Transport) -> None:
        super().__init__(get_host_creds)
        self.transport = transport


class Host:
    """A tracking server's address without credentials, and what authenticates a request to it.

    Credentials are looked up for each request, as MLflow does, so that a renewed token is used at once.
    """

    def __init__(self, uri: str, username: str | None = None, password: str | None = None) -> None:
        parts = urlsplit(uri)
        self.netloc = parts.netloc.rpartition("@")[2]
        self.uri = urlunsplit((parts.scheme, self.netloc, parts.path, "", "")).rstrip("/")
        self._username = username or unquote(parts.username or "") or None
        self._password = password if username else unquote(parts.password or "") or None

    def __repr__(self) -> str:
        return f"<Host {self.uri}>"

    @property
    def credentials(self) -> tuple[str, str] | None:
        """User name and password given with the address; None when MLflow's own sources have them."""
        return (self._username, self._password or "") if self._username else None

    def host_creds(self, uri: str | None = None) -> Any:
        """Return MLflow's credentials for a URL; those given with the address go to no other host."""
        creds = credentials.found(lambda: get_default_host_creds(uri or self.uri))
        if self.credentials and (uri is None or urlsplit(uri).netloc == self.netloc):
            creds.username, creds.password = self.credentials
        return creds


def _is_mlflows(status: int, code: str, found: dict[str, Any] | None) -> bool:
    if status in _ANYBODYS_STATUSES or code:
        return True
    # Without MLflow's code, a 404 means a URL that the server does not know; other refusals in JSON may be a
    # gateway's verdict.
    return found is not None and status != 404  # noqa: PLR2004 - not found


def _json_object(body: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _excerpt(body: bytes, secrets: tuple[str, ...]) -> str:
    return clean(body[:2000].decode("utf-8", "replace"), secrets)[:200]


def _place(headers: Mapping[str, str], secrets: tuple[str, ...]) -> str:
    """Return which host a redirect leads to; its path and query may hold more than is to be told."""
    try:
        parts = urlsplit(headers.get("Location") or "")
    except ValueError:  # what is no address must not be taken for the fault of the events
        return "what is no address"
    host = clean(f"{parts.scheme}://{parts.netloc}", secrets)
    return host if parts.scheme and parts.netloc else "a page of its own"


def _retry_after(headers: Any) -> float | None:
    value = headers.get("Retry-After")
    if value is None:
        return None
    # A date is relative to the clock of the server that wrote it.
    age = parse_retry_after(headers.get("Date"), 0.0)
    return parse_retry_after(value, time.time() if age is None else age)
