"""Delivers one run: reads a window of its events, makes the planned requests, and only then records how far it got.

Exactly once in effect
----------------------
* A run is looked for by its tag before it is created, always (``counterparts``): whatever became of an earlier attempt,
  here or on another machine, it is found. The map from local to MLflow id is recorded before anything else is sent.
* The cursor moves after the answers, in one transaction with the view and the dead letters. A kill in between sends the
  window again: the stores keep a param, a tag, an artifact or (SQL stores) a metric point once however often it is
  sent.
* A store that does not deduplicate points (``file:``) gets a note in the ledger before a window is sent. If the note
  is still there at the next attempt, the window is compared with the run's history and only what is missing is sent.
  For such a store two identical points (key, value, time, step) are one, as they are for the others.
* A create whose answer was lost may still be carried out after the search that did not find it. So such a run is
  searched once more some time later and when it is complete, and an empty twin is deleted (``twins``).

How one request is made, and what becomes of one that is refused, stands in ``requests``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final, Literal, NamedTuple

from mlflow_outbox.counters import Counters, printable
from mlflow_outbox.settings import Settings
from mlflow_outbox.spool.events import Artifact, Event, Request, points_of
from mlflow_outbox.spool.reader import RunReader
from mlflow_outbox.spool.window import Cursor, Window
from mlflow_outbox.views import RunView
from mlflow_outbox_worker.calls import Calls
from mlflow_outbox_worker.copies import copying
from mlflow_outbox_worker.counterparts import Counterparts
from mlflow_outbox_worker.creation import Creation
from mlflow_outbox_worker.intake import Intake
from mlflow_outbox_worker.ledger import Ledger
from mlflow_outbox_worker.outcome import is_deleted
from mlflow_outbox_worker.planner import Call, Step, Upload, UploadFor, plan
from mlflow_outbox_worker.precedence import Waits
from mlflow_outbox_worker.quarantine import Quarantine
from mlflow_outbox_worker.reconciliation import Reconciliation
from mlflow_outbox_worker.records import DeadLetter, RunRecord
from mlflow_outbox_worker.refused import Refused
from mlflow_outbox_worker.requests import Later, Parked, Requests
from mlflow_outbox_worker.sink import Sink
from mlflow_outbox_worker.sources import Source
from mlflow_outbox_worker.volley import Volley

#: Batches of one run, as many as windows may hold, before other runs get their turn.
_TURN: Final = 16
#: Bytes of the files of a window that may take longer than whoever sends them has time.
LARGE: int = 64 * 1024 * 1024
#: Undo a deletion, after which MLflow takes what it has refused for that.
_RESTORATIONS: Final = frozenset({"restore_run", "restore_experiment"})
_UPLOADS: Final = (Upload, UploadFor)

Progress = Literal["more", "idle", "live"]


class Turn(NamedTuple):
    """What a turn of one run has come to.

    Attributes:
        progress: "more" to send at once, "idle" with everything sent, or "live": so too, but still being written.
        waits: not everything was sent, for something is on its way, to be looked for in a moment.
    """

    progress: Progress
    record: RunRecord
    view: RunView
    reader: RunReader
    waits: bool = False


class Courier:
    """Delivers runs, one turn at a time; used by several threads for different runs.

    Args:
        source: where the runs come from.
        sink: the tracking store.
        ledger: where progress is recorded.
        settings: batch size.
        counters: what happened, by reason.
        now_ms: wall-clock milliseconds since the epoch.
        stopped: asked between windows whether to leave off.
        beside: delivers other runs of the same outbox.
    """

    def __init__(
        self,
        source: Source,
        sink: Sink,
        ledger: Ledger,
        settings: Settings,
        counters: Counters,
        *,
        now_ms: Callable[[], int],
        stopped: Callable[[], bool] = lambda: False,
        beside: Courier | None = None,
    ) -> None:
        self._source = source
        self._sink = sink
        self._ledger = ledger
        self._settings = settings
        self._counters = counters
        self._now_ms = now_ms
        self._stopped = stopped
        precedence = beside._calls.precedence if beside is not None else None  # noqa: SLF001 - its own class's
        self._calls: Calls = Calls(source, sink, ledger, precedence)
        self._quarantine = Quarantine(source.quarantine, counters)
        self._reconciliation = Reconciliation(sink, ledger)
        self._counterparts = Counterparts(
            *(source, sink, ledger, settings, self._calls.ids),
            creation=Creation(ledger, self._count_letters, now_ms=now_ms),
            found=self._reconciliation.found,
            now_ms=now_ms,
        )
        self._requests = Requests(source, sink, self._calls, now_ms=now_ms)
        self._volley = Volley(self._requests, self._reconciliation.answered, sink, settings.parallel_runs)
        self._intake = Intake(settings.batch_points, counters)
        #: The writer of a run that used up its last turn.
        self._after: dict[str, str] = {}
        #: Runs of which this process has begun a window with large files.
        self._uploads: set[str] = set()
        #: Of runs that are deleted in MLflow: up to where no restoration is in their journals, and from where on.
        self._searched: dict[str, tuple[dict[str, Cursor], dict[str, Cursor]]] = {}

    def turn(self, run_id: str, *, windows: int | None = None) -> Turn:
        """Deliver what there is of a run, up to a fair share.

        Args:
            run_id: the run.
            windows: the share, in windows of one batch; None is the usual one.

        Raises:
            Later: try again after a pause.
            Parked: a person is needed.
            Waits: something of another run or room has to come first.
            LedgerUnavailable: the ledger could not be read or written; try again after a pause.
            OSError: the run's files could not be read; try again after a pause.
        """
        with self._volley.turn():
            return self._turn(run_id, windows or _TURN)

    def _turn(self, run_id: str, share: int) -> Turn:
        record = self._ledger.record(run_id) or RunRecord(run_id)
        view = self._ledger.view(run_id) or RunView()
        reader = RunReader(*self._source.folders(run_id), whole=copying(self._source))
        after = self._after.pop(run_id, "")
        self._go_on_with_large(record)
        batches = 1
        restored = False
        while share > 0:
            share -= batches
            files = len(view.artifacts) + sum(map(len, view.files.values()))
            window = self._intake.window(reader, record, after, batches=batches, files=files)
            window = self._known(run_id, window)
            # What a store may have already that keeps points twice is told by the order of windows (reconciliation).
            after = window.used_up_by if self._sink.deduplicates_metrics else ""
            if window.cursors == record.cursors and not window.events and not window.broken:
                return Turn("live" if window.live else "idle", record, view, reader, window.waits)
            try:
                if not self._delivered(record, view, reader, window):
                    continue
            except Later as later:
                self._note_failure(run_id, later)
                if later.outcome.alone:
                    self._note_obstacle(run_id, later.outcome.reason)
                if later.error.code == "BAD_REQUEST":  # a row was there: not all MLflows know NaN for what they have
                    self._reconciliation.found(run_id)
                raise
            except Waits as waits:
                self._calls.precedence.waits(run_id, waits.on)
                raise
            except Parked as parked:
                if not self._is_restored(record, reader, parked, before=restored):
                    self._note_failure(run_id, parked)
                    raise
                restored = True
                continue
            self._calls.precedence.goes_on(run_id)
            if not window.more:
                self._reconciliation.caught_up(run_id)
                return Turn("live" if window.live else "idle", record, view, reader, window.waits)
            if self._stopped():
                break
            batches = min(share, self._volley.width())
        self._after[run_id] = after
        return Turn("more", record, view, reader)

    def _is_restored(self, record: RunRecord, reader: RunReader, parked: Parked, *, before: bool) -> bool:
        """Restore at once what somebody has deleted, if that was logged behind what MLflow refuses for the deletion.

        In its turn it is asked for once more, which changes nothing.

        Args:
            record: the run or room.
            reader: of its journals.
            parked: the refusal.
            before: it was restored in this turn already, in vain.

        Returns:
            Whether it was.

        Raises:
            Waits: for the restoration of a run's experiment.
            Later: as ``turn``.
            Parked: as ``turn``.
        """
        if not is_deleted(parked.error):
            return False
        found = self._restoration(record, reader) if record.remote_id and not before else None
        if found is not None:
            self._requests.make(record, Call(found), Refused())
            return True
        self._calls.precedence.await_restoration(record)
        return False

    def _restoration(self, record: RunRecord, reader: RunReader) -> Request | None:
        """Return what undoes the deletion of a run or room; none of its journals is looked through twice in vain."""
        begin, cursors = self._searched.pop(record.run_id, ({}, {}))
        cursors = cursors if begin == record.cursors else record.cursors
        more = True
        while more:
            window = reader.window(cursors, points=100_000, items=100_000)
            for _, event in window.events:
                if isinstance(event, Request) and event.operation in _RESTORATIONS and not event.known:
                    return event
            cursors, more = window.cursors, window.more
        self._searched[record.run_id] = dict(record.cursors), cursors
        return None

    def _delivered(self, record: RunRecord, view: RunView, reader: RunReader, window: Window) -> bool:
        """Deliver a window; return False when it can be now, for what it waited for is in a journal that began later.

        Raises:
            Later: as ``turn``.
            Parked: as ``turn``.
            Waits: as ``turn``.
        """
        try:
            self._deliver(record, view, reader, window)
        except Waits as waits:
            if not self._made_ahead(record.run_id, waits):
                raise
            return False
        return True

    def _made_ahead(self, run_id: str, waits: Waits, *before: str) -> bool:
        """Make a model at once that a run waits for in vain; return whether that was done.

        Its creation is in a journal that is read later: of the same run, or of one that waits for this run itself.

        Raises:
            Later: as ``turn``.
            Parked: as ``turn``.
            Waits: for what its creation names, as ``turn``.
        """
        is_vain = waits.on == run_id or self._calls.precedence.waits_for(waits.on, run_id)
        record = self._ledger.record(waits.on) if is_vain and waits.what not in before else None
        if record is None or not record.remote_id:
            return False
        reader = RunReader(*self._source.folders(waits.on), whole=copying(self._source))
        try:
            return self._requests.make_ahead(record, reader, waits.what)
        except Waits as further:
            if not self._made_ahead(run_id, further, waits.what, *before):
                raise
            return True

    def _known(self, run_id: str, window: Window) -> Window:
        """Return a window of which nothing is missing that was filed: another machine has delivered that, perhaps."""
        filing = self._source.filing
        if not window.missing or filing is None or copying(self._source):
            return window
        filed = RunReader(filing.delivered / run_id).number_of(window.gaps)
        return window._replace(missing=window.missing - filed)

    def _note_failure(self, run_id: str, failure: Later | Parked) -> None:
        """Have the next windows hold less if something was answered before a failure: it would be sent at each try."""
        if failure.partly and self._sink.deduplicates_metrics:
            self._intake.failed(run_id)

    def _note_obstacle(self, run_id: str, reason: str) -> None:
        """Say which file it is that a run stands at, while the destination takes others."""
        record = self._ledger.record(run_id) or RunRecord(run_id)
        record.reason, record.failed_at_ms = reason, self._now_ms()
        self._ledger.commit(record)
        self._counters.add("files_not_taken")
        self._counters.warn_once(
            ("obstacle", run_id),
            f"mlflow-outbox: MLflow takes other files now, but not one of run {run_id}, which waits for it: "
            f"{printable(reason, 300)}",
        )

    def _deliver(self, record: RunRecord, view: RunView, reader: RunReader, window: Window) -> None:
        refused = Refused()
        if window.events:
            made_now = self._counterparts.ensure(record, view, reader)
            events = _unsettled(window.events, record, view, reader)
            steps, ended = plan(events, view, batch_points=self._settings.batch_points, made_now=made_now)
            writers = {writer for writer, event in events if points_of(event)}
            steps = self._reconciliation.unsent(record, steps, writers)
            self._note_large(record, steps)
            self._volley.make(record, view, steps, refused)
            for writer, event in events:
                view.fold(event, writer)
            view.trim()
            if ended is not None:
                record.ended = ended
        for broken in window.broken:
            self._quarantine.keep(broken)
        record.cursors = window.cursors
        record.uncertain = None
        dead = refused.dead(window.events)
        record.delivered += len(window.events) - dead
        record.refused += dead
        record.dead += len(refused.letters)
        record.quarantined += len(window.broken)
        record.missing += window.missing
        record.state, record.reason = "active", ""
        record.verified_at_ms = 0
        self._ledger.commit(record, view=view, dead=refused.letters)
        self._uploads.discard(record.run_id)
        self._reconciliation.recorded(record.run_id)
        self._intake.recorded(record.run_id)
        self._count(window, refused.letters, dead)

    def _go_on_with_large(self, record: RunRecord) -> None:
        """Take one file at a time, at first, where another process has begun large ones and recorded none of them."""
        run_id = record.run_id
        if self._sink.deduplicates_metrics and record.uncertain == record.cursors and run_id not in self._uploads:
            self._uploads.add(run_id)
            self._intake.broken_off(run_id)

    def _note_large(self, record: RunRecord, steps: Iterable[Step]) -> None:
        """Note that large files are sent, for whoever goes on when this process has no time for all of them."""
        files = [one.artifact if isinstance(one, Upload) else one.file for one in steps if isinstance(one, _UPLOADS)]
        if self._sink.deduplicates_metrics and sum(file.size for file in files) > LARGE:
            self._uploads.add(record.run_id)
            if record.uncertain != record.cursors:
                record.uncertain = dict(record.cursors)
                self._ledger.commit(record)

    def _count(self, window: Window, letters: list[DeadLetter], dead: int) -> None:
        self._counters.add("delivered", len(window.events) - dead)
        if dead:
            self._counters.add("dead_events", dead)
        if letters:
            self._count_letters(letters)
        if window.missing:
            self._counters.add("missing", window.missing)
        if window.broken:
            self._counters.add("quarantined", len(window.broken))

    def _count_letters(self, letters: list[DeadLetter]) -> None:
        self._counters.add("dead_letters", len(letters))
        self._counters.warn_once(
            ("dead", letters[0].run_id, letters[0].reason),
            f"mlflow-outbox: MLflow refused an event of run {letters[0].run_id} for good, "
            f"it is kept as a dead letter: {printable(letters[0].reason, 300)}",
        )


def _unsettled(
    events: list[tuple[str, Event]], record: RunRecord, view: RunView, reader: RunReader
) -> list[tuple[str, Event]]:
    """Return events without the artifacts that are not to be sent once more (``finish``)."""

    def is_settled(event: Event) -> bool:
        return isinstance(event, Artifact) and event.path in view.artifacts and view.artifacts[event.path].settled

    if record.settled is None or not any(is_settled(event) for _, event in events):
        return events
    later = {event for _, event in reader.each(Artifact, record.settled)}
    return [(writer, event) for writer, event in events if not is_settled(event) or event in later]
