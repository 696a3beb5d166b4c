"""What the exit code of a command says; the codes are stable, so that scripts can rely on them."""

from __future__ import annotations

import enum
from typing import Final

from mlflow_outbox.errors import LeaseHeld, OutboxError, OutOfTime


class ExitCode(enum.IntEnum):
    """The exit codes of all commands."""

    #: Everything is delivered, or the command did what it was asked.
    DONE = 0
    #: Something went wrong; the message says what, and what to do.
    ERROR = 1
    #: The command was not given what it needs.
    USAGE = 2
    #: Events are left over; they stay on disk and are sent when the destination takes them.
    LEFT = 3
    #: Events are parked: the destination refuses them until a person has acted.
    PARKED = 4
    #: All else is delivered, but there are dead letters: events that the destination refused for good.
    DEAD = 5
    #: Another worker holds the outbox, and it did not answer or finish.
    HELD = 6
    #: Ctrl-C; nothing was left half done.
    INTERRUPTED = 130


#: Shown by --help.
EXPLAINED: Final = """\b
Exit codes:
  0    all delivered, or done
  1    an error, named in one sentence
  2    bad usage
  3    events are left over; they stay on disk and are sent later
  4    events are parked: a person is needed
  5    there are dead letters, all else is delivered
  6    another worker holds the outbox and did not answer or finish
  130  interrupted (ctrl-C)
"""


class CommandFailed(OutboxError):
    """Raised when a command cannot do what it was asked; the message says what to do instead.

    Attributes:
        code: the exit code.
    """

    def __init__(self, message: str, code: ExitCode = ExitCode.ERROR) -> None:
        super().__init__(message)
        self.code = code


def of_backlog(*, pending: int, parked: int, dead: int, unreadable: int = 0) -> ExitCode:
    """Return the code that says what is left: unreadable before parked before left over before dead.

    Args:
        pending: events that wait.
        parked: events that wait for a person.
        dead: dead letters.
        unreadable: segments that cannot be read; how many events wait in them is not known.
    """
    if unreadable:
        return ExitCode.ERROR
    if parked:
        return ExitCode.PARKED
    if pending:
        return ExitCode.LEFT
    return ExitCode.DEAD if dead else ExitCode.DONE


def of_error(error: OutboxError) -> ExitCode:
    """Return the code that goes with an error."""
    if isinstance(error, CommandFailed):
        return error.code
    if isinstance(error, OutOfTime):
        return ExitCode.LEFT
    return ExitCode.HELD if isinstance(error, LeaseHeld) else ExitCode.ERROR


#: Which of several codes stands for all of them, most urgent first.
_URGENCY: Final = (
    ExitCode.ERROR,
    ExitCode.PARKED,
    ExitCode.HELD,
    ExitCode.LEFT,
    ExitCode.DEAD,
    ExitCode.DONE,
)


def most_urgent(codes: list[ExitCode]) -> ExitCode:
    """Return the code that stands for several outboxes: an error before parked before held before left before dead."""
    return min(codes, key=_URGENCY.index, default=ExitCode.DONE)
