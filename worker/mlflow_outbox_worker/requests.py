"""Making one planned request, and what its failure means for the events in it.

A failure that passes or needs a person ends the run's turn: ``Later``, ``Parked``. A permanent refusal is narrowed down
by halving until the one event that MLflow refuses is alone: that becomes a dead letter, everything around it arrives.
An upload that a server fails to carry out is judged by whether it takes others (``obstacles``).
"""

from __future__ import annotations

import contextlib
import hashlib
import posixpath
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from mlflow_outbox import linked
from mlflow_outbox.counters import printable
from mlflow_outbox.errors import InvalidEvent
from mlflow_outbox.spool import placement
from mlflow_outbox.spool.artifact_path import checked_artifact_path, stored_names
from mlflow_outbox.spool.events import Artifact, Event, FileFor, Request, RunEnded, argument_of, encode
from mlflow_outbox.spool.reader import RunReader
from mlflow_outbox.spool.snapshot import is_digest
from mlflow_outbox.views import Register, wins
from mlflow_outbox_worker import trace_places
from mlflow_outbox_worker.calls import Calls
from mlflow_outbox_worker.collisions import Collisions
from mlflow_outbox_worker.obstacles import Obstacles
from mlflow_outbox_worker.obstacles import Upload as File
from mlflow_outbox_worker.outcome import Outcome, classify
from mlflow_outbox_worker.planner import Batch, Call, Linked, SetStatus, Step, Upload, UploadFor, fits
from mlflow_outbox_worker.records import DeadLetter, RunRecord
from mlflow_outbox_worker.refused import Refused
from mlflow_outbox_worker.sink import Sink, SinkError
from mlflow_outbox_worker.sources import Source

T = TypeVar("T")

#: Raised for a call that is not as a journal of ours has it: a newer or damaged one, or one that somebody wrote.
_UNREADABLE: Final = (ValueError, TypeError, LookupError, AttributeError, RecursionError)

#: What calls give files to. A journal that somebody wrote may make an experiment with any place for its files, such as
#: a directory of this machine, and only the folders of its runs and models keep what is put there apart from all else.
_OWNERS: Final = frozenset({"model", "uri"})


class Later(Exception):
    """Raised when a request failed in a way that passes; nothing was recorded, send the same again.

    Attributes:
        partly: other requests were answered that will have to be made again for nothing else than this one.
    """

    def __init__(self, error: SinkError, outcome: Outcome) -> None:
        super().__init__(str(error))
        self.error = error
        self.outcome = outcome
        self.partly = False

    @classmethod
    @contextlib.contextmanager
    def behind(cls, made: object) -> Iterator[None]:
        """Note at one that is raised meanwhile, or at a ``Parked``, whether others were answered before it."""
        try:
            yield
        except (cls, Parked) as failure:
            failure.partly = failure.partly or bool(made)
            raise


class Parked(Exception):
    """Raised when a run cannot be delivered until a person has acted; its events stay as they are.

    Attributes:
        partly: as that of ``Later``.
    """

    def __init__(self, outcome: Outcome, error: SinkError) -> None:
        super().__init__(outcome.reason)
        self.outcome = outcome
        self.error = error
        self.partly = False


def ask(operation: str, request: Callable[[], T]) -> T:
    """Make a request that concerns no single event: it succeeds, or the whole run waits.

    Args:
        operation: what is asked for, as ``classify`` knows it.
        request: makes the request.

    Raises:
        Later: try again after a pause.
        Parked: a person is needed.
    """
    try:
        return request()
    except SinkError as error:
        outcome = classify(error, operation)
        if outcome.kind == "retry":
            raise Later(error, outcome) from error
        raise Parked(outcome, error) from error


