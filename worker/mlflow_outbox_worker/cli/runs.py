"""``mlflow-outbox runs`` and ``show``: read runs from the disk, whether MLflow has them or not, without asking it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Final

import click

from mlflow_outbox.counters import printable
from mlflow_outbox.errors import LedgerUnavailable, OutboxUnusable
from mlflow_outbox_worker import wording
from mlflow_outbox_worker.cli import lines, outboxes, terminal
from mlflow_outbox_worker.cli.declare import Argument, Option, command
from mlflow_outbox_worker.cli.exits import ExitCode
from mlflow_outbox_worker.cli.options import AsJson, OutboxDir, Quiet, Verbose
from mlflow_outbox_worker.cli.status import short
from mlflow_outbox_worker.cli.terminal import Cell, Column, Styled

if TYPE_CHECKING:
    from mlflow_outbox.settings import Settings
    from mlflow_outbox.spool.directory import OutboxDirectory
    from mlflow_outbox.spool.events import Event
    from mlflow_outbox.spool.reader import RunReader
    from mlflow_outbox.spool.window import Cursor
    from mlflow_outbox.views import RunView
    from mlflow_outbox_worker.ledger import Ledger
    from mlflow_outbox_worker.records import RunRecord

#: Events that ``runs`` reads in all; what waits beyond is counted, not read, so that the list does not take minutes.
_READ: Final = 300_000
#: Events read at once.
_WINDOW: Final = 20_000
#: Seconds between two looks of --follow.
_FOLLOW: Final = 0.3
#: Entries of params, tags, metrics and files shown of each, unless --verbose is given.
_SHOWN: Final = 30
_STYLES: Final = {"FAILED": "red", "KILLED": "red", "FINISHED": "green", "RUNNING": "yellow"}


def register(app: click.Group) -> None:
    """Add the commands."""
    app.add_command(command("runs", runs))
    app.add_command(command("show", show))


def runs(
    outbox_dir: OutboxDir = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> int:
    """List the runs that are on disk, newest first, with what of them waits.

    \b
    Examples:
      mlflow-outbox runs
      mlflow-outbox runs --json | jq -r '.[] | select(.pending > 0) | .run_id'
    """
    terminal.behave(quiet=quiet, verbose=verbose)
    settings = outboxes.settings_for(outbox_dir)
    entries: list[dict[str, Any]] = []
    usable = outboxes.open_usable(settings)
    code = usable.name_refused()
    for trouble in dict.fromkeys(_troubles(usable.directories, settings, entries)):
        terminal.error(trouble)
        code = ExitCode.ERROR
    entries.sort(key=lambda entry: entry["start_time_ms"] or 0, reverse=True)
    if as_json:
        terminal.raw(lines.dumps(entries, indent=2))
    elif not quiet:
        _list(entries)
    return code


def _troubles(directories: list[OutboxDirectory], settings: Settings, entries: list[dict[str, Any]]) -> Iterator[str]:
    """Add an entry for every run that can be read; yield what of the others, or of the ledgers, cannot."""
    budget = _READ
    for directory in directories:
        try:
            with outboxes.ledger_of(directory, settings) as ledger:
                for run_id in dict.fromkeys([*directory.run_ids(), *directory.delivered_ids()]):
                    try:
                        look = Look(directory, ledger, run_id)
                        read = look.pending <= budget
                        if read:
                            budget -= look.pending
                            look.fold()
                        entries.append(look.summary(read=read))
                    except OSError as error:
                        yield f"the run {run_id} cannot be read: {printable(error, 300)}"
                    else:
                        yield from filter(None, [look.trouble])
        except (LedgerUnavailable, OSError) as error:
            yield str(error)


def _list(entries: list[dict[str, Any]]) -> None:
    if not entries:
        terminal.say("no runs are on disk")
        return
    columns = [
        Column("run"),
        Column("name", rank=1, cut=True),
        Column("status"),
        Column("waiting", right=True),
        Column("delivered", right=True, rank=3),
        Column("dead", right=True, rank=4),
        Column("started", rank=2),
        Column("experiment", rank=5, cut=True),
        Column("mlflow run", rank=6),
    ]
    rows: list[list[Cell]] = [
        [
            short(entry["run_id"]),
            entry["name"] or "-",
            Styled(entry["status"] or "?", _STYLES.get(entry["status"] or "", "")),
            wording.count(entry["pending"]),
            wording.count(entry["delivered"]),
            wording.count(entry["dead"]),
            wording.moment(entry["start_time_ms"] or 0),
            entry["experiment"] or "-",
            entry["mlflow_run_id"] or "-",
        ]
        for entry in entries
    ]
    terminal.table(columns, rows)


def show(
    run: Annotated[
        str,
        Argument("RUN", "A run's id in the outbox or in MLflow, or the beginning of the former.", outboxes.run_words),
    ],
    outbox_dir: OutboxDir = None,
    as_json: Annotated[bool, Option("--json", about="Print every event on disk, one JSON object a line.")] = False,
    follow: Annotated[
        bool, Option("--follow", "-f", about="Go on with what is logged, until the run ends or its writer dies.")
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> int:
    """Show a run: params, last metrics, files, and how far its delivery is.

    \b
    Examples:
      mlflow-outbox show 3f9c
      mlflow-outbox show 3f9c --follow
      mlflow-outbox show 3f9c --json | jq -c 'select(.key == "loss")'
    """
    terminal.behave(quiet=quiet, verbose=verbose)
    settings = outboxes.settings_for(outbox_dir)
    directory, run_id = outboxes.find_run(outboxes.open_all(settings), settings, run)
    if as_json:
        _print_events(directory, run_id, follow=follow, show=_event_as_json)
        return ExitCode.DONE
    with outboxes.ledger_of(directory, settings) as ledger:
        look = Look(directory, ledger, run_id)
        look.fold()
        _describe(look, directory, settings)
    if follow:
        terminal.say("")
        _print_events(directory, run_id, follow=True, show=_event_in_words, cursors=look.cursors, ended=look.ended)
    return ExitCode.DONE


class Look:
    """One run, as the ledger and the journals together have it.

    Attributes:
        view: what was delivered, and after ``fold`` also what waits.
        pending: events that wait.
        cursors: how far the journals have been read.
    """

    def __init__(self, directory: OutboxDirectory, ledger: Ledger, run_id: str) -> None:
        from mlflow_outbox.spool.reader import RunReader
        from mlflow_outbox.views import RunView
        from mlflow_outbox_worker.backlog import left

        self.run_id = run_id
        self.directory = directory
        self.record: RunRecord | None = None
        self.view: RunView = RunView()
        self.dead = 0
        view = None
        self.trouble = ""
        try:
            self.record, view = ledger.record(run_id), ledger.view(run_id)
            self.dead = ledger.dead_letter_counts().get(run_id, 0)
        except (LedgerUnavailable, OutboxUnusable) as error:
            self.trouble = str(error)
        self.reader: RunReader = RunReader(directory.run(run_id))
        if self.record is not None and view is not None:
            self.view = view
            self.cursors: dict[str, Cursor] = dict(self.record.cursors)
        else:  # nothing was delivered, or the ledger was lost: read everything that is there
            self.reader = _everything(directory, run_id)
            self.cursors = {}
        part = left(self.reader.next_numbers(self.cursors), self.record, parked=False)
        self.pending = part.pending + part.parked
        self.parked = bool(part.parked)

    @property
    def ended(self) -> bool:
        """Whether the last status seen is a final one."""
        return self.view.end_time_ms is not None

    def fold(self) -> None:
        """Take everything that waits into account."""
        while True:
            window = self.reader.window(self.cursors, points=_WINDOW, items=_WINDOW)
            for writer, event in window.events:
                self.view.fold(event, writer)
            self.cursors = window.cursors
            if not window.more:
                return

    @property
    def experiment(self) -> str:
        """The name of the run's experiment."""
        header = next((held[0].header for held in _everything(self.directory, self.run_id).segments().values()), None)
        return header.experiment if header is not None else self.record.experiment if self.record is not None else ""

    def summary(self, *, read: bool) -> dict[str, Any]:
        """Return the run in a few fields.

        Args:
            read: the view is complete; otherwise name and status may not be known.
        """
        record = self.record
        known = read or record is not None
        return {
            "run_id": self.run_id,
            "mlflow_run_id": (record.remote_id or None) if record is not None else None,
            "name": self.view.title or None,
            "experiment": self.experiment or None,
            "status": self.view.status.value if known and read else None,
            "start_time_ms": self.view.start_time_ms or None,
            "end_time_ms": self.view.end_time_ms,
            "delivery": self.delivery(),
            "pending": self.pending,
            "delivered": record.delivered if record is not None else 0,
            "dead": self.dead,
        }

    def delivery(self) -> str:
        """Return in a word how far the delivery is."""
        if self.parked or (self.record is not None and self.record.state == "parked"):
            return "parked"
        if self.pending:
            return "waiting"
        return "verified" if self.record is not None and self.record.state == "done" else "sent"


