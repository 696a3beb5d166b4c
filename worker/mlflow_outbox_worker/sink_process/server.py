"""The child's side: opens the sink that it is told to, and makes requests until its socket ends."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import msgspec

from mlflow_outbox.errors import DestinationError
from mlflow_outbox_worker.sink import Sink, SinkError
from mlflow_outbox_worker.sink_process.messages import (
    METHODS,
    OPEN,
    Answer,
    Failure,
    Opened,
    Opening,
    Request,
    decode,
    encode,
    failure_of,
    receive,
    send,
)

#: Requests made at once; the experiment's worker decides how many there are, and has fewer lanes than this.
_THREADS: Final = 64


def serve(connection: socket.socket) -> None:
    """Answer requests until the other side is gone.

    Args:
        connection: the way to the experiment.
    """
    server = _Server(connection)
    # The experiment may be gone at any moment; there is nobody left to tell.
    with contextlib.suppress(OSError, msgspec.MsgspecError), ThreadPoolExecutor(_THREADS) as pool:
        server.answer(Answer(0))
        while (request := receive(connection, Request)) is not None:
            pool.submit(server.take, request)
        os._exit(0)  # without waiting for what is under way


class _Server:
    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._sink: Sink | None = None

    def answer(self, answer: Answer) -> None:
        with self._sending:
            send(self._connection, answer)

    def take(self, request: Request) -> None:
        for name, value in request.environment.items():
            if value is None:
                os.environb.pop(name, None)
            else:
                os.environb[name] = value
        try:
            result = self._open(request) if request.method == OPEN else self._call(request)
            answer = Answer(request.number, result)
        except SinkError as error:
            answer = Answer(request.number, failure=failure_of(error))
        except DestinationError as error:
            answer = Answer(request.number, failure=Failure(str(error), "destination"))
        except ImportError as error:
            answer = Answer(request.number, failure=Failure(f"{type(error).__name__}: {error}", "import"))
        except Exception as error:  # noqa: BLE001 - a mistake of this package; the worker counts, says and retries it
            answer = Answer(request.number, failure=Failure(f"{type(error).__name__}: {error}", "crash"))
        with contextlib.suppress(OSError):  # the experiment is gone
            self.answer(answer)

    def _open(self, request: Request) -> msgspec.Raw:
        opening: Opening = decode(request.arguments, Opening)
        sys.path[:] = [os.fsdecode(entry) for entry in opening.path]
        from mlflow_outbox_worker.mlflow_sink import open_sink  # found on the experiment's path, like mlflow

        self._sink = open_sink(opening.uri, artifact_root=opening.artifact_root, timeout=opening.timeout)
        return encode(Opened(self._sink.deduplicates_metrics, self._sink.parallel))

    def _call(self, request: Request) -> msgspec.Raw:
        method = METHODS[request.method]
        arguments = decode(request.arguments, method.arguments)
        names = method.signature.parameters.values()
        given = zip(names, arguments, strict=True)
        positional, named = [], {}
        for parameter, value in given:
            if parameter.kind is parameter.KEYWORD_ONLY:
                named[parameter.name] = value
            else:
                positional.append(value)
        return encode(getattr(self._sink, request.method)(*positional, **named))
