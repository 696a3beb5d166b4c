"""What a request means that got no answer, or could not be made: the ``SinkError`` that stands for what was raised."""

from __future__ import annotations

import traceback
from typing import Any, Final

import requests
import urllib3.exceptions

from mlflow_outbox_worker.mlflow_sink.boundary import clean
from mlflow_outbox_worker.sink import SinkError


def without_answer(error: BaseException, what: str, secrets: tuple[str, ...], host: str, *, sent: bool) -> SinkError:
    """Return the SinkError of a request without an answer; http_request hides the cause in its chain.

    Args:
        error: what was raised.
        what: method and endpoint, for messages.
        secrets: what must not be in them.
        host: the server's address.
        sent: whether a byte of the request was sent.
    """
    chain = list(_chain(error))
    innermost = _innermost(chain)
    text = f"{what}: {_NO_PROXY if _is_about_a_proxy(innermost, host) else clean(innermost, secrets)}"
    for cause in chain:
        if isinstance(cause, (requests.exceptions.SSLError, urllib3.exceptions.SSLError)) and not _cut_off(chain):
            return SinkError(text, kind="connection", code="TLS", sent=sent)
        if isinstance(cause, _MALFORMED):
            return SinkError(text, kind="not_mlflow", sent=sent)
    if any(isinstance(cause, urllib3.exceptions.NewConnectionError) for cause in chain):
        return SinkError(text, kind="connection", sent=False)  # refused, no route, no such name; not a time-out
    if any(isinstance(cause, requests.exceptions.ConnectTimeout) for cause in chain):
        sent = False
    if any(isinstance(cause, _TIMEOUTS) for cause in chain):
        return SinkError(text, kind="timeout", sent=sent)
    if any(isinstance(cause, (requests.RequestException, urllib3.exceptions.HTTPError, OSError)) for cause in chain):
        return SinkError(text, kind="connection", sent=sent)
    if any(isinstance(cause, KeyError) and isinstance(next(iter(cause.args), None), bytes) for cause in chain):
        # Only the environment has such keys. requests reads all of it when it looks for proxies, and another thread
        # took a variable away in that moment.
        return SinkError(f"{what}: the environment changed while it was read", kind="connection", sent=sent)
    # http_request refused to make the request, for instance because a plugin for authentication is missing.
    return SinkError(text, kind="not_mlflow", sent=False)


def never_made(error: Exception, what: str, secrets: tuple[str, ...], *, sent: bool) -> SinkError:
    """Return the SinkError of a request that could not be made, as what finds its credentials has raised something.

    A tool that renews a token says in this way that a secret has expired or that its own server is away, MLflow that a
    variable of the environment is none. Taken for what it is elsewhere, a ValueError or an answer with status 400, it
    would be the fault of the events in the request, and each of them a dead letter.

    Args:
        error: what was raised.
        what: method and endpoint, for messages.
        secrets: what must not be in them.
        sent: whether a byte of the request may have been sent.
    """
    text = f"{what}: {type(error).__name__}: {clean(error, secrets)}"
    return SinkError(text, kind="not_mlflow" if isinstance(error, ValueError) else "connection", sent=sent)


def _is_about_a_proxy(error: BaseException, host: str) -> bool:
    """Return whether an address is none that is not the server's, which was checked: what is said shows a password."""
    if isinstance(error, urllib3.exceptions.LocationParseError):
        return str(error.location) not in host
    frames = [frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__)]
    of_urlsplit = type(error) is ValueError and frames[-1:] == ["urllib.parse"]
    return of_urlsplit or isinstance(error, requests.exceptions.InvalidProxyURL)


_NO_PROXY: Final = (
    "the address of a proxy (HTTP_PROXY, HTTPS_PROXY or ALL_PROXY) is none; write special characters of its user and "
    "password as %XX"
)
_TIMEOUTS = (TimeoutError, requests.exceptions.Timeout, urllib3.exceptions.TimeoutError)
_MALFORMED = (
    requests.exceptions.InvalidURL,
    requests.exceptions.InvalidSchema,
    requests.exceptions.InvalidHeader,
    requests.exceptions.ContentDecodingError,
)


def _chain(error: BaseException | None) -> Any:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        reason = getattr(error, "reason", None)
        if isinstance(reason, BaseException):
            yield from _chain(reason)
        error = error.__cause__ or error.__context__


def _innermost(chain: list[BaseException]) -> BaseException:
    # The first one below requests names host and reason; those further down are bare socket errors.
    for cause in chain:
        if isinstance(cause, (urllib3.exceptions.NewConnectionError, urllib3.exceptions.ReadTimeoutError)):
            return cause
    return chain[-1]


def _cut_off(chain: list[BaseException]) -> bool:
    """Return whether a TLS failure is only a connection that broke: the peer may be restarting."""
    return any("EOF" in str(cause) or isinstance(cause, ConnectionError) for cause in chain)
