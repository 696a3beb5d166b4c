"""One child, as the program sees it: started, told what changes, heard, and ended."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from mlflow_outbox import stopwatch
from mlflow_outbox.courtesy import courtesy
from mlflow_outbox.settings import environment_for_child
from mlflow_outbox_worker import interpreter, sockets
from mlflow_outbox_worker.process import line_of

#: What a child says first.
READY: Final = {"ready": "mlflow-outbox"}
#: Seconds in which it must say so; it imports no more than this package for that.
_GREETING: Final = 60.0
#: Seconds between two looks at the environment.
_LOOK: Final = 1.0
#: Seconds between two looks at what the child says. Woken by each message, the thread would want the interpreter at
#: times that nobody knows before (``mlflow_outbox.courtesy``).
_HEED: Final = 1.0
#: The same while calls follow each other so fast that one of them has to give the interpreter away for each look.
_HEED_RARELY: Final = 4.0
#: Seconds for a child that was told to end.
_FAREWELL: Final = 2.0


class NoChild(Exception):
    """Raised when no child can be started here."""


class Child:
    """One child process. It is given time to be there: whether it is what was meant is found by ``messages``.

    Args:
        program: what to start.
        directory: the outbox.
        lock: the descriptor of the outbox's locked lock file.
        more: descriptors that it is given besides.
        note: ``process.note_of`` the outbox.

    Raises:
        NoChild: it cannot be started.
    """

    def __init__(
        self, program: list[str], directory: Path, lock: int, more: tuple[int, ...] = (), note: bytes = b"\n"
    ) -> None:
        if not program[0] or not interpreter.is_there():
            msg = "this program has no Python interpreter that could deliver in a process of its own"
            raise NoChild(msg)
        self._environment = environment_for_child()
        self.connection, theirs = map(sockets.above_streams, socket.socketpair())
        theirs.settimeout(None)  # the program may have set another default, of which the child knows nothing
        sockets.close_in_children(self.connection, theirs)
        self._program = program[0]
        self._note = note
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [*program, str(directory), str(lock)],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=interpreter.standard_error(),
                    env=interpreter.environment(),
                    pass_fds=(lock, *more),
                    start_new_session=True,  # ctrl-C is for the program
                )
        except Exception as error:  # noqa: BLE001 - an audit hook of the program forbids it in its own way; said below
            self.connection.close()
            msg = f"no process can be started for delivery ({error})"
            raise NoChild(msg) from None
        self._buffer = b""
        self._has_greeted = False
        self._greets_until = stopwatch.seconds() + _GREETING

    def begin(self) -> None:
        """Tell the child where to find modules, and what it delivers."""
        self.connection.settimeout(_GREETING)  # it reads when it is there, should all of this not fit into the socket
        self.send(json.dumps(interpreter.entries()).encode() + b"\n" + self._note)

    def send(self, line: bytes) -> None:
        """Tell the child something; one that is gone is noticed by ``messages``."""
        with contextlib.suppress(OSError):
            self.connection.sendall(line)

    def messages(self, stopped: threading.Event) -> Iterator[dict[str, Any]]:
        """Return what the child says until it is gone, and tell it what changes in the environment meanwhile.

        The first message is ``READY``.

        Args:
            stopped: set when the child was told to end; it is given up a while later.

        Raises:
            NoChild: it says something else first, or nothing at all.
        """
        patience = 0
        next_look = stopwatch.seconds()
        self.connection.settimeout(0)
        while patience < _FAREWELL / _LOOK:
            if stopwatch.seconds() >= next_look:
                self._pass_on_environment()
                next_look = stopwatch.seconds() + _LOOK
            if not stopped.is_set() and b"\n" not in self._buffer:
                pause = _HEED_RARELY if self._has_greeted and courtesy.is_used(time.time_ns()) else _HEED
                courtesy.sleeps(pause)
                stopped.wait(pause)
                courtesy.works()
            if stopped.is_set():
                self.connection.settimeout(_LOOK)
                courtesy.waits()
            try:
                line = self._line()
            except BlockingIOError:
                if not self._has_greeted and stopwatch.seconds() >= self._greets_until:
                    break
                continue
            except TimeoutError:
                patience += 1
                continue
            except OSError:
                break
            if not line:
                break
            yield self._message(line)
        if not self._has_greeted and not stopped.is_set():
            raise self._is_another()

    def _message(self, line: bytes) -> dict[str, Any]:
        if self._has_greeted:
            message: dict[str, Any] = json.loads(line)
            return message
        with contextlib.suppress(ValueError):
            self._has_greeted = json.loads(line) == READY
        if not self._has_greeted:
            raise self._is_another()
        return dict(READY)

    def _is_another(self) -> NoChild:
        return NoChild(f"{self._program} does not run as the process that delivers")

    def _line(self) -> bytes:
        while b"\n" not in self._buffer:
            more = self.connection.recv(65536)
            if not more:
                return b""
            self._buffer += more
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _pass_on_environment(self) -> None:
        now, before = environment_for_child(), self._environment
        if now != before:
            self._environment = now
            self.send(line_of(before, now))

    @property
    def end(self) -> str:
        """How it ended, after ``close``."""
        code = self._process.returncode
        return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"

    def close(self) -> None:
        """Let the child end, with whatever it is doing; wait for it a moment."""
        self.connection.close()
        try:
            self._process.wait(_FAREWELL)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
