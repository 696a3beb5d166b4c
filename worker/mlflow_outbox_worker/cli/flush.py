"""``mlflow-outbox flush``: deliver now what is there, and say what is left.

Where a worker holds the outbox it is asked to hurry, which cuts its back-off short, and watched; where nobody does,
or the worker ends meanwhile, the command delivers itself. What counts are the events on disk when the command
began: a program that goes on logging keeps nobody waiting for ever. An ended run counts as delivered once it has
been read back.
"""

from __future__ import annotations

import contextlib
import json
import time
from typing import TYPE_CHECKING, Annotated, Any, Final, NamedTuple

import click

from mlflow_outbox import stopwatch
from mlflow_outbox.counters import printable
from mlflow_outbox.errors import LedgerUnavailable, OutboxUnusable
from mlflow_outbox_worker import wording
from mlflow_outbox_worker.cli import clock, outboxes, terminal
from mlflow_outbox_worker.cli.declare import Option, command
from mlflow_outbox_worker.cli.delivering import CommandWorker
from mlflow_outbox_worker.cli.exits import ExitCode, most_urgent, of_backlog
from mlflow_outbox_worker.cli.options import AsJson, OutboxDir, Quiet, Verbose
from mlflow_outbox_worker.cli.signals import Ending

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mlflow_outbox.settings import Settings
    from mlflow_outbox.spool.directory import OutboxDirectory
    from mlflow_outbox_worker.records import RunRecord

#: Seconds without any progress after which a flush without a time-out gives up, unless it is sending something.
_PATIENCE: Final = 60.0
#: Seconds between two looks at the ledger: at first, and at most.
_LOOK: Final = 0.02
_LOOK_MOST: Final = 0.5
#: Seconds between two glances at a worker of this process, which cost nothing beside a look.
_GLANCE: Final = 0.03
#: Seconds between two calls to hurry: a server that has just come back is tried at once.
_HURRY: Final = 1.0
#: Seconds that the end waits for requests under way.
_PARTING: Final = 0.5
#: Seconds by which the last look may come too late; in an outbox with thousands of runs one takes as long.
_LATE: Final = 0.2


def register(app: click.Group) -> None:
    """Add the command."""
    app.add_command(command("flush", flush))


