"""``mlflow-outbox gc``: give back the space of what is delivered, read back and past its retention time.

Of runs that go on, or that were left by a program that died, it gives back what is delivered as a worker does: it files
that first, if there is room to open the ledger for it, and what is filed goes when it is old enough. So does a whole
run that no worker could file before it ended, as one of the run's writers had not left it yet.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import click

from mlflow_outbox.counters import Counters, printable
from mlflow_outbox.errors import LedgerUnavailable, OutboxUnusable
from mlflow_outbox.spool.reader import RunReader
from mlflow_outbox_worker import wording
from mlflow_outbox_worker.cli import outboxes, terminal
from mlflow_outbox_worker.cli.declare import Option, command
from mlflow_outbox_worker.cli.exits import CommandFailed, ExitCode, most_urgent
from mlflow_outbox_worker.cli.options import AsJson, OutboxDir, Quiet, Verbose

if TYPE_CHECKING:
    from mlflow_outbox.settings import Settings
    from mlflow_outbox.spool.directory import OutboxDirectory
    from mlflow_outbox_worker.host_lease import WorkerLease
    from mlflow_outbox_worker.records import RunRecord

_SPAN: Final = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|h|d|)")
_SECONDS: Final = {"s": 1, "min": 60, "h": 3600, "d": 86_400}
#: Seconds of the longest span taken; far longer ones are no numbers that a clock's can be compared with.
_LONGEST: Final = 1_000_000 * 86_400


def register(app: click.Group) -> None:
    """Add the command."""
    app.add_command(command("gc", gc))


def gc(
    outbox_dir: OutboxDir = None,
    dry_run: Annotated[bool, Option("--dry-run", "-n", about="Only say what would go.")] = False,
    older_than: Annotated[
        str | None,
        Option(
            metavar="TIME",
            about="Keep runs verified since then: 0, 90min, 12h, 7d.",
            default="the setting retention",
        ),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> int:
    """Delete runs that are delivered, read back and kept long enough; say what that freed.

    A run goes only when MLflow was asked and holds all of it; of one that goes on, segments and files that are
    delivered do. A worker does the same every few minutes by itself.

    \b
    Examples:
      mlflow-outbox gc --dry-run
      mlflow-outbox gc --older-than 1d
    """
    terminal.behave(quiet=quiet or as_json, verbose=verbose)
    settings = outboxes.settings_for(outbox_dir)
    keep = settings.retention if older_than is None else seconds_of(older_than)
    usable = outboxes.open_usable(settings)
    refused = usable.name_refused()
    results: list[tuple[ExitCode, dict[str, Any]]] = []
    for directory in usable.directories:
        from mlflow_outbox_worker.host_lease import lease_of
        from mlflow_outbox_worker.retention import reclaim, reclaim_parts, retire

        name = printable(directory.path.name)
        lease = lease_of(directory, "command")
        code, why = (ExitCode.DONE, "") if dry_run else _taken(directory, lease)
        if why:
            terminal.error(f"{name}: {why}")
            results.append((code, _entry(directory, dry_run=dry_run, reason=f"{name}: {why}")))
            continue
        stays: list[OSError] = []
        try:
            unfiled = _file(directory, settings, stays.append, dry_run=dry_run)
            before_ms = time.time_ns() // 1_000_000 - int(keep * 1000)
            # Only read: with zero bytes free there is not even room to open it for more.
            with outboxes.ledger_of(directory, settings) as ledger:
                would = reclaim(directory, ledger, before_ms=before_ms, failed=stays.append, dry_run=True)
                sizes = {run_id: _bytes(directory.delivered / run_id) for run_id in would}
                gone = would if dry_run else reclaim(directory, ledger, before_ms=before_ms, failed=stays.append)
                parts = reclaim_parts(directory, ledger, before_ms=before_ms, failed=stays.append, dry_run=dry_run)
                parts += unfiled if keep == 0 else 0
            if gone and not dry_run:
                # With no room for that, a worker does it later.
                with (
                    contextlib.suppress(LedgerUnavailable, OutboxUnusable),
                    outboxes.ledger_of(directory, settings, write=True) as whole,
                ):
                    retire(directory, whole, now=time.time())
        except (LedgerUnavailable, OSError) as failure:
            terminal.error(f"{name}: {failure}")
            results.append((ExitCode.ERROR, _entry(directory, dry_run=dry_run, reason=f"{name}: {failure}")))
            continue
        finally:
            lease.release()
        freed = sum(sizes.get(run_id, 0) for run_id in gone) + parts
        if terminal.is_verbose():
            for run_id in gone:
                terminal.say(f"{run_id}  {wording.size(sizes.get(run_id, 0))}")
        kept = len(directory.delivered_ids()) - (len(gone) if dry_run else 0)
        verb = "would free" if dry_run else "freed"
        of = wording.count(len(gone), "run") + (" and of runs that go on" if parts else "")
        stay = f"{wording.count(kept, 'delivered run')} kept"
        terminal.say(f"{name}: {verb} {wording.size(freed)} of {of}; {stay}")
        reason = "; ".join(map(str, stays)) or None
        entry = _entry(directory, dry_run=dry_run, runs=gone, freed=freed, kept=kept, reason=reason)
        results.append((ExitCode.ERROR if stays else ExitCode.DONE, entry))
        for trouble in stays:
            terminal.error(f"{name}: {printable(str(trouble))}")
    if as_json:
        terminal.raw(json.dumps([entry for _, entry in results], indent=2))
    return most_urgent([refused, *(code for code, _ in results)])


def _taken(directory: OutboxDirectory, lease: WorkerLease) -> tuple[ExitCode, str]:
    """Take the lease of an outbox; return why it cannot be had, and the code that says so, or no words."""
    from mlflow_outbox_worker.host_lease import described, worker_of

    try:
        if lease.acquire():
            return ExitCode.DONE, ""
    except OSError as error:  # of a read-only disk, for one: the other outboxes are seen to all the same
        return ExitCode.ERROR, printable(error, 300)
    found = worker_of(directory)
    who = described(found) if found is not None else "another worker"
    return ExitCode.HELD, f"{who} has this outbox; it deletes by itself what is past retention"


def _entry(
    directory: OutboxDirectory,
    *,
    dry_run: bool,
    runs: Sequence[str] = (),
    freed: int = 0,
    kept: int | None = None,
    reason: str | None,
) -> dict[str, Any]:
    """Return what was freed of an outbox, or why not, as JSON can hold it."""
    kept = len(directory.delivered_ids()) if kept is None else kept
    entry = {"path": str(directory.path), "runs": [*runs], "bytes": freed, "kept": kept, "dry_run": dry_run}
    return {**entry, "reason": reason}


def _file(directory: OutboxDirectory, settings: Settings, failed: Callable[[OSError], None], *, dry_run: bool) -> int:
    """File what is delivered and is not yet, as a worker does; return how many bytes a dry run has left unfiled."""
    from mlflow_outbox_worker.retention import file_passed, file_run, passed_segments
    from mlflow_outbox_worker.snapshots import copies_to_file

    found: list[tuple[RunRecord, list[Path], list[Path]]] = []
    done: list[RunRecord] = []
    with outboxes.ledger_of(directory, settings) as ledger:
        for run_id in directory.run_ids():
            record = ledger.record(run_id)
            if record is None:
                continue
            try:
                reader = RunReader(directory.run(run_id))
                if record.state == "done":
                    done += [record] if reader.segments() else []  # else somebody is about to go on with it
                    continue
                copies = copies_to_file(directory, ledger, record, reader)
                found.append((record, passed_segments(reader, record.cursors), copies))
            except OSError as error:
                failed(error)
    found = [part for part in found if any(part[1:])]
    if not found and not done:
        return 0
    if dry_run:
        size = sum(_bytes(directory.run(record.run_id)) for record in done)
        return size + sum(_size(path) for _, passed, copies in found for path in (*passed, *copies))
    # With no room to open it for more, a worker does it later.
    with (
        contextlib.suppress(LedgerUnavailable, OutboxUnusable),
        outboxes.ledger_of(directory, settings, write=True) as whole,
    ):
        for record, passed, copies in found:
            try:
                file_passed(directory, whole, record, passed, Counters(), copies=bool(copies))
            except OSError as error:
                failed(error)
        for record in done:
            try:
                file_run(directory, whole, record.run_id, record.cursors, Counters())
            except OSError as error:
                failed(error)
    return 0


def seconds_of(text: str) -> float:
    """Return the seconds of a time span such as 0, 15min, 12h or 7d.

    Raises:
        CommandFailed: it is none.
    """
    found = _SPAN.fullmatch(text.strip())
    if found is None:
        msg = f"{printable(repr(text))} is no time span; write for instance 0, 90min, 12h or 7d"
        raise CommandFailed(msg, ExitCode.USAGE)
    number, unit = found.groups()
    seconds = float(number) * _SECONDS.get(unit, 1)
    if seconds > _LONGEST:
        msg = f"{printable(text)} is longer than anything was kept; give 1000000d at most"
        raise CommandFailed(msg, ExitCode.USAGE)
    if not unit and float(number):
        units = " or ".join([", ".join(f"{number}{unit}" for unit in ("s", "min", "h")), f"{number}d"])
        msg = f"{number!r} has no unit; write {units}"
        raise CommandFailed(msg, ExitCode.USAGE)
    return seconds


def _bytes(folder: Path) -> int:
    return sum(_size(Path(parent, name)) for parent, _, names in os.walk(folder) for name in names)


def _size(path: Path) -> int:
    try:
        return os.stat(path, follow_symlinks=False).st_size
    except OSError:
        return 0  # gone meanwhile
