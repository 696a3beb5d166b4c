"""Which outboxes a command is about, and how to open what is in them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from mlflow_outbox.counters import printable
from mlflow_outbox.destination import Destination, with_credentials
from mlflow_outbox.errors import LedgerUnavailable, OutboxError, OutboxUnusable
from mlflow_outbox.settings import Settings, tracking_uri_from_environment
from mlflow_outbox.spool.directory import OutboxDirectory, find_outboxes, is_run_id
from mlflow_outbox_worker import wording
from mlflow_outbox_worker.cli import terminal
from mlflow_outbox_worker.cli.exits import CommandFailed, ExitCode

if TYPE_CHECKING:
    from mlflow_outbox_worker.ledger import Ledger

_DEFAULT_ROOT: Final = Path(".mlflow-outbox")


def settings_for(outbox_dir: Path | None) -> Settings:
    """Return the options from the environment, with the directory given on the command line.

    Raises:
        InvalidSettings: a variable of the environment is wrong.
    """
    return Settings.from_environment(root=outbox_dir) if outbox_dir is not None else Settings.from_environment()


def root_of(settings: Settings) -> Path:
    """Return the outbox, or the directory with several, that a command is about."""
    return settings.root or _DEFAULT_ROOT


def listed(root: Path) -> list[Path]:
    """Return the paths of the outboxes at or in a directory; none is not an error here."""
    return find_outboxes(root)


def find(settings: Settings) -> list[Path]:
    """Return the paths of the outboxes that a command is about.

    Raises:
        CommandFailed: there is none, or the disk does not tell.
    """
    root = root_of(settings)
    paths = find_outboxes(root)
    if not paths and (why := _why_unread(root)):
        msg = f"{printable(root, 300)} cannot be looked into: {why}"
        raise CommandFailed(msg)
    if not paths:
        msg = f"there is no outbox in {printable(root, 300)}; name its directory with --outbox-dir or MLFLOW_OUTBOX_DIR"
        raise CommandFailed(msg, ExitCode.USAGE)
    return paths


def _why_unread(root: Path) -> str:
    """Return why it cannot be told what is in a directory; "" when it can, or there is none."""
    try:
        with os.scandir(root.expanduser()):
            return ""
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:
        return error.strerror or str(error)


class Usable(NamedTuple):
    """The outboxes of a directory that can be used, and why the others cannot, a sentence each."""

    directories: list[OutboxDirectory]
    refused: list[str]

    def name_refused(self) -> ExitCode:
        """Say which outboxes are left out and why; return the code that says so too."""
        for why in self.refused:
            terminal.error(f"left alone: {why}")
        return ExitCode.ERROR if self.refused else ExitCode.DONE


def open_usable(settings: Settings) -> Usable:
    """Open every outbox that a command is about and that is safe to use: one that is not keeps nobody from the others.

    Raises:
        CommandFailed: there is none.
        OutboxUnusable: not one of them is safe to use.
    """
    usable = Usable([], [])
    for path in find(settings):
        try:
            usable.directories.append(_opened(path))
        except OutboxUnusable as error:
            usable.refused.append(str(error))
    if not usable.directories:
        raise OutboxUnusable("; ".join(usable.refused))
    return usable


def open_all(settings: Settings) -> list[OutboxDirectory]:
    """Open every outbox that a command is about, to find the one that has what a person means; name those left out.

    Raises:
        CommandFailed: there is none.
        OutboxUnusable: not one of them is safe to use.
    """
    usable = open_usable(settings)
    usable.name_refused()
    return usable.directories


def open_one(settings: Settings) -> OutboxDirectory:
    """Open the one outbox that a command is about.

    Raises:
        CommandFailed: there is none, or there are several to choose from.
        OutboxUnusable: it is not safe to use.
    """
    paths = find(settings)
    if len(paths) > 1:
        names = ", ".join(printable(path.name) for path in paths[:5]) + (", ..." if len(paths) > 5 else "")  # noqa: PLR2004 - enough to recognise them
        where = printable(paths[0].parent, 300)
        msg = f"there are {len(paths)} outboxes in {where} ({names}); name one with --outbox-dir"
        raise CommandFailed(msg, ExitCode.USAGE)
    return _opened(paths[0])


def _opened(path: Path) -> OutboxDirectory:
    try:
        directory = OutboxDirectory.open(path)
    except OutboxUnusable as error:
        if path.stat().st_uid == os.geteuid():
            raise
        msg = f"{error}, or send its runs, which only reads them: mlflow-outbox replay {wording.quoted(path)}"
        raise OutboxUnusable(msg) from None
    directory.look_anew()
    return directory


def run_words(given: Mapping[str, Any]) -> list[str]:
    """Return the ids of all runs on disk, for a shell to complete; none where that cannot be told.

    Args:
        given: the values of a command's other parameters.
    """
    try:
        directories = open_usable(settings_for(given.get("outbox_dir"))).directories
    except (OutboxError, OSError):
        return []
    return sorted({run_id for one in directories for run_id in [*one.run_ids(), *one.delivered_ids()]})


def unreadable_parts(directory: OutboxDirectory, run_id: str) -> list[str]:
    """Return what of a run on disk cannot be read, a sentence each."""
    from mlflow_outbox_worker.sources import run_id_of

    said: list[str] = []
    for folder in (directory.run(run_id), directory.delivered / run_id):
        if folder.is_dir():
            run_id_of(folder, said)
    return said


def read_only(path: Path) -> str:
    """Return why an outbox cannot be delivered from where it is, and what to do; "" when it can be written to."""
    if os.access(path, os.W_OK):
        return ""
    reads = f"mlflow-outbox replay {wording.quoted(path)} sends its runs and only reads them"
    return f"{printable(path, 300)} cannot be written to; {reads}"


def destination_of(directory: OutboxDirectory) -> Destination:
    """Return where an outbox delivers to, with the credentials that MLFLOW_TRACKING_URI has for that place."""
    return with_credentials(directory.destination, tracking_uri_from_environment())


def ledger_path(directory: OutboxDirectory, settings: Settings) -> Path:
    """Return the directory of an outbox's ledger."""
    return directory.ledger_in(settings.ledger_dir)


