"""Finds a run in MLflow, by its id or its tag, or creates it, in the experiment that it belongs to there.

Nothing is created without a search before it: whatever became of an earlier attempt, here or on another machine, is
found. Before an attempt it is noted that there was one, so that a search for its twin is not forgotten (``twins``).
"""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus

from mlflow_outbox.settings import Settings
from mlflow_outbox.spool import provisional
from mlflow_outbox.spool.events import NAME_TAG, RunStarted
from mlflow_outbox.spool.frame import SegmentHeader
from mlflow_outbox.spool.reader import RunReader
from mlflow_outbox.views import Register, RunView
from mlflow_outbox_worker.creation import Creation
from mlflow_outbox_worker.ledger import Ledger
from mlflow_outbox_worker.outcome import Outcome, classify
from mlflow_outbox_worker.records import RunRecord
from mlflow_outbox_worker.remote_ids import RemoteIds
from mlflow_outbox_worker.requests import Later, Parked, ask
from mlflow_outbox_worker.sink import RUN_ID_TAG, Sink, SinkError
from mlflow_outbox_worker.sources import Source
from mlflow_outbox_worker.twins import settling, was_refused


class Counterparts:
    """The runs in MLflow that belong to runs here; used by several threads for different runs.

    Args:
        source: where the runs come from.
        sink: the tracking store.
        ledger: where MLflow's ids are recorded.
        settings: how long a create may take.
        ids: what ids of this side have become.
        creation: creates runs.
        found: told of a run that was there before.
        now_ms: wall-clock milliseconds since the epoch.
    """

    def __init__(
        self,
        source: Source,
        sink: Sink,
        ledger: Ledger,
        settings: Settings,
        ids: RemoteIds,
        *,
        creation: Creation,
        found: Callable[[str], None],
        now_ms: Callable[[], int],
    ) -> None:
        self._source = source
        self._sink = sink
        self._ledger = ledger
        self._settings = settings
        self._ids = ids
        self._creation = creation
        self._found = found
        self._now_ms = now_ms
        #: By name and program: the one that asked goes on in an experiment that was renamed since, and no other does.
        self._experiments: dict[tuple[str, str, str, int], str] = {}

    def ensure(self, record: RunRecord, view: RunView, reader: RunReader) -> bool:
        """Have a run in MLflow; return whether it was created just now.

        Args:
            record: what is known of it, which is recorded with MLflow's id.
            view: what is known of its contents.
            reader: of its journals.

        Raises:
            Later: try again after a pause.
            Parked: a person is needed.
            Waits: something of another run or room has to come first.
            LedgerUnavailable: the ledger could not be read or written.
            OSError: its journals could not be read.
        """
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
                record.experiment_id = ask("create_experiment", lambda: self._ids.experiment(local, record.run_id))
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
            record.experiment_id = ask("create_experiment", lambda: self._ids.resolved(given))
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
            self._found(record.run_id)
            if record.creates == len(twins) == 1:
                record.creating = False  # the only one there can be was found
        else:
            first = started.tags if started is not None else {}
            name_given = started.run_name if started is not None else None
            if name_given is not None and NAME_TAG in first:  # MLflow refuses two names
                first = {**first, NAME_TAG: name_given}
            tags = ask(  # before the try is noted: it may have to wait for another run
                "create_run",
                lambda: {key: self._ids.tag(key, value, of=record.run_id) for key, value in first.items()},
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
