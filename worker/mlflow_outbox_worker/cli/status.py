"""``mlflow-outbox status``: what waits, since when, why, and who delivers it."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any, Final

import click

from mlflow_outbox.counters import printable
from mlflow_outbox.spool import provisional
from mlflow_outbox_worker import wording
from mlflow_outbox_worker.cli import exits, outboxes, terminal
from mlflow_outbox_worker.cli.declare import Option, command
from mlflow_outbox_worker.cli.options import AsJson, OutboxDir, Quiet, Verbose
from mlflow_outbox_worker.cli.terminal import Cell, Column, Styled

if TYPE_CHECKING:
    from mlflow_outbox_worker.survey import OutboxSurvey, RunSurvey

#: Runs listed unless --verbose is given; the totals count all.
_LISTED: Final = 20
#: Characters of a run id on a terminal; enough to name the run by.
_SHORT: Final = 8


def register(app: click.Group) -> None:
    """Add the command."""
    app.add_command(command("status", status))


def status(
    outbox_dir: OutboxDir = None,
    as_json: AsJson = False,
    watch: Annotated[bool, Option("--watch", "-w", about="Go on, until ctrl-C.")] = False,
    interval: Annotated[float, Option(least=0.1, metavar="S", about="Seconds between two looks of --watch.")] = 2.0,
    exit_code: Annotated[
        bool, Option("--exit-code", about="Exit with 3, 4 or 5 when something is left, 1 if unreadable.")
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> int:
    """Say what waits, since when, why, and who delivers it.

    Looking disturbs nobody, neither programs that log nor the worker.

    \b
    Examples:
      mlflow-outbox status
      mlflow-outbox status --json | jq .outboxes[0].pending
      mlflow-outbox status --watch --interval 5
      mlflow-outbox status -q --exit-code || mail -s "events wait" me@example.org
    """
    terminal.behave(quiet=quiet, verbose=verbose)
    from mlflow_outbox_worker.survey import survey

    settings = outboxes.settings_for(outbox_dir)
    code, refused = exits.ExitCode.DONE, list[str]()
    while True:
        # Opened anew for each look: a program may have made another outbox meanwhile.
        usable = outboxes.open_usable(settings)
        if usable.refused != refused:
            code, refused = usable.name_refused(), usable.refused
        found = [survey(directory, settings) for directory in usable.directories]
        with terminal.redrawn(on=watch and not as_json and not quiet):
            if as_json:
                terminal.raw(json.dumps(as_data(found), indent=None if watch else 2, sort_keys=False))
            elif not quiet:
                _show(found)
        if not watch:
            break
        sys.stdout.flush()  # a pipe that is watched must not wait for its buffer to fill
        time.sleep(interval)
    if not exit_code:
        return code
    backlog = exits.of_backlog(
        pending=sum(one.pending for one in found),
        parked=sum(one.parked for one in found),
        dead=sum(one.dead for one in found),
        unreadable=sum(one.unreadable for one in found),
    )
    return exits.most_urgent([code, backlog])


def as_data(found: list[OutboxSurvey]) -> dict[str, Any]:
    """Return surveys as JSON can hold them."""
    return {
        "at_ms": found[0].at_ms if found else 0,
        "pending": sum(one.pending for one in found),
        "parked": sum(one.parked for one in found),
        "dead": sum(one.dead for one in found),
        "outboxes": [_outbox_as_data(one) for one in found],
    }


def _outbox_as_data(one: OutboxSurvey) -> dict[str, Any]:
    held = one.holder
    return {
        "path": str(one.path),
        "destination": one.destination,
        "destination_state": one.note.state,
        "destination_since_ms": one.note.since_ms or None,
        "last_error": one.last_error or None,
        "pending": one.pending,
        "parked": one.parked,
        "dead": one.dead,
        "delivered": one.delivered,
        "refused": dict(one.refused),
        "unreadable_segments": one.unreadable,
        "bytes": one.waiting_bytes,
        "oldest_seconds": round(one.oldest_seconds, 3),
        "events_per_second": round(one.rate, 1),
        "eta_seconds": None if one.eta_seconds is None else round(one.eta_seconds, 1),
        "worker": None if held is None else {"host": held.host, "pid": held.pid, "kind": held.kind},
        "ledger_problem": one.unread or None,
        "disk_problem": one.unlisted or None,
        "runs": [_run_as_data(run) for run in one.runs],
    }


def _run_as_data(run: RunSurvey) -> dict[str, Any]:
    record = run.record
    return {
        "run_id": run.run_id,
        "mlflow_run_id": record.remote_id or None if record is not None else None,
        "experiment": run.experiment or None,
        "state": run.state,
        "pending": run.pending,
        "parked": run.parked,
        "dead": run.dead,
        "bytes": run.waiting_bytes,
        "oldest_ms": run.oldest_ms or None,
        "delivered": record.delivered if record is not None else 0,
        "quarantined": record.quarantined if record is not None else 0,
        "missing": record.missing if record is not None else 0,
        "reason": (record.reason or record.mismatch or None) if record is not None else None,
    }


def _show(found: list[OutboxSurvey]) -> None:
    for number, one in enumerate(found):
        if number:
            terminal.say("")
        _show_outbox(one)
    if len(found) > 1:
        total = sum(one.pending for one in found), sum(one.parked for one in found), sum(one.dead for one in found)
        terminal.say("")
        terminal.say(
            f"all {len(found)} outboxes: {wording.count(total[0], 'event')} waiting, "
            f"{total[1]:,} parked, {wording.count(total[2], 'dead letter')}"
        )


def _show_outbox(one: OutboxSurvey) -> None:
    terminal.styled(Styled(printable(one.path, 300), "bold"), " -> ", printable(one.destination, 300))
    for line in sentences(one):
        terminal.styled("  ", line)
    rows = [_row(run, one.at_ms) for run in _noteworthy(one)]
    if not rows:
        return
    shown = rows if terminal.is_verbose() else rows[:_LISTED]
    columns = [
        Column("run"),
        Column("state"),
        Column("events", right=True),
        Column("size", right=True, rank=1),
        Column("oldest", right=True, rank=2),
        Column("delivered", right=True, rank=4),
        Column("dead", right=True, rank=3),
        Column("experiment", rank=5, cut=True),
        Column("why", rank=6, cut=True),
    ]
    terminal.table(columns, shown)
    if len(shown) < len(rows):
        terminal.say(f"and {len(rows) - len(shown):,} more runs; -v lists all")


def _noteworthy(one: OutboxSurvey) -> list[RunSurvey]:
    some = [run for run in one.runs if run.waiting or run.dead or run.state == "parked"]
    return sorted(some, key=lambda run: (not run.parked, -run.waiting, run.run_id))


def _row(run: RunSurvey, at_ms: int) -> list[Cell]:
    record = run.record
    style = {"parked": "red", "waiting": "yellow", "dead letters": "magenta"}.get(run.state, "")
    return [
        short(run.run_id),
        Styled(run.state, style),
        wording.count(run.waiting),
        wording.size(run.waiting_bytes) if run.waiting else "-",
        wording.span((at_ms - run.oldest_ms) / 1000) if run.oldest_ms else "-",
        wording.count(record.delivered) if record is not None else "0",
        Styled(wording.count(run.dead), "magenta" if run.dead else ""),
        run.experiment or "-",
        (record.reason or record.mismatch) if record is not None else "",
    ]


def short(run_id: str) -> str:
    """Return a run's id, cut on a terminal to what is enough to name it by, unless --verbose was given."""
    if terminal.is_verbose() or not terminal.is_terminal():
        return run_id
    return provisional.beginning(run_id, _SHORT)


