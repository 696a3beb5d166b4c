"""Delivers one run: reads a window of its events, makes the planned requests, and only then records how far it got.

Exactly once in effect
----------------------
* A run is looked for by its tag before it is created, always: whatever became of an earlier attempt, here or on
  another machine, it is found. The map from local to MLflow id is recorded before anything else is sent.
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

from collections.abc import Callable
from http import HTTPStatus
from typing import Final, Literal, NamedTuple

from mlflow_outbox.counters import Counters, printable
from mlflow_outbox.settings import Settings
from mlflow_outbox.spool import provisional
from mlflow_outbox.spool.events import NAME_TAG, Artifact, Event, RunStarted, points_of
from mlflow_outbox.spool.frame import SegmentHeader
from mlflow_outbox.spool.reader import RunReader
from mlflow_outbox.spool.window import Window
from mlflow_outbox.views import Register, RunView
from mlflow_outbox_worker.calls import Calls
from mlflow_outbox_worker.copies import copying
from mlflow_outbox_worker.creation import Creation
from mlflow_outbox_worker.intake import Intake
from mlflow_outbox_worker.ledger import Ledger
from mlflow_outbox_worker.outcome import Outcome, classify, is_deleted
from mlflow_outbox_worker.planner import plan
from mlflow_outbox_worker.precedence import Waits
from mlflow_outbox_worker.quarantine import Quarantine
from mlflow_outbox_worker.reconciliation import Reconciliation
from mlflow_outbox_worker.records import DeadLetter, RunRecord
from mlflow_outbox_worker.refused import Refused
from mlflow_outbox_worker.requests import Later, Parked, Requests, ask
from mlflow_outbox_worker.sink import RUN_ID_TAG, Sink, SinkError
from mlflow_outbox_worker.sources import Source
from mlflow_outbox_worker.twins import settling, was_refused
from mlflow_outbox_worker.volley import Volley

#: Batches of one run, as many as windows may hold, before other runs get their turn.
_TURN: Final = 16

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
        #: By name and program: the one that asked goes on in an experiment that was renamed since, and no other does.
        self._experiments: dict[tuple[str, str, str, int], str] = {}
        precedence = beside._calls.precedence if beside is not None else None  # noqa: SLF001 - its own class's
        self._calls: Calls = Calls(source, sink, ledger, precedence)
        self._creation = Creation(ledger, self._count_letters, now_ms=now_ms)
        self._quarantine = Quarantine(source.quarantine, counters)
        self._reconciliation = Reconciliation(sink, ledger)
        self._requests = Requests(source, sink, self._calls, now_ms=now_ms)
        self._volley = Volley(self._requests, self._reconciliation.answered, sink, settings.parallel_runs)
        self._intake = Intake(settings.batch_points, counters)
        #: The writer of a run that used up its last turn.
        self._after: dict[str, str] = {}

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
        batches = 1
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
                if later.partly and self._sink.deduplicates_metrics:
                    self._intake.failed(run_id)
                if later.outcome.alone:
                    self._note_obstacle(run_id, later.outcome.reason)
                if later.error.code == "BAD_REQUEST":  # a row was there: not all MLflows know NaN for what they have
                    self._reconciliation.found(run_id)
                raise
            except Waits as waits:
                self._calls.precedence.waits(run_id, waits.on)
                raise
            except Parked as parked:
                if is_deleted(parked.error):
                    self._calls.precedence.await_restoration(record)
                raise
            self._calls.precedence.goes_on(run_id)
            if not window.more:
                self._reconciliation.caught_up(run_id)
                return Turn("live" if window.live else "idle", record, view, reader, window.waits)
            if self._stopped():
                break
            batches = min(share, self._volley.width())
        self._after[run_id] = after
        return Turn("more", record, view, reader)

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
            made_now = self._ensure_remote(record, view, reader)
            events = _unsettled(window.events, record, view, reader)
            steps, ended = plan(events, view, batch_points=self._settings.batch_points, made_now=made_now)
            writers = {writer for writer, event in events if points_of(event)}
            self._volley.make(record, view, self._reconciliation.unsent(record, steps, writers), refused)
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
        self._reconciliation.recorded(record.run_id)
        self._intake.recorded(record.run_id)
        self._count(window, refused.letters, dead)

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

    # -- the run in MLflow

    def _ensure_remote(self, record: RunRecord, view: RunView, reader: RunReader) -> bool:
        """Have a run in MLflow; return whether it was created just now."""
        if record.remote_id:
            return False
        started, header = reader.started()
        if started is None:  # what was filed says more: of the experiment all other segments have the name alone
            started, _ = RunReader(*self._source.everywhere(record.run_id)).started()
        own = header.experiment if header is not None else record.experiment
        record.experiment = self._source.experiment(own)
        if header is not None and header.remote and record.experiment == own and self._find_existing(record):
            self._adopt(record, view)
            return False
        if provisional.is_room(record.run_id):
            local = provisional.experiment_of(record.run_id)
            if local:
                record.experiment_id = ask(
                    "create_experiment", lambda: self._calls.ids.experiment(local, record.run_id)
                )
            record.remote_id = record.run_id  # it stays a room: there is no run behind it
            self._ledger.commit(record)
            return False
        asked = _asked(record.experiment, header)
        remembered = asked in self._experiments
        try:
            self._find_or_create(record, started, header)
        except Parked:
            if not remembered:
                raise
            self._experiments.pop(asked, None)  # it was deleted, or the server's database replaced, since we asked
            self._find_or_create(record, started, header)
        if record.adopted:
            self._adopt(record, view)
            return False
        self._ledger.commit(record)
        return True

    def _adopt(self, record: RunRecord, view: RunView) -> None:
        """Begin with how the run ended in MLflow, so that an older copy of it does not undo a later end."""
        found = ask("get_run", lambda: self._sink.get_run(record.remote_id))
        if found.end_time_ms is not None:
            view.status, view.end_time_ms = Register(found.status, found.end_time_ms, ""), found.end_time_ms
            record.ended = True
        self._ledger.commit(record, view=view)

    def _find_existing(self, record: RunRecord) -> bool:
        """Find a run that was gone on with here and began elsewhere: in MLflow, or in another outbox."""
        try:
            found = self._sink.get_run(record.run_id)
        except SinkError as error:
            outcome = classify(error, "get_run")
            if outcome.kind == "retry":
                raise Later(error, outcome) from error
            if error.status != HTTPStatus.NOT_FOUND and error.code != "RESOURCE_DOES_NOT_EXIST":
                raise Parked(outcome, error) from error
            missing = error
        else:
            record.remote_id, record.experiment_id, record.adopted = found.run_id, found.experiment_id, True
            return True
        experiment_id = None
        if record.experiment:  # it is not known of a run that was first met while the server was away
            experiment_id = ask("find_experiment", lambda: self._sink.find_experiment(record.experiment))
        if experiment_id is not None:
            twins = ask("find_runs", lambda: self._sink.find_runs(experiment_id, record.run_id))
            if twins:
                record.remote_id, record.experiment_id, record.adopted = twins[0], experiment_id, True
                return True
        if self._source.elsewhere or self._source.again:
            return False
        reason = (
            f"the run {record.run_id} did not begin in this outbox, and MLflow does not have it; "
            "if it began in another, send that first"
        )
        raise Parked(Outcome("parked", reason), missing)

    def _is_made_here(self, experiment_id: str) -> bool:
        """Return whether an experiment is made from what is delivered: its name may be another's by then."""
        if not provisional.is_provisional(experiment_id) or self._source.experiment(""):
            return False
        return not self._is_orphan(experiment_id)

    def _is_orphan(self, experiment_id: str) -> bool:
        """Return whether a provisional id's room, which says what it is called, is not here: runs were taken alone."""
        if not provisional.is_provisional(experiment_id):
            return False
        return not any(folder.is_dir() for folder in self._source.everywhere(provisional.room_of(experiment_id)))

    def _find_or_create(self, record: RunRecord, started: RunStarted | None, header: SegmentHeader | None) -> None:
        name = record.experiment
        # An id of another server's experiment says nothing here; its name does.
        by_name = self._source.elsewhere or self._source.again or (header is not None and name != header.experiment)
        logged = given = "" if started is None else started.experiment_id
        orphan = name not in {"", logged} and self._is_orphan(logged)
        if (by_name and not self._is_made_here(given)) or (orphan and not self._ledger.meta(f"experiment/{logged}")):
            given = ""
        if given:
            record.experiment_id = ask("create_experiment", lambda: self._calls.ids.resolved(given))
        else:
            asked = _asked(name, header)
            if asked not in self._experiments:
                self._experiments[asked] = ask("create_experiment", lambda: self._sink.experiment_id(name))
            record.experiment_id = self._experiments[asked]
        twins = ask("find_runs", lambda: self._sink.find_runs(record.experiment_id, record.run_id))
        attempted = started is not None and started.attempted
        record.creates = record.creates or int(attempted)
        if twins:
            record.remote_id, record.adopted = twins[0], True
            self._reconciliation.found(record.run_id)
            if record.creates == len(twins) == 1:
                record.creating = False  # the only one there can be was found
        else:
            first = started.tags if started is not None else {}
            name_given = started.run_name if started is not None else None
            if name_given is not None and NAME_TAG in first:  # MLflow refuses two names
                first = {**first, NAME_TAG: name_given}
            tags = ask(  # before the try is noted: it may have to wait for another run
                "create_run",
                lambda: {key: self._calls.ids.tag(key, value, of=record.run_id) for key, value in first.items()},
            )
            tags[RUN_ID_TAG] = record.run_id
            unknown = record.creating or attempted
            record.creating = True
            record.creates += 1
            self._ledger.commit(record)
            start_ms = started.start_time_ms if started is not None else header.created_ms if header is not None else 0
            try:
                record.remote_id = self._creation.create(
                    record,
                    name_given,
                    tags,
                    lambda called, labels: self._sink.create_run(
                        record.experiment_id,
                        run_name=called,
                        start_time_ms=start_ms,
                        user=started.user if started is not None else "",
                        tags=labels,
                    ),
                )
            except (Parked, Later) as failed:
                if was_refused(failed.error, failed.outcome):
                    record.creating = unknown
                    record.creates -= 1
                    self._ledger.commit(record)
                raise
            record.creating = unknown
        if orphan and not given:  # what else names the experiment, a model for one, is of this one
            self._ledger.set_meta(f"experiment/{logged}", record.experiment_id.encode())
        if record.creating and self._sink.parallel:  # what is embedded here carries nothing out later
            record.settles_ms = self._now_ms() + settling(self._settings.request_timeout)


def _asked(name: str, header: SegmentHeader | None) -> tuple[str, str, str, int]:
    return (name, "", "", 0) if header is None else (name, header.host, header.boot_id, header.pid)


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
