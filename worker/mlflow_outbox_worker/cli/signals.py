"""SIGINT and SIGTERM as something to wait for, for commands that end in an orderly way.

A ``threading.Event`` would not do: its lock may be held by the very code that a signal's handler interrupts, and
setting it there would then never return. A handler here notes the signal and rings a pipe, which takes no lock.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
from types import FrameType, TracebackType
from typing import Any, Final, final

from mlflow_outbox import stopwatch

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


@final
class Ending:
    """Takes SIGINT and SIGTERM while it is entered; a signal that was ignored before stays ignored.

    Args:
        forceful: let the second signal interrupt whatever goes on, as a first one does elsewhere.
    """

    def __init__(self, *, forceful: bool = False) -> None:
        self._forceful = forceful
        self._seen: list[int] = []
        self._former: dict[int, Any] = {}
        self._ear, self._bell = -1, -1

    def __repr__(self) -> str:
        return f"<Ending, {len(self._seen)} signals seen>"

    def __enter__(self) -> Ending:
        """Begin to take them."""
        self._ear, self._bell = os.pipe()
        for fd in (self._ear, self._bell):
            os.set_blocking(fd, False)
        with contextlib.suppress(ValueError):  # not in the main thread: signals are somebody else's
            for number in _SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave them to whoever took them before."""
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former.clear()
        for fd in (self._ear, self._bell):
            os.close(fd)

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - the form of a handler
        self._seen.append(number)
        with contextlib.suppress(BlockingIOError):
            os.write(self._bell, b"!")
        if self._forceful and len(self._seen) > 1:
            raise KeyboardInterrupt

    @property
    def interrupted(self) -> bool:
        """Whether it was ctrl-C that came first."""
        return self._seen[:1] == [signal.SIGINT]

    def is_set(self) -> bool:
        """Return whether a signal has come."""
        return bool(self._seen)

    def wait(self, timeout: float, *, number: int = 1) -> bool:
        """Wait until signals have come, and return whether they have.

        Args:
            timeout: seconds to wait at most.
            number: how many signals, counted from the beginning.
        """
        deadline = stopwatch.seconds() + timeout
        while len(self._seen) < number and (left := deadline - stopwatch.seconds()) > 0:
            if select.select([self._ear], [], [], left)[0]:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._ear, 64)
        return len(self._seen) >= number
