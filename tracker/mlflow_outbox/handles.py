"""Copies and pickles of trackers and runs, which are handles of something outside of the program, like those of files.

A copy is the same handle, also where the object that is copied only holds one: a model, a callback, a configuration.

A pickle says which outbox and run it is, without credentials. Where it is read, by a process that the program starts
(one that is spawned, or joblib's, or Ray's) or with a checkpoint, the handle only writes, unless that process uses the
outbox already: whoever delivers that outbox delivers what it writes too. So the program begins to deliver when it has
a tracker pickled, though it may never log anything itself. Where the outbox is not there, on another machine above all,
nothing is kept, which is said and counted: reading a checkpoint must not fail for it.

The tasks of a pool get their run anew each time. In one process they are one writer all the same: whoever delivers
looks at every writer of a run that goes on, at each look.

Nothing of an outbox is ever read by ``pickle``; these are the program's own, and hold plain values.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from mlflow_outbox.counters import Counters, printable
from mlflow_outbox.errors import OutboxError
from mlflow_outbox.outboxes import in_use, shared
from mlflow_outbox.settings import Settings
from mlflow_outbox.spool.directory import OutboxDirectory, is_run_id
from mlflow_outbox.spool.identity import RunIdentity

if TYPE_CHECKING:
    from typing_extensions import Self

    from mlflow_outbox.outbox import Outbox
    from mlflow_outbox.spool.journal import Journal

_NAMES: Final = frozenset(field.name for field in dataclasses.fields(Settings))
#: Runs of pickles whose journals are kept for the next pickle of the same run.
_MOST: Final = 100
#: Those journals, by outbox, which they keep, and run.
_rejoined: dict[tuple[int, RunIdentity], Journal] = {}


class Handle:
    """What is copied by being the same."""

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, _memo: Any) -> Self:
        return self


def noted(settings: Settings) -> dict[str, Any]:
    """Return options as a pickle keeps them, for another version too."""
    return {name: getattr(settings, name) for name in sorted(_NAMES)}


def settings_of(note: dict[str, Any]) -> Settings:
    """Return the options of a note: those that this version knows."""
    return Settings(**{name: value for name, value in note.items() if name in _NAMES})


def reopened(path: str, settings: Settings) -> Outbox | None:
    """Return an outbox to write to, or None, which is said, where it is not there or cannot be used.

    Args:
        path: its directory; "" for one that was disabled when the pickle was made.
        settings: the options.

    Raises:
        OutboxUnusable: only with ``Settings(strict=True)``.
        OutboxMismatch: the same.
    """
    if not path or settings.disabled:
        return None
    try:
        directory = OutboxDirectory.open(Path(path))
    except OutboxError as error:
        if settings.strict:
            raise
        Counters().warn_once(
            "disabled", f"mlflow-outbox: nothing can be kept of what is logged here: {printable(str(error), 300)}"
        )
        return None
    return in_use(directory) or shared(directory, directory.destination, settings, "none")


def rejoined(path: str, run: tuple[Any, ...], note: dict[str, Any]) -> tuple[Journal | None, Settings, Counters]:
    """Return what a run that comes from a pickle writes to; None where nothing is kept, and is counted.

    Args:
        path: the outbox.
        run: a ``RunIdentity``, as far as there is one.
        note: the options.

    Raises:
        OutboxError: the run's id is none; an outbox that cannot be used, only with ``Settings(strict=True)``.
    """
    if not is_run_id(run[0]):
        msg = f"the run id {printable(run[0])} is none"
        raise OutboxError(msg)
    settings = settings_of(note)
    outbox = reopened(path, settings)
    if outbox is None:
        counters = Counters()
        counters.add("disabled_runs")
        return None, settings, counters
    identity = RunIdentity(*run)
    journal = _rejoined.get((id(outbox), identity))
    if journal is None:
        if len(_rejoined) >= _MOST:
            _rejoined.clear()
        journal = _rejoined[id(outbox), identity] = outbox.journal(identity)
    return journal, settings, outbox.counters
