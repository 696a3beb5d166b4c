"""``mlflow-outbox dead``: the events that MLflow refused for good, and what to do with them.

All of it works while programs log to the outbox and a worker delivers it. No letter is lost: one that is sent again
leaves the queue only after its event is on disk to stay, and one that is dropped is printed first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import click

from mlflow_outbox.counters import printable
from mlflow_outbox.errors import LedgerUnavailable, OutboxUnusable
from mlflow_outbox_worker import wording
from mlflow_outbox_worker.cli import lines, outboxes, terminal
from mlflow_outbox_worker.cli.declare import Argument, Group, Option, command
from mlflow_outbox_worker.cli.exits import CommandFailed, ExitCode
from mlflow_outbox_worker.cli.options import AsJson, OutboxDir, Quiet, Verbose
from mlflow_outbox_worker.cli.status import short
from mlflow_outbox_worker.cli.terminal import Cell, Column, Styled

if TYPE_CHECKING:
    from pathlib import Path

    from mlflow_outbox.settings import Settings
    from mlflow_outbox.spool.directory import OutboxDirectory
    from mlflow_outbox.spool.events import Event
    from mlflow_outbox_worker.ledger import Ledger
    from mlflow_outbox_worker.records import DeadLetter

_Id = Annotated[str, Argument(metavar="ID", about="A letter's number, as `dead list` shows it.")]
_Yes = Annotated[bool, Option("--yes", "-y", about="Do not ask.")]

_HELP = """Events that MLflow refused for good: list, show, retry, edit or drop them.

\b
Examples:
  mlflow-outbox dead list
  mlflow-outbox dead show 7
  mlflow-outbox dead retry --all
  mlflow-outbox dead edit 7 --set value=0.01
  mlflow-outbox dead drop 7 --yes
