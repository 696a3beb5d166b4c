"""A command at a terminal of its own: what it writes there, and what a person types."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from types import TracebackType
from typing import final

from commands import busy, command, environment, take_interrupts

#: Seconds after which a command that does not do what is waited for fails its test.
_PATIENCE = 200.0
HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"


@final
class Terminal:
    """Runs a command at a pseudo-terminal, which is its controlling one, so that typed keys become signals.

    Args:
        columns: how wide it is.
        words: of the command.
        piped: standard error goes to the terminal, standard output into nothing.
        more: variables of the environment.
    """

    def __init__(self, columns: int, *words: object, piped: bool = False, **more: str) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        env = {name: value for name, value in environment(TERM="xterm-256color", **more).items() if name != "COLUMNS"}
        self._process = subprocess.Popen(
            command(*words),
            stdin=slave,
            stdout=subprocess.DEVNULL if piped else slave,
            stderr=slave,
            env=env,
            start_new_session=True,
            preexec_fn=_take_terminal,  # noqa: PLW1509 - two system calls, which no thread of this process can hold up
        )
        os.close(slave)
        self.written = ""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        os.close(self._master)

    @property
    def pid(self) -> int:
        """The process of the command."""
        return self._process.pid

    @property
    def lines(self) -> list[str]:
        """What was written so far, without escape sequences, drawn-over lines included."""
        return plain(self.written)

    def until(self, pattern: str) -> re.Match[str]:
        """Wait until something has been written."""
        deadline = time.monotonic() + _PATIENCE
        while not (found := re.search(pattern, "\n".join(self.lines))):
            assert self._read(deadline), f"{pattern!r} was not written: {self.written!r}"
        return found

    def type(self, keys: str) -> None:
        """Type something; the terminal makes an interrupt of ctrl-C."""
        os.write(self._master, keys.encode())

    def end(self) -> int:
        """Wait until the command has ended and return its exit code."""
        deadline = time.monotonic() + _PATIENCE
        while self._read(deadline):
            pass
        return self._process.wait(max(0.0, deadline - time.monotonic()))

    def end_waiting(self) -> tuple[int, float]:
        """Do as ``end``; return also for how many seconds it waited meanwhile: see ``commands.waited``."""
        started = time.monotonic()
        before = at_work = busy(self.pid)
        ended = os.pidfd_open(self.pid)
        while time.monotonic() - started < _PATIENCE and not select.select([ended], [], [], 0.01)[0]:
            with contextlib.suppress(OSError):  # it has ended just now
                at_work = max(at_work, busy(self.pid))
            self._read(time.monotonic() + 0.001)  # or it would wait for room
        waits = time.monotonic() - started - (at_work - before)
        os.close(ended)
        return self.end(), waits

    def _read(self, deadline: float) -> bool:
        """Read what comes; False when nothing more will, or too late."""
        while (left := deadline - time.monotonic()) > 0:
            if select.select([self._master], [], [], left)[0]:
                data = b""
                with contextlib.suppress(OSError):  # the other end is closed
                    data = os.read(self._master, 65536)
                self.written += data.decode(errors="replace")
                return bool(data)
        return False


def plain(text: str) -> list[str]:
    """Return the lines of a terminal's text without its escape sequences."""
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text))


def _take_terminal() -> None:
    take_interrupts()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
