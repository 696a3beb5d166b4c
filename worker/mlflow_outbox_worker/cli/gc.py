"""``mlflow-outbox gc``: give back the space of what is delivered, read back and past its retention time."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from pathlib import Path
from typing import Annotated, Final

import click

from mlflow_outbox.counters import printable
from mlflow_outbox.errors import LeaseHeld, LedgerUnavailable, OutboxUnusable
from mlflow_outbox_worker.cli import outboxes, terminal
from mlflow_outbox_worker.cli.declare import Option, command
from mlflow_outbox_worker.cli.exits import CommandFailed, ExitCode, most_urgent
from mlflow_outbox_worker.cli.options import AsJson, OutboxDir, Quiet, Verbose

_SPAN: Final = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|h|d|)")
_SECONDS: Final = {"s": 1, "min": 60, "h": 3600, "d": 86_400}


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

    A run goes only when MLflow was asked and holds all of it. A worker does the same every few minutes by itself.

    \b
    Examples:
      mlflow-outbox gc --dry-run
      mlflow-outbox gc --older-than 1d
    """
    terminal.behave(quiet=quiet or as_json, verbose=verbose)
    settings = outboxes.settings_for(outbox_dir)
    keep = settings.retention if older_than is None else seconds_of(older_than)
    before_ms = time.time_ns() // 1_000_000 - int(keep * 1000)
    codes, freed_of = [], []
    for directory in outboxes.open_all(settings):
        from mlflow_outbox_worker.host_lease import described, lease_of, worker_of
        from mlflow_outbox_worker.retention import reclaim, retire

        name = printable(directory.path.name)
        lease = lease_of(directory, "command")
        if not dry_run and not lease.acquire():
            found = worker_of(directory)
            who = described(found) if found is not None else "another worker"
            error = LeaseHeld(f"{name}: {who} has this outbox; it deletes by itself what is past retention")
            terminal.error(str(error))
            codes.append(ExitCode.HELD)
            continue
        stays: list[OSError] = []
        try:
            # Only read: with zero bytes free there is not even room to open it for more.
            with outboxes.ledger_of(directory, settings) as ledger:
                would = reclaim(directory, ledger, before_ms=before_ms, failed=stays.append, dry_run=True)
                sizes = {run_id: _bytes(directory.delivered / run_id) for run_id in would}
                gone = would if dry_run else reclaim(directory, ledger, before_ms=before_ms, failed=stays.append)
            if gone and not dry_run:
                # With no room for that, a worker does it later.
                with (
                    contextlib.suppress(LedgerUnavailable, OutboxUnusable),
                    outboxes.ledger_of(directory, settings, write=True) as whole,
                ):
                    retire(directory, whole, now=time.time())
        except (LedgerUnavailable, OSError) as failure:
            terminal.error(f"{name}: {failure}")
            codes.append(ExitCode.ERROR)
            continue
        finally:
            lease.release()
        freed = sum(sizes.get(run_id, 0) for run_id in gone)
        if terminal.is_verbose():
            for run_id in gone:
                terminal.say(f"{run_id}  {terminal.size(sizes.get(run_id, 0))}")
        kept = len(directory.delivered_ids()) - (len(gone) if dry_run else 0)
        verb = "would free" if dry_run else "freed"
        stay = f"{terminal.count(kept, 'delivered run')} kept"
        terminal.say(f"{name}: {verb} {terminal.size(freed)} of {terminal.count(len(gone), 'run')}; {stay}")
        freed_of.append({"path": str(directory.path), "runs": gone, "bytes": freed, "kept": kept, "dry_run": dry_run})
        for trouble in stays:
            terminal.error(f"{name}: {printable(str(trouble))}")
        codes.append(ExitCode.ERROR if stays else ExitCode.DONE)
    if as_json:
        terminal.raw(json.dumps(freed_of, indent=2))
    return most_urgent(codes)


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
    if not unit and float(number):
        units = " or ".join([", ".join(f"{number}{unit}" for unit in ("s", "min", "h")), f"{number}d"])
        msg = f"{number!r} has no unit; write {units}"
        raise CommandFailed(msg, ExitCode.USAGE)
    return float(number) * _SECONDS.get(unit, 1)


def _bytes(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name), follow_symlinks=False).st_size
            except OSError:
                continue  # gone meanwhile
    return total
