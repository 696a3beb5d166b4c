"""HTTP messages as a ``FaultProxy`` sees them: complete in memory, headers in their order and spelling."""

from __future__ import annotations

import dataclasses
import http.client
import io

Headers = tuple[tuple[str, str], ...]

#: Headers that belong to one connection and not to the message (RFC 9110, 7.6.1), and the length, which is set anew.
_OF_CONNECTION = frozenset(
    {"connection", "content-length", "keep-alive", "proxy-connection", "te", "transfer-encoding"}
)


@dataclasses.dataclass(frozen=True)
class Request:
    """One request that reached the proxy; headers and body stay out of ``repr``, for they can hold secrets."""

    #: Position among all requests of this proxy, from 0.
    ordinal: int
    method: str
    #: The target as sent, with the query.
    path: str
    headers: Headers = dataclasses.field(repr=False)
    body: bytes = dataclasses.field(default=b"", repr=False)
    #: What the server behind answered; None when it was not asked or did not answer.
    backend_status: int | None = None
    #: What was sent to the client, wholly or in part; None when nothing was.
    status: int | None = None
    #: Name of the action that it got.
    action: str = ""
    #: When it was there and its action began, and when that was over or the client had gone; by the monotonic clock.
    #: The client can have the whole answer, and even ask again, a moment before the end is noted.
    arrived: float = 0.0
    ended: float | None = None

    def header(self, name: str) -> str | None:
        """Return the first header of that name, in any case of letters."""
        return next((value for key, value in self.headers if key.lower() == name.lower()), None)


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer to a request."""

    status: int
    headers: Headers = ()
    body: bytes = b""

    def encode(self, *, head_only: bool = False) -> bytes:
        """Return the bytes on the wire, with a Content-Length unless there is one already.

        Args:
            head_only: leave the body out, as the answer to a HEAD request must.
        """
        reason = http.client.responses.get(self.status, "Unknown")
        lines = [f"HTTP/1.1 {self.status} {reason}", *(f"{name}: {value}" for name, value in self.headers)]
        if not any(name.lower() == "content-length" for name, _ in self.headers):
            lines.append(f"Content-Length: {len(self.body)}")
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + (b"" if head_only else self.body)


def end_to_end(headers: Headers) -> Headers:
    """Return the headers that a proxy passes on."""
    return tuple((name, value) for name, value in headers if name.lower() not in _OF_CONNECTION)


def read_body(stream: io.BufferedReader, headers: Headers, limit: int | None = None) -> bytes:
    """Read the body of a request whose head has been read.

    Args:
        stream: the connection.
        headers: the request's headers, which say how the body ends.
        limit: bytes to read at most; None means the whole body.

    Raises:
        ValueError: the headers or the chunks contradict HTTP, or the body ends too early.
    """
    named = {name.lower(): value for name, value in headers}
    if "chunked" not in named.get("transfer-encoding", "").lower():
        length = int(named.get("content-length", "0"))
        wanted = length if limit is None else min(length, limit)
        body = stream.read(wanted)
        if len(body) < wanted:  # the server behind would take what there is for the whole
            msg = "the client went away in the middle of a request"
            raise ValueError(msg)
        return body
    body = b""
    while limit is None or len(body) < limit:
        size = int(stream.readline().split(b";")[0], 16)
        if size == 0:
            http.client.parse_headers(stream)  # trailers
            break
        body += stream.read(size)
        stream.readline()
    return body[:limit]