def _everything(directory: OutboxDirectory, run_id: str) -> RunReader:
    from mlflow_outbox.spool.reader import RunReader

    return RunReader(directory.run(run_id), directory.delivered / run_id)


def _describe(look: Look, directory: OutboxDirectory, settings: Settings) -> None:  # noqa: ARG001 - one form for all parts
    view, record = look.view, look.record
    if terminal.is_quiet():
        return
    pairs: list[tuple[str, Cell]] = [
        ("run", Styled(look.run_id, "bold")),
        ("name", view.title or "-"),
        ("experiment", look.experiment or "-"),
        ("status", Styled(view.status.value, _STYLES.get(view.status.value, ""))),
        ("started", wording.moment(view.start_time_ms)),
    ]
    if view.end_time_ms is not None:
        pairs.append(("ended", wording.moment(view.end_time_ms)))
    if view.user:
        pairs.append(("user", view.user))
    pairs += [
        ("in MLflow as", record.remote_id if record is not None and record.remote_id else "not there yet"),
        ("outbox", str(directory.path)),
        ("delivery", _delivery(look)),
    ]
    if look.trouble:
        pairs.append(("ledger", Styled(look.trouble, "red")))
    terminal.pairs(pairs)
    _section("params", ["param", "value"], [[key, value] for key, value in view.params.items()])
    _section(
        "metrics",
        ["metric", "last", "step", "points"],
        [[key, f"{m.value:g}", str(m.step), wording.count(m.points)] for key, m in sorted(view.metrics.items())],
    )
    _section("tags", ["tag", "value"], [[key, held.value] for key, held in view.tags.items()])
    _section(
        "files", ["file", "size"], [[path, wording.size(held.size)] for path, held in sorted(view.artifacts.items())]
    )


