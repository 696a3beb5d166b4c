"""The experiment's side: starts the child, asks it, and starts another when it is gone."""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import os
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, Final, TypeAlias, cast

import msgspec

from mlflow_outbox.counters import Counters
from mlflow_outbox.errors import DestinationError
from mlflow_outbox.settings import environment_for_child
from mlflow_outbox_worker.sink import Sink, SinkError
from mlflow_outbox_worker.sink_process.messages import (
    METHODS,
    OPEN,
    Answer,
    Opened,
    Opening,
    Request,
    decode,
    encode,
    error_of,
    receive,
    send,
)

#: Seconds in which a child must say that it is there; it imports no more than this package for that.
_GREETING: Final = 60.0
#: Seconds for a child to end by itself.
_FAREWELL: Final = 2.0


class NoChild(Exception):
    """Raised when no child can be started here, so that the sink has to live in this process."""


class SinkProcesses:
    """Opens sinks in child processes; a stand-in for ``mlflow_sink.open_sink``.

    Args:
        counters: counts children that could not be started or ended unasked.
        program: what to start, for tests; None is this interpreter with this package's server.
        is_imported: whether this process has mlflow already; a parameter for tests, which have it.
    """

    def __init__(
        self,
        counters: Counters,
        program: list[str] | None = None,
        *,
        is_imported: Callable[[], bool] = lambda: "mlflow" in sys.modules,
    ) -> None:
        self._counters = counters
        self._program = program or [sys.executable or "", "-m", "mlflow_outbox_worker.sink_process"]
        self._is_imported = is_imported

    def __call__(self, uri: str, *, artifact_root: str | None = None, timeout: float = 30.0) -> Sink:
        """Open the tracking store of a URI; arguments and errors are those of ``mlflow_sink.open_sink``."""
        if not self._is_imported():
            try:
                return cast("Sink", ProcessSink(self._start, Opening(uri, artifact_root, timeout, []), self._counters))
            except NoChild as error:
                self._counters.add("sink_processes_not_started")
                self._counters.warn_once(
                    "sink_process", f"mlflow-outbox: {error}; MLflow is imported into this process instead"
                )
        from mlflow_outbox_worker.mlflow_sink import open_sink  # imports nothing of mlflow yet

        return open_sink(uri, artifact_root=artifact_root, timeout=timeout)

    def _start(self) -> Child:
        if not self._program[0] or getattr(sys, "frozen", False):
            msg = "this program has no Python interpreter that could hold MLflow in a process of its own"
            raise NoChild(msg)
        return Child(self._program)


class Child:
    """One child process; calls may come from several threads.

    Args:
        program: what to start.

    Raises:
        NoChild: it cannot be started, or is something else than the server.
    """

    def __init__(self, program: list[str]) -> None:
        self._numbers = itertools.count(1)
        self._sending = threading.Lock()
        self._waiting: dict[int, concurrent.futures.Future[msgspec.Raw]] = {}
        self._gone = ""
        self._environment = dict(os.environb)
        self._connection, theirs = socket.socketpair()
        _connections.add(self._connection)
        # The same modules as here, wherever this program found them, and none of the working directory.
        path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        try:
            with theirs:
                self._process = subprocess.Popen(
                    program,
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    env=environment_for_child(PYTHONPATH=path, PYTHONSAFEPATH="1"),
                    start_new_session=True,  # ctrl-C is for the experiment
                )
        except OSError as error:
            self._connection.close()
            msg = f"no process can be started for MLflow ({error})"
            raise NoChild(msg) from None
        try:
            self._connection.settimeout(_GREETING)
            greeting = receive(self._connection, Answer)
            self._connection.settimeout(None)
        except (OSError, msgspec.MsgspecError):
            greeting = None
        if greeting is None:
            self.end()
            msg = f"{program[0]} does not run as the process that holds MLflow"
            raise NoChild(msg)
        threading.Thread(target=self._listen, name="mlflow-outbox-sink", daemon=True).start()

    def __repr__(self) -> str:
        return f"<Child {self._process.pid}{', gone' if self._gone else ''}>"

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    def is_alive(self) -> bool:
        """Return whether it can be asked."""
        return not self._gone

    def ask(self, method: str, arguments: msgspec.Raw) -> msgspec.Raw:
        """Make a request and return its result; both are what ``messages.encode`` makes.

        Raises:
            SinkError: it failed, or the child ended.
            DestinationError: it was ``OPEN``, of a URI that MLflow has no form for.
            ImportError: it was ``OPEN``, and a package is missing.
        """
        number = next(self._numbers)
        future: concurrent.futures.Future[msgspec.Raw] = concurrent.futures.Future()
        self._waiting[number] = future
        try:
            with self._sending:
                send(self._connection, Request(number, method, arguments, self._changed_environment()))
        except OSError:
            self._lost("its socket is closed")
        if self._gone:
            self._waiting.pop(number, None)
            if not future.done():
                raise _lost_error(self._gone)
        return future.result()

    def end(self) -> None:
        """Let the child end, with whatever it is doing; wait for it a moment."""
        self._lost("it was told to end")
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()
        try:
            self._process.wait(_FAREWELL)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _changed_environment(self) -> dict[bytes, bytes | None]:
        now = dict(os.environb)
        before, self._environment = self._environment, now
        if now == before:
            return {}
        changed: dict[bytes, bytes | None] = {name: None for name in before if name not in now}
        changed.update({name: value for name, value in now.items() if before.get(name) != value})
        return changed

    def _listen(self) -> None:
        reason = ""
        try:
            while (answer := receive(self._connection, Answer)) is not None:
                future = self._waiting.pop(answer.number, None)
                if future is None:
                    continue
                if answer.failure is None:
                    future.set_result(answer.result)
                elif answer.failure.kind == "destination":
                    future.set_exception(DestinationError(answer.failure.message))
                elif answer.failure.kind == "import":
                    future.set_exception(ImportError(answer.failure.message))
                else:
                    future.set_exception(error_of(answer.failure))
        except (OSError, msgspec.MsgspecError) as error:
            reason = str(error)
        if not self._gone:
            with contextlib.suppress(subprocess.TimeoutExpired):
                reason = reason or f"exit code {self._process.wait(_FAREWELL)}"
        self._lost(reason or "its socket is closed")

    def _lost(self, reason: str) -> None:
        self._gone = self._gone or reason
        while self._waiting:
            with contextlib.suppress(KeyError):
                _, future = self._waiting.popitem()
                if not future.done():
                    future.set_exception(_lost_error(self._gone))


