"""``mlflow-outbox doctor``: is the outbox sound, and is the destination there?"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import click

from mlflow_outbox.counters import described, printable
from mlflow_outbox.errors import LedgerUnavailable, OutboxUnusable
from mlflow_outbox.spool import provisional
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox_worker.cli import lines, outboxes, terminal
from mlflow_outbox_worker.cli.declare import Option, command
from mlflow_outbox_worker.cli.exits import ExitCode
from mlflow_outbox_worker.cli.options import AsJson, OutboxDir, Quiet, Verbose
from mlflow_outbox_worker.cli.terminal import Styled

if TYPE_CHECKING:
    from mlflow_outbox.settings import Settings
    from mlflow_outbox_worker.checkup import Finding

_STYLES: Final = {"ok": "green", "note": "", "mended": "green", "bad": "red", "away": "yellow", "parked": "red"}


def register(app: click.Group) -> None:
    """Add the command."""
    app.add_command(command("doctor", doctor))


def doctor(
    outbox_dir: OutboxDir = None,
    repair: Annotated[bool, Option("--repair", about="Mend what is safe to mend: modes, drafts, the ledger.")] = False,
    offline: Annotated[bool, Option("--offline", about="Do not ask the destination.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> int:
    """Check the directory, the journals, the ledger and the destination.

    Every event on disk is read and its checksum compared. Nothing of a journal is ever changed. The exit code is 0
    when all is well, 1 when something is damaged or unsafe, 3 when the destination is away, 4 when it refuses.

    \b
    Examples:
      mlflow-outbox doctor
      mlflow-outbox doctor --offline --repair
    """
    terminal.behave(quiet=quiet, verbose=verbose)
    settings = outboxes.settings_for(outbox_dir)
    found: dict[str, list[Finding]] = {}
    for path in outboxes.find(settings):
        if not as_json:
            terminal.styled(Styled(printable(path, 300), "bold"))
        held = found[str(path)] = []
        for finding in _examine(path, settings, repair=repair, offline=offline):
            held.append(finding)
            if not as_json:
                _say(finding)
    if as_json:
        terminal.raw(
            lines.dumps({path: [dataclasses.asdict(one) for one in held] for path, held in found.items()}, indent=2)
        )
    levels = {finding.level for held in found.values() for finding in held}
    if "bad" in levels:
        return ExitCode.ERROR
    if "parked" in levels:
        return ExitCode.PARKED
    return ExitCode.LEFT if "away" in levels else ExitCode.DONE


def _examine(path: Path, settings: Settings, *, repair: bool, offline: bool) -> Iterator[Finding]:
    from mlflow_outbox_worker.checkup import Finding

    try:
        yield from _findings(path, settings, repair=repair, offline=offline)
    except OSError as error:  # a disk that fails is what is looked for, and there may be more outboxes
        yield Finding("bad", "directory", f"the rest of it cannot be looked at: {described(error)}")


def _findings(path: Path, settings: Settings, *, repair: bool, offline: bool) -> Iterator[Finding]:
    from mlflow_outbox_worker.checkup import Finding, check_modes, check_outbox
    from mlflow_outbox_worker.presence import check_destination

    yield from check_modes(path, repair=repair)
    try:
        directory = OutboxDirectory.open(path)
    except OutboxUnusable as error:
        yield Finding("bad", "directory", str(error))
        return
    yield from check_outbox(directory, settings, repair=repair)
    if not offline:
        yield check_destination(outboxes.destination_of(directory), _delivered(directory, settings), path)


def _delivered(directory: OutboxDirectory, settings: Settings) -> int:
    """Return how many runs the ledger says are at the destination; none where it cannot be read, which is said."""
    try:
        with outboxes.ledger_of(directory, settings) as ledger:
            return sum(bool(one.remote_id) and not provisional.is_room(one.run_id) for one in ledger.records())
    except (LedgerUnavailable, OutboxUnusable):
        return 0


def _say(finding: Finding) -> None:
    if finding.level == "bad" and terminal.is_quiet():
        terminal.error(finding.text)
        return
    terminal.styled("  ", Styled(f"{finding.level:<7}", _STYLES[finding.level]), f"{finding.about:<12}", finding.text)
