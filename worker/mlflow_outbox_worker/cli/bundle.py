"""``mlflow-outbox export`` and ``import``: runs in one file, for machines that share no network."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import click

from mlflow_outbox.counters import printable
from mlflow_outbox.destination import Destination
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox_worker import wording
from mlflow_outbox_worker.cli import outboxes, terminal
from mlflow_outbox_worker.cli.declare import Argument, Option, command
from mlflow_outbox_worker.cli.exits import CommandFailed, ExitCode
from mlflow_outbox_worker.cli.fragments import refuse_fragments
from mlflow_outbox_worker.cli.options import Incomplete, OutboxDir, Quiet, Verbose
from mlflow_outbox_worker.wording import count

if TYPE_CHECKING:
    from mlflow_outbox.settings import Settings


class _Choice(NamedTuple):
    """What is exported.

    Attributes:
        destination: where it is to go.
        runs: the directories of each run.
        ledgers: directories of the ledgers that know of the runs.
        outboxes: ids of the outboxes that the runs are of.
        problems: what cannot be read, a sentence each.
    """

    destination: Destination
    runs: dict[str, tuple[Path, ...]]
    ledgers: set[Path]
    outboxes: set[str]
    problems: list[str]


def register(app: click.Group) -> None:
    """Add the commands."""
    app.add_command(command("export", export))
    app.add_command(command("import", import_))


def export(
    runs: Annotated[
        list[str] | None,
        Argument(metavar="RUN...", about="Ids, beginnings of ids, or directories of runs.", filled=True),
    ] = None,
    output: Annotated[
        Path, Option("--output", "-o", metavar="BUNDLE", about="The file; NAME.tar, or NAME.tar.gz for gzip.")
    ] = Path("runs.tar"),
    everything: Annotated[bool, Option("--all", about="All runs of the outbox, delivered ones too.")] = False,
    incomplete: Incomplete = False,
    force: Annotated[bool, Option("--force", about="Replace a file that is there.")] = False,
    outbox_dir: OutboxDir = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> int:
    """Put runs with their files into one file that can be carried to another machine.

    A run that is still being written goes in as far as it is; the same command with --force later takes the rest too.
    What cannot be read is left out: exit code 1. With a run whose first events were delivered and reclaimed nothing is
    written without --incomplete: exit code 1.

    \b
    Examples:
      mlflow-outbox export 3f9c 81aa -o runs.tar
      mlflow-outbox export --all -o runs.tar.gz
    """
    from mlflow_outbox_worker.fragments import lost_beginnings
    from mlflow_outbox_worker.packing import write_bundle

    terminal.behave(quiet=quiet, verbose=verbose)
    if bool(runs) == everything:
        msg = "name the runs, or give --all"
        raise CommandFailed(msg, ExitCode.USAGE)
    if not output.absolute().parent.is_dir():
        msg = f"there is no directory {printable(output.absolute().parent, 300)} to write {printable(output.name)} in"
        raise CommandFailed(msg, ExitCode.USAGE)
    if os.path.lexists(output) and not force:
        msg = f"there is a file {printable(output, 300)} already; --force replaces it"
        raise CommandFailed(msg)
    if output.exists() and not output.is_file():  # renaming would put a file in the place of a device or a pipe
        msg = f"{printable(output, 300)} is no file that could be replaced; give the name of one"
        raise CommandFailed(msg, ExitCode.USAGE)
    settings = outboxes.settings_for(outbox_dir)
    choice = _everything(settings) if everything else _chosen(runs or [], settings)
    chosen = choice.runs
    for problem in choice.problems:
        terminal.error(problem)
    if not chosen:
        msg = "there is no run to export"
        raise CommandFailed(msg)
    refuse_fragments(lost_beginnings(chosen, choice.ledgers), incomplete=incomplete, done="written")
    now_ms = time.time_ns() // 1_000_000
    outbox = _id_of(choice.outboxes)
    unread: dict[str, OSError] = {}
    manifest = write_bundle(
        *(output, chosen, choice.destination),
        now_ms=now_ms,
        outbox=outbox,
        replace=force,
        unread=unread.__setitem__,
    )
    gone = chosen.keys() - {run.run_id for run in manifest.runs}
    for run_id in sorted(gone):
        why = f"it cannot be read: {unread[run_id]}" if run_id in unread else "it is not on disk any more"
        terminal.error(f"run {run_id} was left out: {why}")
    if not manifest.runs:
        msg = "there is no run to export"
        raise CommandFailed(msg)
    size = sum(member.size for run in manifest.runs for member in run.members)
    terminal.say(f"{count(len(manifest.runs), 'run')}, {wording.size(size)}, in {output}")
    if choice.problems:
        terminal.error(f"what cannot be read is not in {printable(output, 300)}; see: mlflow-outbox doctor")
    return ExitCode.ERROR if gone or choice.problems else ExitCode.DONE


def _everything(settings: Settings) -> _Choice:
    from mlflow_outbox_worker.sources import find_runs

    directory = outboxes.open_one(settings)
    found = find_runs(directory.path)
    ledgers = {outboxes.ledger_path(directory, settings)}
    return _Choice(directory.destination, found.runs, ledgers, {directory.identity.id}, found.problems)


def _id_of(ids: set[str]) -> str:
    """Return the id of the outbox of a bundle's runs; of several, one that is always the same."""
    return hashlib.sha256("/".join(sorted(ids)).encode()).hexdigest()[:32] if len(ids) > 1 else next(iter(ids))