def _lost_error(reason: str) -> SinkError:
    return SinkError(f"the process that holds MLflow ended ({reason})", kind="connection", sent=True)


StartChild: TypeAlias = Callable[[], Child]


class ProcessSink:
    """A ``Sink`` whose requests are made by a child process; see ``Sink`` for its methods.

    Args:
        start: starts a child.
        opening: which store the child opens.
        counters: counts children that ended unasked.

    Raises:
        NoChild: no child can be started.
        SinkError, DestinationError, ImportError: as for ``mlflow_sink.open_sink``.
    """

    def __init__(self, start: StartChild, opening: Opening, counters: Counters) -> None:
        self._start = start
        self._opening = opening
        self._counters = counters
        self._lock = threading.Lock()
        self._closed = False
        self._child, opened = self._opened()
        self.deduplicates_metrics = opened.deduplicates_metrics
        self.parallel = opened.parallel

    def __repr__(self) -> str:
        return f"<ProcessSink in {self._child!r}>"

    def __getattr__(self, name: str) -> Any:
        method = METHODS.get(name)
        if method is None:
            msg = f"{type(self).__name__} has no {name}"
            raise AttributeError(msg)

        def call(*args: Any, **kwargs: Any) -> Any:
            bound = method.signature.bind(*args, **kwargs)
            try:
                body = encode(list(bound.arguments.values()))
            except (ValueError, OverflowError) as error:
                # Only the content of a request can make its encoding fail, for instance text that is no Unicode.
                raise SinkError(
                    str(error), kind="answer", status=HTTPStatus.BAD_REQUEST, code="INVALID_PARAMETER_VALUE"
                ) from None
            return decode(self._living().ask(name, body), method.result)

        return call

    @property
    def pid(self) -> int:
        """The process id of the child that was started last."""
        return self._child.pid

    def close(self) -> None:
        """End the child."""
        with self._lock:
            self._closed = True
            self._child.end()

    def _living(self) -> Child:
        with self._lock:
            if not self._closed and not self._child.is_alive():
                self._counters.add("sink_processes_lost")
                self._child.end()
                try:
                    self._child, _ = self._opened()
                except (NoChild, DestinationError, ImportError) as error:
                    # It was opened before, so this is a matter of time, not of the destination.
                    raise SinkError(str(error), kind="connection", sent=False) from None
            return self._child

    def _opened(self) -> tuple[Child, Opened]:
        child = self._start()
        try:
            opening = msgspec.structs.replace(self._opening, path=[os.fsencode(entry) for entry in sys.path])
            return child, decode(child.ask(OPEN, encode(opening)), Opened)
        except BaseException:  # raised again: nobody would know of the child
            child.end()
            raise


#: Sockets of this process. A forked child that kept one would keep the process at its other end alive.
_connections: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for connection in list(_connections):
        connection.close()


os.register_at_fork(after_in_child=_after_fork_in_child)
