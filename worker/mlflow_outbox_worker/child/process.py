"""One child, as the program sees it: started, told what changes, heard, and ended."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from mlflow_outbox import stopwatch
from mlflow_outbox.courtesy import courtesy
from mlflow_outbox.settings import environment_for_child
from mlflow_outbox_worker import interpreter, sockets

#: What a child says first.
READY: Final = {"ready": "mlflow-outbox"}
#: Seconds in which it must say so; it imports no more than this package for that.
_GREETING: Final = 60.0
#: Seconds between two looks at the environment.
_LOOK: Final = 1.0
#: Seconds between two looks at what the child says. Woken by each message, the thread would want the interpreter at
#: times that nobody knows before (``mlflow_outbox.courtesy``).
_HEED: Final = 1.0
#: Seconds for a child that was told to end.
_FAREWELL: Final = 2.0


class NoChild(Exception):
    """Raised when no child can be started here."""


class Child:
    """One child process.

    Args:
        program: what to start.
        directory: the outbox.
        lock: the descriptor of the outbox's locked lock file.
        more: descriptors that it is given besides.

    Raises:
        NoChild: it cannot be started, or is something else than this module.
    """

    def __init__(self, program: list[str], directory: Path, lock: int, more: tuple[int, ...] = ()) -> None:
        if not program[0] or not interpreter.is_there():
            msg = "this program has no Python interpreter that could deliver in a process of its own"
            raise NoChild(msg)
        self._environment = environment_for_child()
        self.connection, theirs = map(sockets.above_streams, socket.socketpair())
        theirs.settimeout(None)  # the program may have set another default, of which the child knows nothing
        sockets.close_in_children(self.connection, theirs)
        entries = interpreter.entries()
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
        try:
            self.connection.settimeout(_GREETING)
            courtesy.waits()
            greeting = json.loads(self._line())
        except (OSError, ValueError):
            greeting = None
        if greeting != READY:
            self.close()
            msg = f"{program[0]} does not run as the process that delivers"
            raise NoChild(msg)
        self.send(json.dumps(entries).encode() + b"\n")

    def send(self, line: bytes) -> None:
        """Tell the child something; one that is gone is noticed by ``messages``."""
        with contextlib.suppress(OSError):
            self.connection.sendall(line)

    def messages(self, stopped: threading.Event) -> Iterator[dict[str, Any]]:
        """Return what the child says until it is gone, and tell it what changes in the environment meanwhile.

        Args:
            stopped: set when the child was told to end; it is given up a while later.
        """
        patience = 0
        next_look = stopwatch.seconds()
        self.connection.settimeout(0)
        while patience < _FAREWELL / _LOOK:
            if stopwatch.seconds() >= next_look:
                self._pass_on_environment()
                next_look = stopwatch.seconds() + _LOOK
            if not stopped.is_set() and b"\n" not in self._buffer:
                courtesy.sleeps(_HEED)
                stopped.wait(_HEED)
                courtesy.works()
            if stopped.is_set():
                self.connection.settimeout(_LOOK)
                courtesy.waits()
            try:
                line = self._line()
            except BlockingIOError:
                continue
            except TimeoutError:
                patience += 1
                continue
            except OSError:
                return
            if not line:
                return
            yield json.loads(line)

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
            changed: dict[str, str | None] = {name: None for name in before if name not in now}
            changed.update({name: value for name, value in now.items() if before.get(name) != value})
            self._environment = now
            self.send(json.dumps({"environment": changed}).encode() + b"\n")

    def close(self) -> None:
        """Let the child end, with whatever it is doing; wait for it a moment."""
        self.connection.close()
        try:
            self._process.wait(_FAREWELL)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