@contextlib.contextmanager
def ledger_of(directory: OutboxDirectory, settings: Settings, *, write: bool = False) -> Iterator[Ledger]:
    """Open the ledger of an outbox, beside a worker that uses it too, and close it again.

    Args:
        directory: the outbox.
        settings: where its ledger is.
        write: False makes, mends and locks nothing.

    Raises:
        LedgerUnavailable: it cannot be used now.
    """
    from mlflow_outbox_worker.ledger import Ledger

    ledger = Ledger.open(ledger_path(directory, settings), read_only=not write)
    with contextlib.closing(ledger):
        yield ledger


def find_run(directories: list[OutboxDirectory], settings: Settings, name: str) -> tuple[OutboxDirectory, str]:
    """Return the outbox and the id of the one run that a person means.

    Args:
        directories: where to look.
        settings: where the ledgers are.
        name: the run's id in the outbox or in MLflow, or the beginning of the former.

    Raises:
        CommandFailed: no run is called so, or several are.
        LedgerUnavailable: a ledger cannot be read now, and nothing on disk is called so.
        OutboxUnusable: a ledger is not safe to read, and nothing on disk is called so.
    """
    found: list[tuple[OutboxDirectory, str]] = []
    retired, unread = "", None
    for directory in directories if is_run_id(name) or not name else ():  # no ledger can be asked for another text
        ids = sorted({*directory.run_ids(), *directory.delivered_ids()})
        if name in ids:
            return directory, name
        try:
            with ledger_of(directory, settings) as ledger:
                local = ledger.local_id(name)
                record = ledger.record(local or name)
                known = local or (record.run_id if record is not None else "")
                if known and (known in ids or ledger.view(known) is not None):
                    return directory, known
                retired = record.remote_id if record is not None else retired
        except (LedgerUnavailable, OutboxUnusable) as error:  # what is on disk may be what is meant all the same
            unread = error
        found += [(directory, run_id) for run_id in ids if run_id.startswith(name)]
    if len(found) == 1:
        return found[0]
    if unread is not None and not found:
        raise unread
    shown = printable(repr(name))
    if found:
        msg = f"{len(found)} runs begin with {shown}; give more of the id: mlflow-outbox runs lists them"
    elif retired:
        msg = f"the run {shown} was delivered as {printable(retired)}, and is not on disk any more"
    else:
        msg = f"no run {shown} is in this outbox; mlflow-outbox runs lists those that are"
    raise CommandFailed(msg, ExitCode.USAGE)