class Requests:
    """Makes the requests of runs, one planned step at a time; used by several threads for different runs.

    Args:
        source: where the runs' files are.
        sink: the tracking store.
        calls: rewrites ids, and makes the requests that belong to no run.
        now_ms: wall-clock milliseconds since the epoch.
    """

    def __init__(self, source: Source, sink: Sink, calls: Calls, *, now_ms: Callable[[], int]) -> None:
        self._source = source
        self._sink = sink
        self._calls = calls
        self._now_ms = now_ms
        self._obstacles = Obstacles(sink)
        self._collisions = Collisions()

    def make(self, record: RunRecord, step: Step, refused: Refused) -> None:
        """Make one step of a plan.

        Args:
            record: the run, which is in MLflow by now.
            step: what to do.
            refused: gets a letter for each thing that MLflow refuses for good.

        Raises:
            Later: try again after a pause.
            Parked: a person is needed.
        """
        if isinstance(step, Batch):
            self._send(record, step, refused)
        elif isinstance(step, Upload):
            self._upload(record, step, refused)
        elif isinstance(step, Call):
            self._call(record, step.request, refused)
        elif isinstance(step, Linked):
            self._together(record, step.requests, refused)
        elif isinstance(step, UploadFor):
            self._upload_for(record, step.file, refused)
        else:
            self._set_status(record, step, refused)

    def make_ahead(self, record: RunRecord, reader: RunReader, model_id: str) -> bool:
        """Make a model that is named before its creation: another program that writes to the same run has logged that.

        Args:
            record: the run.
            reader: of the run.
            model_id: as in the journals.

        Returns:
            Whether its creation is among what is pending. In its turn it finds the model, or is refused once more.

        Raises:
            Later: try again after a pause.
            Parked: a person is needed.
        """
        for _, event in reader.each(Request, record.cursors):
            if event.operation == "create_logged_model" and argument_of(event.arguments, "model_id") == model_id:
                self._call(record, event, Refused())
                self._calls.ids.give_up(model_id)
                return True
        return False

    def _send(self, record: RunRecord, batch: Batch, refused: Refused) -> None:
        if len(batch.points) == 1 and not fits(batch.points[0]):  # then it is alone
            event = batch.event()
            reason = "its step or its time is outside MLflow's 64-bit range"
            refused.add(event, self._own_letter(record, event, f"{printable(batch.points[0].key)!r}: {reason}"))
            return
        try:
            tags = {key: self._calls.ids.tag(key, value, of=record.run_id) for key, value in batch.tags.items()}
            self._sink.log_batch(record.remote_id, batch.points, batch.params, tags)
        except SinkError as error:
            outcome = self._collisions.judged_batch(record.run_id, batch, error, classify(error, "log_batch"))
            outcome = self._about_events(error, outcome)
            if outcome.kind == "already_applied":
                return
            if len(batch) > 1:
                with Later.behind(batch):
                    for half in batch.halves():
                        self._send(record, half, refused)
                return
            event = batch.event()
            refused.add(event, self._letter(record, event, error, outcome))
        else:
            self._collisions.passed_batch(record.run_id, batch)

    def _upload(self, record: RunRecord, step: Upload, refused: Refused) -> None:
        artifact = step.artifact
        try:
            path = checked_artifact_path(artifact.path, served=False)
        except InvalidEvent as error:
            refused.add(artifact, self._own_letter(record, artifact, str(error)))
            return
        file = RunReader(*self._source.everywhere(record.run_id)).file(artifact.sha256)
        if not is_digest(artifact.sha256) or file.is_symlink() or not file.is_file():
            if self._is_stored(record, path, artifact.size):
                return
            refused.add(
                artifact, self._own_letter(record, artifact, f"the copy of {printable(path)!r} is not in the outbox")
            )
            return
        if file.stat().st_size != artifact.size:
            refused.add(
                artifact, self._own_letter(record, artifact, f"the copy of {printable(path)!r} has not the size it had")
            )
            return

        def attempt() -> None:
            self._sink.upload(
                record.remote_id, file, path, is_replaced=lambda place: self._is_replaced(record, artifact, place)
            )

        self._store(record, artifact, refused, File("run", record.remote_id, file, attempt))

    def _is_stored(self, record: RunRecord, path: str, size: int) -> bool:
        """Return whether MLflow has a file whose copy is gone: it was delivered before the ledger was lost."""
        if not record.adopted:
            return False
        held = ask("verify", lambda: self._sink.list_artifacts(record.remote_id, posixpath.dirname(path)))
        return any(name in held and held[name] in {size, None} for name in stored_names(path))

    def _store(self, record: RunRecord, event: Artifact | FileFor, refused: Refused, file: File) -> None:
        failed = self._obstacles.upload(event, record.run_id, file)
        if failed is None:
            return
        error, outcome = failed
        if self._about_events(error, outcome).kind != "already_applied":
            refused.add(event, self._letter(record, event, error, outcome))

    def _call(self, record: RunRecord, request: Request, refused: Refused) -> None:
        def refuse(part: Request, error: SinkError) -> bool:
            outcome = classify(error, request.operation)
            outcome = self._about_events(error, self._collisions.judged(record.run_id, request, error, outcome))
            if outcome.kind == "already_applied":
                return False
            if request.kept:
                part = request  # a letter names the file; the part may be larger than an event
            refused.add(part, self._letter(record, part, error, outcome))
            return True

        before = len(refused.letters)
        try:
            if self._calls.make(self._whole(record, request), refuse, of=record.run_id):
                self._collisions.passed(record.run_id)
                return
        except _UNREADABLE as error:
            refused.add(request, self._own_letter(record, request, f"{request.operation} cannot be read: {error}"))
        except SinkError as error:  # an id in it had to be asked for
            refuse(request, error)
        if len(refused.letters) > before:
            refused.add_request(request)

    def _together(self, record: RunRecord, requests: Sequence[Request], refused: Refused) -> None:
        if len(requests) == 1:
            self._call(record, requests[0], refused)
            return
        try:
            if self._calls.make_together(requests, of=record.run_id):
                return
        except _UNREADABLE:  # each alone says which
            pass
        except SinkError as error:
            if self._answered(error, linked.OPERATION).kind == "already_applied":
                return
        middle = len(requests) // 2
        with Later.behind(requests):
            for half in (requests[:middle], requests[middle:]):
                self._together(record, half, refused)

    def _whole(self, record: RunRecord, request: Request) -> Request:
        """Return a request with all its arguments.

        Raises:
            ValueError: the file with them is gone, or is another one.
            SinkError: it cannot be read now.
        """
        if not request.kept:
            return request
        file = RunReader(*self._source.everywhere(record.run_id)).file(request.kept)
        if not is_digest(request.kept) or file.is_symlink() or not file.is_file():
            msg = "the copy of its arguments is not in the outbox"
            raise ValueError(msg)
        try:
            content = file.read_bytes()
        except OSError as error:
            msg = f"the copy of its arguments cannot be read: {error.strerror or error}"
            raise SinkError(msg, kind="connection", sent=False) from None
        if hashlib.sha256(content).hexdigest() != request.kept:
            msg = "the copy of its arguments was changed"
            raise ValueError(msg)
        return msgspec.structs.replace(request, arguments=content, kept="")

    def _upload_for(self, record: RunRecord, file: FileFor, refused: Refused) -> None:
        kind, _, owner = file.owner.partition(":")
        if kind not in _OWNERS:
            reason = f"{printable(file.owner)!r} is neither a model nor a trace's place; no call gives it a file"
            refused.add(file, self._own_letter(record, file, reason))
            return
        copy = RunReader(*self._source.everywhere(record.run_id)).file(file.sha256)
        if not is_digest(file.sha256) or copy.is_symlink() or not copy.is_file():
            refused.add(
                file, self._own_letter(record, file, f"the copy of {printable(file.path)!r} is not in the outbox")
            )
            return
        try:
            path = checked_artifact_path(file.path, served=False)
            if kind == "model":
                self._calls.ids.check_model(owner)
            with self._calls.ids.content(copy, path, of=record.run_id) as content:
                given, owner = owner, self._calls.ids.rewritten(owner, of=record.run_id)
                if kind == "uri":
                    trace_places.check(given, owner, lambda: self._location(record))

                def attempt() -> None:
                    self._sink.upload_for(
                        kind,
                        owner,
                        content,
                        path,
                        # With other ids in it than the call knew, it is not what the call has put there.
                        is_replaced=lambda place: self._is_replaced(record, file, place, rewritten=content != copy),
                    )

                self._store(record, file, refused, File(kind, owner, content, attempt))
        except InvalidEvent as error:
            refused.add(file, self._own_letter(record, file, str(error)))
        except SinkError as error:
            outcome = self._answered(error, "upload")
            if outcome.kind != "already_applied":
                refused.add(file, self._letter(record, file, error, outcome))

    def _location(self, record: RunRecord) -> str:
        known = record.experiment_id
        return self._sink.artifact_location("experiment", known) if known else ""

    def _is_replaced(
        self, record: RunRecord, file: Artifact | FileFor, place: Path, *, rewritten: bool = False
    ) -> bool:
        """Return whether what is in a file's place came there later: by the program's hand, or the journal has it."""
        trusted = not rewritten and not self._source.again
        if trusted and file.placed and file.placed == placement.identity(place.parent):
            return True
        own: Register | None = None
        for writer, event in RunReader(*self._source.folders(record.run_id)).each(type(file), record.cursors):
            if event == file:
                own = Register(file.sha256, file.time_ms, writer)
            elif own is not None and _is_of_one_place(event, file) and wins(own, event.time_ms, writer):
                return True
        return False

    def _set_status(self, record: RunRecord, step: SetStatus, refused: Refused) -> None:
        try:
            self._sink.update_run(record.remote_id, status=step.status, end_time_ms=step.end_time_ms)
        except SinkError as error:
            outcome = self._answered(error, "update_run")
            if outcome.kind != "already_applied":
                event = RunEnded(step.status, step.time_ms, step.end_time_ms)
                refused.add(event, self._letter(record, event, error, outcome))

    def _answered(self, error: SinkError, operation: str) -> Outcome:
        """Return the outcome of a failed request that is about the events in it; raise the others."""
        return self._about_events(error, classify(error, operation))

    @staticmethod
    def _about_events(error: SinkError, outcome: Outcome) -> Outcome:
        if outcome.kind == "retry":
            raise Later(error, outcome) from error
        if outcome.kind == "parked":
            raise Parked(outcome, error) from error
        return outcome

    def _letter(self, record: RunRecord, event: Event, error: SinkError, outcome: Outcome) -> DeadLetter:
        return DeadLetter(
            run_id=record.run_id,
            remote_id=record.remote_id,
            payload=encode(event),
            reason=outcome.reason,
            code=error.code,
            status=error.status,
            time_ms=self._now_ms(),
        )

    def _own_letter(self, record: RunRecord, event: Event, reason: str) -> DeadLetter:
        return DeadLetter(
            run_id=record.run_id,
            remote_id=record.remote_id,
            payload=encode(event),
            reason=reason,
            code="",
            status=None,
            time_ms=self._now_ms(),
        )


def _is_of_one_place(one: Artifact | FileFor, other: Artifact | FileFor) -> bool:
    return one.path == other.path and getattr(one, "owner", "") == getattr(other, "owner", "")
