"""The end of a run's delivery: reading back, and looking for twins a last time; filing is left to ``upkeep``.

Nothing is marked delivered because it was sent: MLflow is asked. What it lacks is sent again once, from the
beginning, which harms nothing, the segments included that were filed while it went on; what it still lacks then, or
what it lacks of a run of which some were reclaimed already, needs a person, and the run is parked with the
differences named.

Artifacts are told apart (``verification``). One that is absent is sent again like all else, once: a store that has lost
a file that it had taken looks like one in which somebody has deleted it, and a file too many does less harm. One that
is another now is not, as it may be what somebody has put there since. What stays absent or other is counted and said,
and parks no run. Nor does a storage in which this user may put files and not list them: that is said, too.

A run that was left by its programs, killed before they could end it, is read back, filed and reclaimed like any other.
MLflow shows it as running, as it would without an outbox. Whoever goes on with it later finds it as one that has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from http import HTTPStatus

from mlflow_outbox.counters import Counters, printable
from mlflow_outbox.settings import Settings
from mlflow_outbox.spool import provisional
from mlflow_outbox.spool.reader import RunReader
from mlflow_outbox.spool.writer import has_ended
from mlflow_outbox.views import RunView
from mlflow_outbox_worker.courier import Turn
from mlflow_outbox_worker.gate import is_admitted
from mlflow_outbox_worker.ledger import Ledger
from mlflow_outbox_worker.outcome import Outcome, classify
from mlflow_outbox_worker.records import DeadLetter, RunRecord
from mlflow_outbox_worker.requests import Later, Parked
from mlflow_outbox_worker.requeue import bring_back, is_whole
from mlflow_outbox_worker.sink import Sink, SinkError
from mlflow_outbox_worker.sources import Source
from mlflow_outbox_worker.twins import delete_models, delete_twins
from mlflow_outbox_worker.verification import Altered, altered_artifacts, differences, settled_artifacts, summary


def finish(
    source: Source,
    sink: Sink,
    ledger: Ledger,
    settings: Settings,
    counters: Counters,
    turn: Turn,
    *,
    now_ms: Callable[[], int],
) -> bool:
    """Do what remains for a run of which everything on disk was sent and nobody writes at present.

    Returns:
        False when the run is to be sent again.

    Raises:
        Later: MLflow could not be asked now.
        Parked: MLflow lacks something although it was sent twice, or does not have the run any more.
        LedgerUnavailable: the ledger could not be written.
        OSError: a file could not be read, or brought back.
    """
    record = turn.record
    if not record.remote_id or not any(folder.is_dir() for folder in turn.reader.paths):
        return True
    if record.state == "done" and record.verified_at_ms:
        return True
    if provisional.is_room(record.run_id):
        record.state, record.verified_at_ms = "done", now_ms()
        ledger.commit(record)
        return True
    if not record.ended and not _is_left(turn.reader):
        return True
    if not record.verified_at_ms:
        try:
            if record.creating:
                delete_twins(sink, record, counters)
            delete_models(sink, ledger, record, turn.view, counters)
            letters = [*ledger.dead_letters(record.run_id), *ledger.settled_letters(record.run_id)]
            reader = RunReader(*source.everywhere(record.run_id))  # with what was filed while the run went on
            found = differences(sink, record.remote_id, turn.view, letters, settings.verify, reader=reader)
            asked = settings.verify != "off"
            altered = _altered(sink, record, turn.view, letters, counters) if asked else []
        except SinkError as error:
            outcome = classify(error, "verify")
            if outcome.kind == "retry":
                raise Later(error, outcome) from error
            raise Parked(outcome, error) from error
        absent = [one.sentence for one in altered if one.absent]
        if found or (absent and not record.mismatch and _is_whole(source, record)):
            again = RunView(artifacts=settled_artifacts(turn.view, altered, letters))
            _send_again_or_park(source, ledger, counters, record, summary([*found, *absent]), again)
            return False
        record.creating = record.adopted = False
        record.mismatch, record.settled = "", None
        record.altered = _said(altered, record, source.resends, counters)
        record.verified_at_ms = now_ms()
        counters.add("runs_verified")
    record.state = "done"
    ledger.commit(record)
    return True


def _altered(
    sink: Sink, record: RunRecord, view: RunView, letters: Collection[DeadLetter], counters: Counters
) -> list[Altered]:
    """Return which artifacts are not as they were stored; none where this user may store them and not list them."""
    try:
        return altered_artifacts(sink, record.remote_id, view, letters)
    except SinkError as error:
        if error.status != HTTPStatus.FORBIDDEN or not is_admitted(sink):
            raise
        counters.add("artifacts_unlisted")
        counters.warn_once(
            ("unlisted", "artifacts"),
            f"mlflow-outbox: the artifacts of run {record.run_id}, which were all stored, may not be listed by this "
            f"user, and are not read back, nor are those of others like it: {printable(error, 300)}",
        )
        return []


def _is_left(reader: RunReader) -> bool:
    """Return whether all programs that wrote to a run have ended."""
    written = [segment for held in reader.segments().values() for segment in held]
    return bool(written) and all(has_ended(segment.path, segment.header) for segment in written)


def _said(altered: list[Altered], record: RunRecord, resends: str, counters: Counters) -> str:
    """Count and say which artifacts were changed by others; return that in a sentence."""
    if not altered:
        return ""
    text = summary([found.sentence for found in altered])
    counters.add("artifacts_altered", len(altered))
    counters.warn_once(
        ("altered", record.run_id, text),
        f"mlflow-outbox: MLflow had stored all artifacts of run {record.run_id}, but now {text}. That is left as it "
        f"is; {resends} sends everything once more",
    )
    return text


def _send_again_or_park(
    source: Source, ledger: Ledger, counters: Counters, record: RunRecord, found: str, view: RunView
) -> None:
    counters.add("verification_differences")
    record.mismatch, seen = found, record.mismatch
    if seen or not _is_whole(source, record):
        reason = f"MLflow lacks something of the run although it was sent: {found}"
        raise Parked(Outcome("parked", reason), SinkError(reason, kind="answer"))
    record.cursors, record.settled = {}, record.cursors
    record.adopted = True  # everything may be there already: a store that does not deduplicate is asked what it has
    record.delivered = record.refused = record.dead = record.quarantined = record.missing = 0
    for letter in list(ledger.dead_letters(record.run_id)):
        ledger.drop_dead_letter(letter.id)  # MLflow will refuse the same event again
    ledger.commit(record, view=view)
    source.ring(record.run_id)


def _is_whole(source: Source, record: RunRecord) -> bool:
    """Return whether a run can be sent from its beginning; what was filed of it is brought back for that.

    The cursors change after the files: a kill in between finds the same differences again.
    """
    if source.filing is None:
        read = source.folders(record.run_id)
        return not any(folder.is_dir() for folder in source.everywhere(record.run_id) if folder not in read)
    if not is_whole(RunReader(*source.everywhere(record.run_id)), record.cursors):
        return False
    bring_back(source.filing, record.run_id)
    # Something may have been reclaimed for want of room in between; from here nothing is.
    return is_whole(RunReader(*source.folders(record.run_id)), record.cursors)
