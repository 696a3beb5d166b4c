"""What a failed request means for the events in it: one pure function from error to outcome.

The status decides, because MLflow's error code alone cannot: its client reports a refused connection, a 503, a 413
and a login page as the same INTERNAL_ERROR. The rules, in the order in which they are asked:

* No answer at all (refused, reset, timed out): *retry*. A TLS peer that cannot be trusted: *parked*, a person has
  to act.
* An answer that no MLflow server gives (login page, redirect, unknown URL): *parked*.
* 408, 425, 429, 5xx, and MLflow's codes for "later": *retry*. Two answers look like that and are not: 501, and the
  503 of a server that serves no artifacts; both are *parked*. Nor does a NUL pass that a server's database never takes.
* 401, 403, 407, and a run or an experiment that is gone or deleted: *parked*.
* 413: *split*. The caller halves the batch; a single event that is still too large is a dead letter.
* An experiment that exists already: *already applied*.
* Any other 4xx is a permanent answer about the content: *dead letter* when the request carried events, *parked*
  when it did not (no event is to blame for an experiment that cannot be created).

Nothing here counts attempts: running out of patience is never a reason to discard an event. Whether an error is
retried does not depend on the operation, so that ``retry.is_retryable`` and this function always agree.
"""

from __future__ import annotations

import dataclasses
import re
from http import HTTPStatus
from typing import Literal

from mlflow_outbox.counters import printable
from mlflow_outbox_worker.records import RunRecord
from mlflow_outbox_worker.sink import OPERATIONS, SinkError

OutcomeKind = Literal["retry", "parked", "already_applied", "dead_letter", "split"]

#: Requests that carry events of a run, one or many: only their events can become dead letters.
EVENT_OPERATIONS = frozenset({"log_batch", "update_run", "upload", *OPERATIONS})

_LATER_STATUSES = frozenset({408, 425, 429})
_LATER_CODES = frozenset({"TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED", "ABORTED"})
_PERSON_STATUSES = frozenset({401, 403, 407, 501})
_PERSON_CODES = frozenset(
    {"INVALID_STATE", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED", "PERMISSION_DENIED", "FEATURE_DISABLED"}
    | {"ENDPOINT_NOT_FOUND", "RESOURCE_DOES_NOT_EXIST", "NOT_FOUND", "NOT_IMPLEMENTED", "TLS"}
)
#: MLflow's stores say INVALID_PARAMETER_VALUE for a write to a deleted run or experiment; only the text tells them
#: apart.
_DELETED = re.compile(r"must be in (the )?'active'|non-active experiment")
#: The 503 of ``mlflow server --no-serve-artifacts`` is not JSON and never goes away by waiting.
_NO_ARTIFACTS = re.compile(r"--no-serve-artifacts")
#: What a tracking server on a file store says to a param of another value, as an INTERNAL_ERROR.
_OTHER_VALUE = "Changing param values is not allowed"
#: What psycopg2 says to a text with a NUL in it, and a server on PostgreSQL, as an INTERNAL_ERROR, after it.
_NUL = "cannot contain NUL"
#: What a server says as an INTERNAL_ERROR when it has met a row four times as it set tags.
_TAGS_MET = "Failed to set tags with given within"
#: Two requests wrote the same row at once; the loser's whole transaction was rolled back and succeeds when repeated.
_ROW_RACE = re.compile(r"UNIQUE constraint|duplicate key|Duplicate entry", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What to do with the events of one request.

    Attributes:
        kind: "already_applied": go on; "retry": send the same again later; "parked": wait for a person;
            "split": send the halves; "dead_letter": refused for good, bisect to find which event.
        reason: one sentence for people; "" when there is nothing to say.
        retry_after: seconds that the server asked to wait before a retry; None when it did not.
        alone: the destination was seen to take others, so that only what failed has to wait (``obstacles``).
    """

    kind: OutcomeKind
    reason: str = ""
    retry_after: float | None = None
    alone: bool = False


def classify(error: SinkError, operation: str = "") -> Outcome:
    """Return what an error of the sink means for the events of the request.

    Args:
        error: what the sink raised.
        operation: the method of the sink that raised it, for instance "log_batch"; "create_experiment" and "open"
            name the two requests that are not methods.
    """
    reason = str(error)
    if error.kind == "not_mlflow" or error.code in _PERSON_CODES:
        return Outcome("parked", reason)
    if error.kind in {"connection", "timeout"}:
        return Outcome("retry", reason, error.retry_after)
    return _answered(error, error.status or HTTPStatus.INTERNAL_SERVER_ERROR, operation)


def is_deleted(error: SinkError) -> bool:
    """Return whether MLflow refuses something because its run or experiment is deleted, which may be undone."""
    return _DELETED.search(str(error)) is not None


def met_a_row(error: SinkError) -> bool:
    """Return whether a database refused something for a row that is there, as when two requests write it at once."""
    said = str(error)
    return (error.code == "BAD_REQUEST" and _ROW_RACE.search(said) is not None) or _TAGS_MET in said


def remedy(error: SinkError, record: RunRecord, sends: str, resends: str) -> str:
    """Return what a person can do about a run that is parked by itself, to end a sentence; "" when that says it all.

    Args:
        error: the answer that parked the run.
        record: of the run.
        sends: the command that sends what waits where the run is.
        resends: the one that sends everything once more.
    """
    if error.status == HTTPStatus.FORBIDDEN:
        where = f" in the experiment {printable(record.experiment)!r}" if record.experiment else ""
        return f"; a right is missing for that{where}: once it has been granted, {sends} sends the run"
    if error.code != "RESOURCE_DOES_NOT_EXIST" or not record.remote_id:  # only a run that was there can be gone
        return ""
    return (
        f"; if the server has lost it, end the programs that log there, and send it anew from its beginning: {resends}"
    )


def _answered(error: SinkError, status: int, operation: str) -> Outcome:
    reason = str(error)
    if status in _PERSON_STATUSES or _NO_ARTIFACTS.search(reason) or is_deleted(error):
        return Outcome("parked", reason)
    if operation == "log_batch" and error.code == "INTERNAL_ERROR" and _OTHER_VALUE in reason:
        return Outcome("dead_letter", reason)
    if error.code == "INTERNAL_ERROR" and _NUL in reason:
        return Outcome("dead_letter" if operation in EVENT_OPERATIONS else "parked", reason)
    if status in _LATER_STATUSES or status >= HTTPStatus.INTERNAL_SERVER_ERROR or error.code in _LATER_CODES:
        return Outcome("retry", reason, error.retry_after)
    # A name is taken for good.
    if met_a_row(error) and operation != "rename_experiment":
        return Outcome("retry", reason, error.retry_after)
    if error.code == "RESOURCE_ALREADY_EXISTS":
        return Outcome("already_applied", reason)
    if operation not in EVENT_OPERATIONS or (status == HTTPStatus.NOT_FOUND and not error.code):
        return Outcome("parked", reason)
    if status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
        # A file cannot be halved, so the answer is final for an upload.
        return Outcome("dead_letter" if operation == "upload" else "split", reason)
    return Outcome("dead_letter", reason)