def _chosen(names: list[str], settings: Settings) -> _Choice:
    from mlflow_outbox.spool.reader import RunReader
    from mlflow_outbox_worker.sources import find_runs, merged

    directory: OutboxDirectory | None
    destinations: dict[str, Destination] = {}
    runs: list[dict[str, tuple[Path, ...]]] = []
    ledgers: set[Path] = set()
    problems: list[str] = []
    ids: set[str] = set()
    for name in names:
        path = Path(name)
        if path.is_dir():
            found = find_runs(path)
            if found.identity is None or not found.runs:
                msg = "; ".join(found.problems) or f"{printable(name, 300)} has no outbox.json beside or above it"
                raise CommandFailed(msg)
            identity = found.identity
            destination = Destination(identity.destination, identity.artifact_root)
            problems += found.problems
            runs.append(found.runs)
            directory = found.outbox
        else:
            directory, run_id = outboxes.find_run(outboxes.open_all(settings), settings, name)
            identity, destination = directory.identity, directory.destination
            problems += outboxes.unreadable_parts(directory, run_id)
            folders = (directory.run(run_id), directory.delivered / run_id)
            runs.append({run_id: folders} if any(RunReader(folder).segments() for folder in folders) else {})
        destinations[destination.uri] = destination
        ids.add(identity.id)
        if directory is not None:
            ledgers.add(outboxes.ledger_path(directory, settings))
    if len(destinations) > 1:
        msg = f"these runs are for {len(destinations)} destinations; export each destination's runs by themselves"
        raise CommandFailed(msg, ExitCode.USAGE)
    return _Choice(next(iter(destinations.values())), merged(runs), ledgers, ids, problems)


def import_(
    bundle: Annotated[Path, Argument(metavar="BUNDLE", about="A file made by export.")],
    outbox_dir: OutboxDir = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> int:
    """Check a bundle, and put its runs into an outbox from which they are delivered.

    Nothing of a bundle is used before all of it has been checked. Importing it twice changes nothing; a later export
    of the same runs completes them.

    \b
    Examples:
      mlflow-outbox import runs.tar && mlflow-outbox flush
      # without keeping the runs here
      mlflow-outbox replay runs.tar --to http://mlflow:5000
    """
    from mlflow_outbox_worker.bundle import read_manifest
    from mlflow_outbox_worker.unpacking import import_bundle

    terminal.behave(quiet=quiet, verbose=verbose)
    if not bundle.exists():
        msg = f"there is nothing at {printable(bundle, 300)}; give a file made by export"
        raise CommandFailed(msg, ExitCode.USAGE)
    if bundle.is_dir():
        msg = f"{printable(bundle, 300)} is a directory; give a file made by export, or send what is in it: replay"
        raise CommandFailed(msg, ExitCode.USAGE)
    manifest = read_manifest(bundle)
    root = outboxes.root_of(outboxes.settings_for(outbox_dir))
    destination = Destination(manifest.destination, manifest.artifact_root)
    directory = OutboxDirectory.create(root, destination, now_ms=time.time_ns() // 1_000_000)
    result = list(import_bundle(bundle, directory).values())
    parts = [f"{result.count(what)} {what}" for what in ("new", "completed", "unchanged") if what in result]
    terminal.say(f"{count(len(result), 'run')} in {directory.path} for {destination.uri}: {', '.join(parts)}")
    return ExitCode.DONE