def flush(
    outbox_dir: OutboxDir = None,
    timeout: Annotated[
        float | None,
        Option(
            least=0,
            metavar="S",
            about="Seconds to take at most, also when the server hangs.",
            default="go on as long as events arrive",
        ),
    ] = None,
    run: Annotated[
        str | None,
        Option("--run", metavar="ID", filled=True, about="Wait for this run only.", words=outboxes.run_words),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> int:
    """Deliver what is there now, and say what is left.

    A worker that has the outbox already is asked to hurry; otherwise this command delivers. Without --timeout it
    gives up after a minute in which nothing arrived and nothing was being sent.

    \b
    Examples:
      mlflow-outbox flush
      mlflow-outbox flush --timeout 60 || echo "not all delivered: $?"
      mlflow-outbox flush --run 3f9c --timeout 10
    """
    started = clock.began()
    terminal.behave(quiet=quiet or as_json, verbose=verbose)
    settings = outboxes.settings_for(outbox_dir)
    usable = outboxes.open_usable(settings)
    directories, codes, chosen = usable.directories, [usable.name_refused()], None
    if run is not None:
        directory, chosen = outboxes.find_run(directories, settings, run)
        directories, codes = [directory], []
    flushes = [Flush(directory, settings, chosen) for directory in directories]
    with Ending(forceful=True) as ending:
        _until_done(flushes, started, timeout, ending)
        for one in flushes:
            one.conclude()
        deadline = stopwatch.seconds() + _PARTING
        for one in flushes:
            one.stop(max(0.0, deadline - stopwatch.seconds()))
        for one in flushes:
            one.say()
        if as_json:
            terminal.raw(json.dumps([one.as_data() for one in flushes], indent=2))
        return ExitCode.INTERRUPTED if ending.interrupted else most_urgent([*codes, *(one.code() for one in flushes)])


def _until_done(flushes: list[Flush], started: float, timeout: float | None, ending: Ending) -> None:
    look, changed, next_hurry = _LOOK, stopwatch.seconds(), 0.0
    with terminal.progress() as show:
        begin = stopwatch.seconds()
        for one in flushes:
            one.look()
        took = stopwatch.seconds() - begin
        for one in flushes:
            one.start()
        while not all(one.is_done() or one.read_only for one in flushes):
            now = stopwatch.seconds()
            if timeout is not None and now - started + max(0.0, took - _LATE) >= timeout:
                ending.wait(max(0.0, started + timeout - now))
                return
            if now >= next_hurry:
                for one in flushes:
                    one.hurry()
                next_hurry = now + _HURRY
            before = [one.rest for one in flushes]
            # Large files arrive after minutes. Asked before the look, which then tells what has come of it.
            sends = any(one.is_sending() for one in flushes)
            begun = stopwatch.processor_seconds()
            for one in flushes:
                one.look()
            took = stopwatch.seconds() - now
            if before != [one.rest for one in flushes]:
                changed = stopwatch.seconds()
            elif timeout is None and not sends and now - changed > _PATIENCE:
                return
            show(_progress(flushes))
            # A large backlog takes time to measure: most of it is the worker's.
            pause = max(look, 4 * (stopwatch.processor_seconds() - begun))
            most = None if timeout is None else max(0.0, started + timeout - stopwatch.seconds())
            if _rest(flushes, pause, most, ending):
                return
            look = min(_LOOK_MOST, look * 1.2)


def _rest(flushes: Sequence[Flush], pause: float, most: float | None, ending: Ending) -> bool:
    """Wait until the next look is due; return whether a signal has come.

    A look has some fifty calls of SQLite, after each of which it may wait for a worker of this process to give the
    interpreter away. While such a one delivers it is left to it, and looked at again as soon as it is through.

    Args:
        flushes: what is under way.
        pause: seconds, while no worker of this process delivers.
        most: seconds; None means any.
        ending: tells of signals.
    """
    at_work = [one for one in flushes if one.is_at_work()]
    if at_work:
        pause = max(pause, _LOOK_MOST)
    over = stopwatch.seconds() + (pause if most is None else min(pause, most))
    while (rest := over - stopwatch.seconds()) > 0:
        if ending.wait(min(rest, _GLANCE) if at_work else rest):
            return True
        if not all(one.is_at_work() for one in at_work):
            return False
    return False


def _progress(flushes: list[Flush]) -> str:
    total, rest = sum(one.total for one in flushes), sum(one.left for one in flushes)
    if total and not rest:
        return f"{total:,} events delivered, reading back"
    return f"{total - rest:,} of {wording.count(total, 'event')} delivered"


class _Look(NamedTuple):
    """What one look at the ledger tells of the events that the flush is about."""

    pending: int = 0
    parked: int = 0
    unread_back: int = 0
    dead: int = 0
    #: Events all of which MLflow refused, ever; letters are counted apart.
    refused: int = 0
    reason: str = ""
    #: All that is parked was tried since the flush began.
    parked_for_sure: bool = False
    #: Changes while a worker, whichever it is, sends something that takes long.
    sending: bytes = b""


class Flush:
    """The flush of one outbox.

    Args:
        directory: the outbox.
        settings: the options.
        run_id: the only run to wait for; None means all.
    """

    def __init__(self, directory: OutboxDirectory, settings: Settings, run_id: str | None = None) -> None:
        from mlflow_outbox_worker.backlog import Targets

        self._directory = directory
        self._settings = settings
        self._run_id = run_id
        self._ends: Targets | None = None
        self._unread: dict[str, OSError] = {}  # runs that the disk does not let be read; each counts as one event
        self._seen = _Look()
        self._began_ms = time.time_ns() // 1_000_000
        self._tried = False  # an attempt was made since this began, by whichever worker
        self._held_by = ""
        self._worker: CommandWorker | None = None
        self._trouble = ""
        self._refused_before: int | None = None
        self._unreadable = 0
        #: The runs with segments that the first look could not read; None before it.
        self._suspects: set[str] | None = None
        #: Nothing can be noted there, so nothing can be delivered from there.
        self.read_only = outboxes.read_only(directory.path) != ""
        self.total = 0

    def __repr__(self) -> str:
        return f"<Flush of {str(self._directory.path)!r}, {self.left} of {self.total} events left>"

    @property
    def left(self) -> int:
        """Events that have not arrived yet."""
        return self._seen.pending + self._seen.parked

    @property
    def rest(self) -> tuple[int, int, bytes]:
        """Events that have not arrived yet, runs that were not read back, and the worker's note that it is sending."""
        return self.left, self._seen.unread_back, self._seen.sending

    def start(self) -> None:
        """Begin to deliver, unless there is nothing to do; while another worker has the outbox, stand by."""
        if not self.is_done() and not self.read_only:
            self._worker = CommandWorker(self._directory, self._settings)
            self._worker.start()

    def hurry(self) -> None:
        """Ask whichever worker delivers to do so at once."""
        with contextlib.suppress(OSError):  # a full or read-only disk: the worker goes on at its own pace
            self._directory.ask_hurry()

    def is_at_work(self) -> bool:
        """Return whether the worker of this flush sends at this moment."""
        return self._worker is not None and self._worker.delivery.is_at_work()

    def is_sending(self) -> bool:
        """Return whether the worker of this flush is in the middle of something that may well arrive."""
        return self._worker is not None and self._worker.delivery.is_sending()

    def conclude(self) -> None:
        """Let the delivery end after the requests under way, and see what stood in its way."""
        from mlflow_outbox_worker.backlog import unreadable

        if self._worker is not None:
            self._held_by = self._other_worker(self._worker)
            self._worker.ask_to_stop()
        runs = self._suspects
        if runs is None:
            runs = set(self._directory.run_ids() if self._run_id is None else [self._run_id])
        self._unreadable = unreadable(self._directory, runs)

    def _other_worker(self, own: CommandWorker) -> str:
        """Return who delivers, where nothing has come of it; "" for nobody else."""
        from mlflow_outbox_worker.host_lease import described, is_elsewhere

        nothing = self._seen.pending > 0 and self.left >= self.total and not self._tried
        found = own.delivery.other_worker() if nothing and not own.delivery.holds_lease() else None
        if found is None:
            return ""
        silence = "; how far it is can only be seen there" if is_elsewhere(found) else " and has not answered"
        return f"{described(found)} has this outbox{silence}"

    def stop(self, timeout: float) -> None:
        """End the delivery; a request that hangs is left to itself.

        Args:
            timeout: seconds to wait.
        """
        if self._worker is not None:
            self._worker.stop(timeout)

    def is_done(self) -> bool:
        """Return whether everything has arrived, or has been tried and waits for a person."""
        seen = self._seen
        return (
            not self._trouble
            and not seen.pending
            and not seen.unread_back
            and (not seen.parked or seen.parked_for_sure)
        )

    def look(self) -> None:
        """Find out how far it is."""
        from mlflow_outbox_worker.backlog import left, targets
        from mlflow_outbox_worker.notes import destination_note, last_tried_ms, sending_note

        try:
            with outboxes.ledger_of(self._directory, self._settings) as ledger:
                records = {record.run_id: record for record in ledger.records()}
                note, sending = destination_note(ledger), sending_note(ledger)
                letters = ledger.dead_letter_counts()
            self._trouble = ""
        except (LedgerUnavailable, OutboxUnusable) as error:
            # A worker makes it, or sets it aside, at this moment; or nobody can read it, which the end will tell.
            self._trouble = str(error)
            if self._ends is not None:
                return
            records, note, letters, sending = {}, None, {}, b""
        only = None if self._run_id is None else [self._run_id]
        try:
            suspects = self._suspects or set()
            self._ends = targets(
                *(self._directory, records, self._unread), before=self._ends, only=only, suspect=suspects.add
            )
            self._suspects = suspects
        except OSError as error:
            self._trouble = printable(str(error), 300)
            return
        parked_all = note is not None and note.state == "parked"
        if (
            self._directory.network
        ):  # what another machine delivers is in its ledger; here it shows by what it has filed
            self._ends = {run: ends for run, ends in self._ends.items() if self._directory.run(run).exists()}
        parts = {run: left(ends, records.get(run), parked=parked_all) for run, ends in self._ends.items()}
        parked = [run for run, part in parts.items() if part.parked]
        if note is not None and note.tried_ms >= self._began_ms:
            self._tried = True
        sure = note is not None and all(last_tried_ms(note, records.get(run)) >= self._began_ms for run in parked)
        pending = sum(part.pending for part in parts.values()) + len(self._unread)
        self._seen = _Look(
            pending=pending,
            parked=sum(part.parked for part in parts.values()),
            unread_back=0 if pending or parked else self._unread_back(records),
            dead=letters.get(self._run_id, 0) if self._run_id is not None else sum(letters.values()),
            refused=sum(records[run].refused for run in self._ends if run in records),
            reason=_reason(records, parked, note.reason if note is not None and note.state != "ok" else ""),
            parked_for_sure=sure,
            sending=sending,
        )
        self.total = max(self.total, self.left)
        if self._refused_before is None:
            self._refused_before = self._seen.refused

    def _unread_back(self, records: dict[str, RunRecord]) -> int:
        """Return how many runs have ended and are not read back yet, although nobody writes to them any more."""
        from mlflow_outbox.spool.reader import RunReader
        from mlflow_outbox.spool.writer import writer_state

        number = 0
        for run_id in self._ends or ():
            record = records.get(run_id)
            if record is None or not record.ended or record.verified_at_ms or record.state != "active":
                continue
            segments = RunReader(self._directory.run(run_id)).segments()
            last = [held[-1] for held in segments.values()]
            number += bool(last) and all(writer_state(one.path, one.header).kind == "died" for one in last)
        return number

    def code(self) -> ExitCode:
        """Return the exit code for what was reached."""
        seen = self._seen
        if self._trouble or (self.read_only and not self.is_done()):
            return ExitCode.ERROR
        code = of_backlog(
            pending=seen.pending + seen.unread_back, parked=seen.parked, dead=seen.dead, unreadable=self._unreadable
        )
        return ExitCode.HELD if code is ExitCode.LEFT and self._held_by else code

    def as_data(self) -> dict[str, Any]:
        """Return what was delivered and what is left as JSON can hold it."""
        return {
            "path": str(self._directory.path),
            "delivered": self._done,
            "pending": self._seen.pending,
            "parked": self._seen.parked,
            "dead": self._seen.dead,
            "runs_not_read_back": self._seen.unread_back,
            "unreadable_segments": self._unreadable,
            "reason": self._trouble or self._held_by or self._seen.reason or None,
            "exit_code": int(self.code()),
        }

    @property
    def _done(self) -> int:
        """Events that have arrived since this began."""
        return max(0, self.total - self.left - max(0, self._seen.refused - (self._refused_before or 0)))

    def say(self) -> None:
        """Say what was delivered and what is left, and what to do about it."""
        seen = self._seen
        where = f"{printable(self._directory.path.name)}: "
        parts = [f"{wording.count(self._done, 'event')} delivered"] if self.total else ["nothing waits"]
        if seen.pending:
            parts.append(f"{seen.pending:,} left, on disk")
        if seen.parked:
            parts.append(f"{seen.parked:,} parked for a person")
        if seen.unread_back:
            parts.append(f"{wording.count(seen.unread_back, 'run')} not read back yet")
        if seen.dead:
            parts.append(f"{wording.count(seen.dead, 'dead letter')} (mlflow-outbox dead list)")
        terminal.say(where + ", ".join(parts))
        if self._unreadable:
            terminal.error(where + wording.unreadable(self._unreadable))
        if self._trouble:
            terminal.error(f"{where}how much has been delivered cannot be told: {self._trouble}")
        elif self.read_only and not self.is_done():
            terminal.error(outboxes.read_only(self._directory.path))
        elif self._held_by:
            terminal.note(f"{where}{self._held_by}")
        elif seen.pending and not (seen.reason or self._tried or self._done):
            terminal.note(f"{where}{self._directory.destination.uri} has not answered yet")
        elif seen.reason and self.left:
            terminal.note(f"{where}{seen.reason}")


def _reason(records: dict[str, RunRecord], parked: list[str], of_destination: str) -> str:
    if of_destination:
        return of_destination
    return next((f"run {run}: {records[run].reason}" for run in parked if run in records and records[run].reason), "")