def _delivery(look: Look) -> str:
    record = look.record
    text = {
        "parked": f"{wording.count(look.pending, 'event')} parked: a person is needed",
        "waiting": f"{look.pending:,} of its events wait",
        "sent": "everything so far is delivered",
        "verified": "everything is delivered and was read back",
    }[look.delivery()]
    parts = [text]
    if record is not None:
        parts += [
            f"{number:,} {word}"
            for word, number in (("quarantined", record.quarantined), ("missing", record.missing))
            if number
        ]
        if record.reason or record.mismatch:
            parts.append(record.reason or record.mismatch)
        if record.altered:
            parts.append(f"when it was read back {record.altered}")
    if look.dead:
        parts.append(wording.count(look.dead, "dead letter"))
    return "; ".join(parts)


def _section(title: str, heads: list[str], rows: list[list[str]]) -> None:
    if not rows:
        return
    terminal.say("")
    shown = rows if terminal.is_verbose() else rows[:_SHOWN]
    terminal.table(
        [Column(head, right=head in {"last", "step", "points", "size"}, cut=head == "value") for head in heads], shown
    )
    if len(shown) < len(rows):
        terminal.say(f"and {len(rows) - len(shown):,} more {title}; -v shows all")


def _event_as_json(writer: str, event: Event) -> None:
    terminal.raw(lines.as_json(event, writer=writer))


def _event_in_words(writer: str, event: Event) -> None:  # noqa: ARG001 - the form of both
    clock = time.strftime("%H:%M:%S", time.localtime(getattr(event, "time_ms", 0) / 1000))
    terminal.data(f"{clock}  {lines.in_words(event)}")


def _print_events(
    directory: OutboxDirectory,
    run_id: str,
    *,
    follow: bool,
    show: Callable[[str, Event], None],
    cursors: Mapping[str, Cursor] | None = None,
    ended: bool = False,
) -> None:
    """Print the events of a run that are on disk, filed ones included, and those that come.

    Args:
        directory: the outbox.
        run_id: the run.
        follow: go on until the run has ended, or nobody writes to it any more.
        show: prints one event.
        cursors: where to begin; None is the beginning.
        ended: the run has ended before these cursors.
    """
    import sys

    from mlflow_outbox.spool.events import RunEnded, RunStarted

    reader = _everything(directory, run_id)
    after = dict(cursors) if cursors is not None else first_cursors(reader)
    while True:
        window = reader.window(after, points=_WINDOW, items=_WINDOW)
        for writer, event in window.events:
            show(writer, event)
            if isinstance(event, RunEnded):
                ended = event.status not in {"RUNNING", "SCHEDULED"}
            elif isinstance(event, RunStarted):
                ended = False
        for broken in window.broken:
            where = f"bytes {broken.start} to {broken.end} of {printable(broken.path, 300)}"
            terminal.note(f"{where} are {broken.kind}: {broken.reason}")
        after = window.cursors
        if window.more:
            continue
        sys.stdout.flush()
        if not follow or (ended and not window.live):
            return
        if not window.live and not ended and not _is_written(directory, run_id):
            terminal.note("nobody writes to this run any more, although it has not ended")
            return
        time.sleep(_FOLLOW)


def _is_written(directory: OutboxDirectory, run_id: str) -> bool:
    """Return whether somebody may still write to a run, on another machine too."""
    from mlflow_outbox_worker.replay import GIVE_UP, life_of

    return life_of((directory.run(run_id),), GIVE_UP).startswith(("writing", "silent"))


def first_cursors(reader: RunReader) -> dict[str, Cursor]:
    """Return where each writer's first segment on disk begins; that earlier ones were reclaimed is no gap."""
    from mlflow_outbox.spool.window import Cursor

    return {
        writer: Cursor(held[0].header.ordinal, 0, held[0].header.first_seq)
        for writer, held in reader.segments().items()
    }
