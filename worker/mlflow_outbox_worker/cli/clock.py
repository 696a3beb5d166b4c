"""When a command began, from which its time-out counts: before it has imported anything, where it is a process."""

from __future__ import annotations

from mlflow_outbox import stopwatch

_began = stopwatch.seconds()


def begin() -> None:
    """Begin now: a command of a process that is there for more than that."""
    global _began  # noqa: PLW0603 - one command at a time, and every module of it may ask
    _began = stopwatch.seconds()


def began() -> float:
    """Return when the command began, in seconds of the monotonic clock."""
    return _began