def sentences(one: OutboxSurvey) -> list[Cell]:
    """Return in words what waits in an outbox, why, and who delivers it."""
    lines: list[Cell] = []
    age = f", the oldest for {wording.span(one.oldest_seconds)}" if one.oldest_seconds else ""
    if one.pending:
        pace = f"; {one.rate:,.0f} a second arrive" if one.rate else ""
        eta = f", all in about {wording.span(one.eta_seconds)}" if one.eta_seconds is not None else ""
        wait = "event waits" if one.pending == 1 else "events wait"
        lines.append(Styled(f"{one.pending:,} {wait} ({wording.size(one.waiting_bytes)}{age}){pace}{eta}", "yellow"))
    if one.parked:
        lines.append(
            Styled(
                f"{wording.count(one.parked, 'event')} parked: a person is needed"
                + (f" ({wording.size(one.waiting_bytes)}{age})" if not one.pending else ""),
                "red",
            )
        )
    if not one.pending and not one.parked:
        lines.append(Styled("nothing waits", "green"))
    if one.note.state != "ok":
        span = f" for {wording.span((one.at_ms - one.note.since_ms) / 1000)}" if one.note.since_ms else ""
        word = "has refused events" if one.note.state == "parked" else "has not taken events"
        lines.append(Styled(f"the destination {word}{span}: {one.note.reason}", "red"))
    if one.dead:
        lines.append(Styled(f"{wording.count(one.dead, 'dead letter')}; see: mlflow-outbox dead list", "magenta"))
    if one.refused:
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in sorted(one.refused.items()))
        lines.append(Styled(f"programs refused events, which are nowhere: {printable(reasons, 300)}", "red"))
    if one.unlisted:
        lines.append(Styled(f"the disk does not tell which runs there are: {one.unlisted}", "red"))
    elif one.unreadable:
        lines.append(Styled(wording.unreadable(one.unreadable), "red"))
    if one.unread:
        lines.append(Styled(f"what was delivered cannot be told now: {one.unread}", "red"))
    lines.append(_who(one))
    return lines


def _who(one: OutboxSurvey) -> str:
    if one.holder is None:
        return "nobody delivers" + ("; mlflow-outbox flush does" if one.pending or one.parked else "")
    from mlflow_outbox_worker.host_lease import described, is_elsewhere

    return f"{described(one.holder)} delivers" + ("; how far it is can only be seen there" * is_elsewhere(one.holder))
