"""What experiment and child say to each other: frames of four bytes of length (big-endian) and a msgpack array.

The child begins with one ``Answer`` numbered 0, which says that it is there. Then each ``Request`` gets one ``Answer``
of the same number, in any order. The arguments of a request are an array in the order of the method's parameters, and
their types, like those of results, are those that the ``Sink`` protocol states. Paths travel as bytes, because a file
name need not be text.
"""

from __future__ import annotations

import inspect
import os
import socket
import struct
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar, get_type_hints

import msgspec

from mlflow_outbox_worker.sink import FailureKind, Sink, SinkError

T = TypeVar("T")

#: The name under which the sink itself is opened.
OPEN: Final = "open"
#: Bytes; a longer frame is a broken stream, not a message.
_LONGEST: Final = 1 << 30
_LENGTH: Final = struct.Struct(">I")


class Opening(msgspec.Struct, array_like=True, frozen=True):
    """The argument of ``OPEN``: what ``mlflow_sink.open_sink`` takes, and where modules are found."""

    uri: str
    artifact_root: str | None
    timeout: float
    path: list[bytes]


class Opened(msgspec.Struct, array_like=True, frozen=True):
    """The result of ``OPEN``: what ``Sink`` says of itself."""

    deduplicates_metrics: bool
    parallel: bool


class Request(msgspec.Struct, array_like=True, frozen=True):
    """A call of one of the sink's methods.

    Attributes:
        number: chosen by the experiment.
        method: a name in ``METHODS``, or ``OPEN``.
        arguments: an array in msgpack.
        environment: variables that have another value than at the last request; None where there is none any more.
    """

    number: int
    method: str
    arguments: msgspec.Raw
    environment: dict[bytes, bytes | None] = {}


class Failure(msgspec.Struct, array_like=True, frozen=True):
    """A ``SinkError``; or, with another kind, the "destination" or "import" error of opening, or a "crash"."""

    message: str
    kind: str
    status: int | None = None
    code: str = ""
    retry_after: float | None = None
    sent: bool = True


class Answer(msgspec.Struct, array_like=True, frozen=True):
    """What became of a request: a result in msgpack, or a failure."""

    number: int
    result: msgspec.Raw = msgspec.Raw(b"\xc0")
    failure: Failure | None = None


class Method(NamedTuple):
    """One method of ``Sink``: its parameters as a tuple type, and the type of its result."""

    signature: inspect.Signature
    arguments: Any
    result: Any


def _methods() -> dict[str, Method]:
    found = {}
    for name, function in vars(Sink).items():
        if name.startswith("_") or name == "close" or not inspect.isfunction(function):
            continue
        hints = get_type_hints(function)
        result = hints.pop("return")
        bare = inspect.signature(function)
        signature = bare.replace(parameters=list(bare.parameters.values())[1:])
        kinds: Any = tuple(hints[each] for each in signature.parameters)
        found[name] = Method(signature, tuple[kinds], result)
    return found


#: Every request that a sink can make.
METHODS: Final = _methods()


def _plain(value: object) -> bytes:
    if isinstance(value, Path):
        return os.fsencode(value)
    msg = f"{type(value).__name__} has no form here"
    raise NotImplementedError(msg)


_encoder: Final = msgspec.msgpack.Encoder(enc_hook=_plain)


def _rich(kind: type, value: Any) -> Any:
    if issubclass(kind, Path) and isinstance(value, bytes):
        return Path(os.fsdecode(value))
    msg = f"{kind.__name__} has no form here"
    raise NotImplementedError(msg)


def encode(value: object) -> msgspec.Raw:
    """Return arguments or a result in msgpack."""
    return msgspec.Raw(_encoder.encode(value))


def decode(data: bytes | msgspec.Raw, kind: Any) -> Any:
    """Return what ``encode`` was given.

    Args:
        data: msgpack.
        kind: the type it must have.

    Raises:
        msgspec.ValidationError: it is something else.
    """
    return msgspec.msgpack.decode(data, type=kind, dec_hook=_rich)


def failure_of(error: SinkError) -> Failure:
    """Return a ``SinkError`` as it travels."""
    return Failure(str(error), error.kind, error.status, error.code, error.retry_after, error.sent)


def error_of(failure: Failure) -> SinkError:
    """Return the ``SinkError`` that travelled; a crash in the child is a failure of the store, never of an event."""
    kinds: dict[str, FailureKind] = {
        "connection": "connection",
        "timeout": "timeout",
        "answer": "answer",
        "not_mlflow": "not_mlflow",
    }
    if failure.kind not in kinds:
        return SinkError(failure.message, kind="answer", status=500, code="INTERNAL_ERROR")
    return SinkError(
        failure.message,
        kind=kinds[failure.kind],
        status=failure.status,
        code=failure.code,
        retry_after=failure.retry_after,
        sent=failure.sent,
    )


def send(connection: socket.socket, message: Request | Answer) -> None:
    """Write one frame; calls must not overlap.

    Raises:
        OSError: the other side is gone.
    """
    body = _encoder.encode(message)
    connection.sendall(_LENGTH.pack(len(body)) + body)


def receive(connection: socket.socket, kind: type[T]) -> T | None:
    """Read one frame; None when the other side is gone.

    Raises:
        msgspec.MsgspecError: what came is no message.
        OSError: the connection was closed on this side, or its time-out is over.
    """
    head = _exactly(connection, _LENGTH.size)
    if head is None:
        return None
    (length,) = _LENGTH.unpack(head)
    if length > _LONGEST:
        msg = f"a frame of {length} bytes is none"
        raise msgspec.DecodeError(msg)
    body = _exactly(connection, length)
    return None if body is None else msgspec.msgpack.decode(body, type=kind)


def _exactly(connection: socket.socket, count: int) -> bytes | None:
    parts = bytearray(count)
    view = memoryview(parts)
    while view:
        got = connection.recv_into(view)
        if not got:
            return None
        view = view[got:]
    return bytes(parts)
