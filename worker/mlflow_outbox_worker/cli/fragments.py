"""What commands say of runs of which only the end is on disk, before they make a copy that would look whole."""

from __future__ import annotations

from collections.abc import Mapping

from mlflow_outbox_worker.cli import terminal
from mlflow_outbox_worker.cli.exits import CommandFailed
from mlflow_outbox_worker.wording import count


def refuse_fragments(lost: Mapping[str, int], *, incomplete: bool, done: str) -> None:
    """Name every run that lacks its beginning, and raise unless that was asked for.

    Args:
        lost: how many events are not on disk any more, by run id; 0 when nobody knows.
        incomplete: what is left of them is wanted.
        done: what was not done, in a word.

    Raises:
        CommandFailed: there are such runs.
    """
    say = terminal.note if incomplete else terminal.error
    for run_id, number in lost.items():
        say(
            f"run {run_id} has lost its first {count(number, 'event') if number else 'events'} on disk: "
            "what was delivered is reclaimed after the retention time, or earlier for want of room"
        )
    if lost and not incomplete:
        msg = (
            f"nothing was {done}: {count(len(lost), 'run')} would arrive without the beginning, often without name and "
            "params; leave these out, give a copy that still has it as well, or --incomplete for what is left"
        )
        raise CommandFailed(msg)
