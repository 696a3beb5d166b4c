"""Whose events these are: the run that everything of one writer belongs to, and the writer."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable
from typing import Final, NamedTuple

#: As much of an id as a terminal shows, or more, and less than all of it.
_BEGINNING: Final = re.compile(r"[0-9a-f]{8,31}")
#: Writers of one process that share a beginning of their ids.
_MANY: Final = 1 << 16


class RunIdentity(NamedTuple):
    """The run that a writer's events belong to.

    Attributes:
        run_id: the outbox's id of it, or MLflow's.
        experiment: name of its experiment.
        remote: whether the id is one that MLflow gave.
    """

    run_id: str
    experiment: str
    remote: bool = False


def in_full(given: str, run_ids: Iterable[str]) -> str:
    """Return the id of the only run that begins with what a person has copied from a terminal; else what was given.

    MLflow has no run of such an id: what was logged under it would wait for one for ever.
    """
    if not _BEGINNING.fullmatch(given):
        return given
    found = {run_id for run_id in run_ids if run_id.startswith(given)}
    return found.pop() if len(found) == 1 else given


class _Writers:
    """Names writers of this process: by twelve hex digits of chance, and four of which each writer has the next.

    Two handles of one run, as a task of a pool gets one each time, can begin within the millisecond that times have;
    readers then take the one with the lesser id for the first (``listing``), and the last value is the last one's.
    """

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._shared = os.urandom(6).hex()

    def next(self) -> str | None:
        """Return an id that no other writer has; None when all were given."""
        number = next(self._numbers)
        return f"{self._shared}{number:04x}" if number < _MANY else None


_writers = _Writers()


def new_writer() -> str:
    """Return an id for a new writer."""
    global _writers  # noqa: PLW0603 - when all of one beginning were given
    while (writer := _writers.next()) is None:
        _writers = _Writers()
    return writer


def _after_fork_in_child() -> None:
    global _writers  # noqa: PLW0603 - the child's own
    _writers = _Writers()


os.register_at_fork(after_in_child=_after_fork_in_child)