"""


def register(app: click.Group) -> None:
    """Add the commands."""
    group = Group("dead", _HELP)
    for name, function in (("list", listed), ("show", show), ("retry", retry), ("edit", edit), ("drop", drop)):
        group.add_command(command(name, function))
    app.add_command(group)


def listed(
    outbox_dir: OutboxDir = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> int:
    """List the dead letters, oldest first, with MLflow's reasons.

    \b
    Examples:
      mlflow-outbox dead list
      mlflow-outbox dead list --json | jq -r '.[].reason' | sort | uniq -c
    """
    terminal.behave(quiet=quiet, verbose=verbose)
    settings = outboxes.settings_for(outbox_dir)
    found: list[tuple[OutboxDirectory, DeadLetter]] = []
    usable = outboxes.open_usable(settings)
    code, unread = usable.name_refused(), False
    for directory in usable.directories:
        try:
            with outboxes.ledger_of(directory, settings) as ledger:
                found += [(directory, letter) for letter in ledger.dead_letters()]
        except (LedgerUnavailable, OutboxUnusable) as error:  # the others' are listed all the same
            terminal.error(str(error))
            code, unread = ExitCode.ERROR, True
    if as_json:
        terminal.raw(lines.dumps([as_data(directory.path, letter) for directory, letter in found], indent=2))
        return code
    if not found:
        if not unread:
            terminal.say("there are no dead letters")
        return code
    is_shared = len({directory.path for directory, _ in found}) > 1  # a number is an outbox's own
    columns = [
        Column("id", right=True),
        *([Column("outbox", cut=True)] if is_shared else []),
        Column("run", rank=2),
        Column("event", cut=True),
        Column("refused", rank=3),
        Column("reason", rank=1, cut=True),
    ]
    rows: list[list[Cell]] = [
        [
            letter.number,
            *([directory.path.name] if is_shared else []),
            short(letter.run_id),
            in_words(letter),
            wording.moment(letter.time_ms),
            Styled(letter.reason, "magenta"),
        ]
        for directory, letter in found
    ]
    if not quiet:
        terminal.table(columns, rows)
    return code


def show(
    letter_id: _Id,
    outbox_dir: OutboxDir = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> int:
    """Show a dead letter in full: the event, and what MLflow answered.

    \b
    Examples:
      mlflow-outbox dead show 7
    """
    terminal.behave(quiet=quiet, verbose=verbose)
    settings = outboxes.settings_for(outbox_dir)
    directory, letter = _one(settings, letter_id)
    if as_json:
        terminal.raw(lines.dumps(as_data(directory.path, letter), indent=2))
        return ExitCode.DONE
    pairs: list[tuple[str, Cell]] = [
        ("dead letter", Styled(letter.number, "bold")),
        ("run", letter.run_id),
        ("in MLflow as", letter.remote_id or "-"),
        ("refused", wording.moment(letter.time_ms)),
        ("reason", Styled(letter.reason, "magenta")),
        ("answer", " ".join(filter(None, [str(letter.status or ""), letter.code])) or "none: it was never sent"),
    ]
    event = _event(letter)
    if event is None:
        pairs.append(("event", f"{len(letter.payload)} bytes of a kind that this version does not know"))
    else:
        pairs.append(("event", lines.kind_of(event)))
        pairs += [(f"  {name}", str(value)) for name, value in lines.as_data(event).items() if name != "kind"]
        from mlflow_outbox_worker.letters import fields_of

        pairs.append(("can be edited", ", ".join(fields_of(event)) or "no"))
    terminal.pairs(pairs)
    return ExitCode.DONE


def retry(
    letter_ids: Annotated[
        list[str] | None, Argument(metavar="[ID]...", about="Letters, as `dead list` shows them.")
    ] = None,
    every: Annotated[bool, Option("--all", about="All dead letters.")] = False,
    outbox_dir: OutboxDir = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> int:
    """Send dead letters again, for instance after MLflow's limits were changed.

    \b
    Examples:
      mlflow-outbox dead retry 7 8
      mlflow-outbox dead retry --all && mlflow-outbox flush
    """
    terminal.behave(quiet=quiet, verbose=verbose)
    if bool(letter_ids) == every:
        msg = "name the letters to send again, or give --all"
        raise CommandFailed(msg, ExitCode.USAGE)
    from mlflow_outbox_worker.letters import send_all_again

    settings = outboxes.settings_for(outbox_dir)
    sent = stay = 0
    code = ExitCode.DONE
    if every:
        usable = outboxes.open_usable(settings)
        directories, code = usable.directories, usable.name_refused()
    else:
        directories = [*_holding(settings, letter_ids or [])]
    for directory in directories:
        try:
            with outboxes.ledger_of(directory, settings, write=True) as ledger:
                letters = list(ledger.dead_letters()) if every else _letters(ledger, letter_ids or [])
                done = send_all_again(directory, ledger, settings, letters, lambda error: terminal.error(str(error)))
                sent, stay = sent + done, stay + len(letters) - done
        except (LedgerUnavailable, OutboxUnusable) as error:
            if not every:
                raise
            terminal.error(str(error))  # the others' are sent all the same
            code = ExitCode.ERROR
        _hurry(directory)
    again = f"{wording.count(sent, 'event')} will be sent again; mlflow-outbox flush does it now"
    terminal.say(f"{again}; {wording.count(stay, 'dead letter')} cannot be sent" if stay else again)
    return ExitCode.ERROR if stay else code


def edit(
    letter_id: _Id,
    changes: Annotated[
        list[str], Option("--set", metavar="FIELD=VALUE", about="A field and its new value, for instance key=lr.")
    ],
    outbox_dir: OutboxDir = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> int:
    """Change a dead letter's key, value, step, time_ms, path or status, and send it again.

    The new value is checked as a logging call checks it. What was logged first is remembered as replaced.

    \b
    Examples:
      mlflow-outbox dead edit 7 --set key=learning_rate_2
      mlflow-outbox dead edit 8 --set value=0.01 --set step=3
    """
    terminal.behave(quiet=quiet, verbose=verbose)
    from mlflow_outbox_worker.letters import changed, event_of, fields_of, send_again

    fields: dict[str, str] = {}
    for change in changes:
        name, sign, value = change.partition("=")
        if not sign:
            msg = f"--set {printable(change)} has no value; write FIELD=VALUE, for instance key=lr"
            raise CommandFailed(msg, ExitCode.USAGE)
        fields[name.strip()] = value
    settings = outboxes.settings_for(outbox_dir)
    directory, letter = _one(settings, letter_id)
    event = event_of(letter)
    possible = fields_of(event)
    if unknown := sorted(fields.keys() - set(possible)):
        msg = f"--set {printable(unknown[0])} names no field of this event; " + (
            f"it has {', '.join(possible)}" if possible else "nothing of it can be changed: send it again or drop it"
        )
        raise CommandFailed(msg, ExitCode.USAGE)
    replacement = changed(event, fields)
    with outboxes.ledger_of(directory, settings, write=True) as ledger:
        send_again(directory, ledger, settings, letter, replacement)
    _hurry(directory)
    terminal.say(f"will be sent: {lines.in_words(replacement)}")
    return ExitCode.DONE


def drop(
    letter_ids: Annotated[list[str], Argument(metavar="ID...", about="Letters, as `dead list` shows them.")],
    outbox_dir: OutboxDir = None,
    yes: _Yes = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> int:
    """Drop dead letters for good; each is printed as JSON first.

    \b
    Examples:
      mlflow-outbox dead drop 7
      mlflow-outbox dead drop 7 8 --yes > dropped.json
    """
    terminal.behave(quiet=quiet, verbose=verbose)
    settings = outboxes.settings_for(outbox_dir)
    for directory in _holding(settings, letter_ids):
        with outboxes.ledger_of(directory, settings) as ledger:
            letters = _letters(ledger, letter_ids)
        try:
            for letter in letters:
                terminal.record(lines.dumps(as_data(directory.path, letter)))
        except OSError as error:
            msg = f"nothing was dropped: what would be cannot be printed: {error.strerror or error}"
            raise CommandFailed(msg) from error
        question = f"Drop {wording.count(len(letters), 'dead letter')} for good?"
        if not terminal.confirm(question, assume_yes=yes):
            msg = "nothing was dropped; give --yes to drop without being asked"
            raise CommandFailed(msg)
        with outboxes.ledger_of(directory, settings, write=True) as ledger:
            dropped = sum(ledger.settle_dead_letter(letter) for letter in letters)
        terminal.note(f"{wording.count(dropped, 'dead letter')} dropped")
    return ExitCode.DONE


def as_data(path: Path, letter: DeadLetter) -> dict[str, Any]:
    """Return a dead letter as JSON can hold it.

    Args:
        path: where its run comes from.
        letter: the letter.
    """
    event = _event(letter)
    return {
        "id": letter.number,
        "outbox": str(path),
        "run_id": letter.run_id,
        "mlflow_run_id": letter.remote_id or None,
        "reason": letter.reason,
        "code": letter.code or None,
        "status": letter.status,
        "refused_ms": letter.time_ms,
        "event": None if event is None else lines.as_data(event),
        "payload": letter.payload.hex() if event is None else None,
    }


def _event(letter: DeadLetter) -> Event | None:
    from mlflow_outbox_worker.letters import LetterRefused, event_of

    with contextlib.suppress(LetterRefused):
        return event_of(letter)
    return None


def in_words(letter: DeadLetter) -> str:
    """Return the event of a dead letter as a line for people."""
    event = _event(letter)
    return "unknown" if event is None else lines.in_words(event)


def _stored_id(text: str) -> str:
    if not text.isascii() or not text.isdigit():
        msg = f"{printable(repr(text))} is no letter's number; mlflow-outbox dead list shows them"
        raise CommandFailed(msg, ExitCode.USAGE)
    return text.lstrip("0").zfill(12)


def _stored_ids(letter_ids: list[str]) -> list[str]:
    """Return the ids of letters that a person has named, each once: 1 and 01 are one."""
    return list(dict.fromkeys(_stored_id(text) for text in letter_ids))


def _letters(ledger: Ledger, letter_ids: list[str]) -> list[DeadLetter]:
    found = [ledger.dead_letter(stored) for stored in _stored_ids(letter_ids)]
    return [letter for letter in found if letter is not None]


def _holding(settings: Settings, letter_ids: list[str]) -> Iterator[OutboxDirectory]:
    """Yield the one outbox that holds all the letters; numbers are an outbox's own, so several could be meant."""
    directories = outboxes.open_all(settings)
    holding: list[OutboxDirectory] = []
    unread: LedgerUnavailable | OutboxUnusable | None = None
    for directory in directories:
        try:
            with outboxes.ledger_of(directory, settings) as ledger:
                if len(_letters(ledger, letter_ids)) == len(_stored_ids(letter_ids)):
                    holding.append(directory)
        except (LedgerUnavailable, OutboxUnusable) as error:  # `dead list` shows the others' alone, too
            unread = error
    if unread is not None and not holding:
        raise unread
    if len(holding) == 1:
        yield holding[0]
        return
    shown = ", ".join(printable(text) for text in letter_ids)
    if holding:
        msg = f"{len(holding)} outboxes have a dead letter {shown}; name one with --outbox-dir"
    else:
        msg = f"there is no dead letter {shown}; mlflow-outbox dead list shows those that there are"
    raise CommandFailed(msg, ExitCode.USAGE)


def _one(settings: Settings, letter_id: str) -> tuple[OutboxDirectory, DeadLetter]:
    for directory in _holding(settings, [letter_id]):
        with outboxes.ledger_of(directory, settings) as ledger:
            for letter in _letters(ledger, [letter_id]):
                return directory, letter
    msg = f"the dead letter {printable(letter_id)} has just been dealt with; mlflow-outbox dead list shows the others"
    raise CommandFailed(msg)


def _hurry(directory: OutboxDirectory) -> None:
    with contextlib.suppress(OSError):  # without it the worker sends them at its own pace
        directory.ask_hurry()
