"""What a ``FaultProxy`` can do with a request: the actions, each named after what the client experiences.

Times are seconds and sizes bytes. An action that waits ends at once when its proxy goes down.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

from mlflow_outbox.testing.proxy import Action, Exchange
from mlflow_outbox.testing.wire import Answer

#: What the login page of a company's or a hotel's network looks like to a program.
PORTAL = b"<!doctype html><html><head><title>Sign in</title></head><body><form method=post></form></body></html>"


def forward() -> Action:
    """Pass the request on and the answer back: no fault."""
    return Action("forward", Exchange.forward)


def delay(seconds: float, then: Action | None = None) -> Action:
    """Wait before anything happens.

    Args:
        seconds: how long.
        then: what happens afterwards; None means forward.
    """

    def run(exchange: Exchange) -> None:
        if exchange.wait(seconds):
            (then or forward()).run(exchange)

    return Action(f"delay({seconds})", run)


def drop() -> Action:
    """Close the connection without an answer; the server behind never sees the request."""
    return Action("drop", Exchange.close)


def refuse() -> Action:
    """Go down: reset this and all other connections and refuse new ones until the proxy's ``up()``."""
    return Action("refuse", lambda exchange: exchange.proxy.down())


def accept_hang() -> Action:
    """Take the request and never answer; the server behind never sees it."""
    return Action("accept_hang", Exchange.hang)


def forward_then_hang() -> Action:
    """Let the server behind carry the request out, and never answer."""

    def run(exchange: Exchange) -> None:
        exchange.fetch()
        exchange.hang()

    return Action("forward_then_hang", run)


def forward_then_drop_response() -> Action:
    """Let the server behind carry the request out, and close the connection without an answer."""

    def run(exchange: Exchange) -> None:
        exchange.fetch()
        exchange.close()

    return Action("forward_then_drop_response", run)


def rst_after(size: int) -> Action:
    """Let the server behind carry the request out, send the first bytes of its answer and reset the connection.

    Args:
        size: bytes of the answer that are sent, the head included; 0 resets before the first.
    """

    def run(exchange: Exchange) -> None:
        answer = exchange.fetch()
        if answer is not None and size:
            exchange.send(answer, upto=size)
        exchange.reset()

    return Action(f"rst_after({size})", run)


def rst_request_after(size: int) -> Action:
    """Reset the connection while the request is on its way; the server behind never sees it.

    Args:
        size: bytes of the request's body that are taken.
    """
    return Action(f"rst_request_after({size})", Exchange.reset, reads=size)


def forward_then_truncate_body(keep: int | None = None) -> Action:
    """Let the server behind carry the request out, and close in the middle of the body of its answer.

    Args:
        keep: bytes of the body that are sent; None means half. The Content-Length announces all.
    """

    def run(exchange: Exchange) -> None:
        answer = exchange.fetch()
        if answer is not None:
            whole = len(answer.encode())
            missing = len(answer.body) - (len(answer.body) // 2 if keep is None else min(keep, len(answer.body)))
            exchange.send(answer, upto=whole - missing)
        exchange.close()

    return Action("forward_then_truncate_body", run)


def drip(rate: float) -> Action:
    """Forward, and send the answer back slowly, from the first byte of its head on.

    Args:
        rate: bytes per second.
    """

    def run(exchange: Exchange) -> None:
        answer = exchange.fetch()
        if answer is None:
            exchange.reset()
            return
        step = max(1, int(rate / 20))
        data = answer.encode(head_only=exchange.request.method == "HEAD")
        exchange.send(answer, upto=step)
        for start in range(step, len(data), step):
            if not exchange.wait(step / rate):
                return
            exchange.send_bytes(data[start : start + step])

    return Action(f"drip({rate})", run)


def status(code: int, headers: Mapping[str, str] | None = None, body: bytes | str = b"") -> Action:
    """Answer in place of the server behind, which never sees the request.

    Args:
        code: the HTTP status.
        headers: headers of the answer, a Content-Length of your own included.
        body: its body.
    """
    answer = Answer(code, tuple((headers or {}).items()), body.encode() if isinstance(body, str) else body)
    return Action(f"status({code})", _sends(answer))


def html_page(body: bytes = PORTAL) -> Action:
    """Answer with status 200 and a web page, as captive portals and login pages do.

    Args:
        body: the page.
    """
    return Action("html_page", _sends(Answer(200, (("Content-Type", "text/html; charset=utf-8"),), body)))


def redirect(location: str, code: int = 302) -> Action:
    """Answer with a redirect.

    Args:
        location: where to; an address without a path, such as ``http://other``, gets the request's.
        code: the HTTP status.
    """

    def run(exchange: Exchange) -> None:
        target = location if urlsplit(location).path else location + exchange.request.path
        exchange.send(Answer(code, (("Location", target),)))

    return Action(f"redirect({location})", run)


def gzip_bomb(size: int) -> Action:
    """Answer with status 200 and a small body that unpacks to a large one.

    Args:
        size: bytes of the unpacked body.
    """
    headers = (("Content-Type", "application/json"), ("Content-Encoding", "gzip"))
    return Action(f"gzip_bomb({size})", _sends(Answer(200, headers, gzip.compress(bytes(size)))))


def garbage(data: bytes = b"\x16\x03\x01 this is not HTTP\r\n\r\n") -> Action:
    """Answer with bytes that are no HTTP, and close the connection.

    Args:
        data: the bytes.
    """

    def run(exchange: Exchange) -> None:
        exchange.send_bytes(data)
        exchange.close()

    return Action("garbage", run)


def swap_backend(url: str) -> Action:
    """Forward this and all later requests to another server, as after a restore or a move.

    Args:
        url: address of the other server.
    """

    def run(exchange: Exchange) -> None:
        exchange.proxy.backend = url
        exchange.forward()

    return Action("swap_backend", run)


def _sends(answer: Answer) -> Callable[[Exchange], None]:
    return lambda exchange: exchange.send(answer)
