"""What a program leaves on disk at its end: one line for the user, with the command that sends it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlflow_outbox.counters import say

if TYPE_CHECKING:
    from pathlib import Path

    from mlflow_outbox.outbox import Outbox


def say_what_is_left(outbox: Outbox, pending: int, parked: int) -> None:
    """Say how many events wait, and how many are parked, on standard error; nothing if there are none."""
    if not pending and not parked:
        return
    path = outbox.directory.path
    parts = [
        f"{pending:,} events wait" if pending else "",
        f"{parked:,} events are parked for a person" if parked else "",
    ]
    said = say(
        f"mlflow-outbox: {' and '.join(part for part in parts if part)} in {path}; nothing is lost. "
        f"To send them: mlflow-outbox flush --outbox-dir {_quoted(path)}"
    )
    if not said:
        outbox.counters.add("warnings_not_written")


def _quoted(path: Path) -> str:
    import shlex  # only needed on the way out

    return shlex.quote(str(path))
