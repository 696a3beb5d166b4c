"""Second runs and models that a create left whose answer was lost: looked for until none can come, and deleted.

MLflow has no idempotent create. A run is searched for by its tag before it is created, always; but a create that ran
into its time-out may wait inside a busy server, for a lock of its database for instance, be overtaken by that search
and by the next create, and be carried out after both. What it leaves is an empty run of the same name.

So a run of which a create's fate is unknown (it was sent, and neither done nor refused) *settles* first: it is searched
for once more when the server has had as long again as it had for the answer, also while the run is still being written,
and it is neither read back nor filed before. At its end it is searched for a last time. An embedded store carries
nothing out later, and a search that finds exactly the one create that is missing leaves no doubt: then nothing is
waited for.

A logged model that the program asked the server for, for as long as it may wait, can come twice in the same way: here
under the id that the worker made it with, and as a model of the same tag that stays pending. It is looked for at the
end of its run.

Of a twin that this user may not delete it is said that it stays, and its run is done all the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from http import HTTPStatus

import msgspec

from mlflow_outbox.counters import Counters, printable
from mlflow_outbox.settings import Settings
from mlflow_outbox.spool.events import argument_of, arguments_of
from mlflow_outbox.views import RunView
from mlflow_outbox_worker.calls import mark_of
from mlflow_outbox_worker.gate import is_admitted
from mlflow_outbox_worker.ledger import Ledger
from mlflow_outbox_worker.outcome import Outcome
from mlflow_outbox_worker.records import RunRecord
from mlflow_outbox_worker.requests import ask
from mlflow_outbox_worker.sink import Sink, SinkError


def settling(request_timeout: float) -> int:
    """Return for how long a run settles, in milliseconds.

    Args:
        request_timeout: seconds that the server had for the answer of a create.
    """
    return int(request_timeout * 1000)


def was_refused(error: SinkError, outcome: Outcome) -> bool:
    """Return whether a create that failed was certainly not carried out, and will not be.

    Args:
        error: how it failed.
        outcome: what that means for it.
    """
    if not error.sent or error.status == HTTPStatus.TOO_MANY_REQUESTS:
        return True
    return outcome.kind == "parked" and error.kind == "answer"  # which said no


def settle(
    sink: Sink,
    ledger: Ledger,
    record: RunRecord,
    settings: Settings,
    counters: Counters,
    *,
    now_ms: Callable[[], int],
) -> float:
    """Look for a run's twins if it is time to.

    Returns:
        seconds after which it is to be called again; 0 when the run has settled.

    Raises:
        Later: MLflow could not be asked now.
        Parked: it refuses to be asked.
        LedgerUnavailable: the ledger could not be written.
    """
    if not record.settles_ms:
        return 0.0
    left_ms = record.settles_ms - now_ms()
    if 0 < left_ms <= settling(settings.request_timeout):  # more, and somebody has set the clock back
        return left_ms / 1000
    ask("verify", lambda: delete_twins(sink, record, counters))
    record.settles_ms = 0
    ledger.commit(record)
    return 0.0


def delete_twins(sink: Sink, record: RunRecord, counters: Counters) -> None:
    """Delete the empty runs beside a run that are of the same run of the outbox.

    Raises:
        SinkError: MLflow could not be asked.
    """
    for run_id in sink.find_runs(record.experiment_id, record.run_id):
        if run_id == record.remote_id:
            continue
        twin = sink.get_run(run_id)
        if twin.lifecycle == "active" and not twin.metrics and not twin.params:
            _delete(sink, f"run {run_id}", counters, functools.partial(sink.delete_run, run_id))


def delete_models(sink: Sink, ledger: Ledger, record: RunRecord, view: RunView, counters: Counters) -> None:
    """Delete the pending models beside those of a run that the worker has made, which are of the same model here.

    Raises:
        SinkError: MLflow could not be asked.
        LedgerUnavailable: the ledger could not be read.
    """
    for kept in view.requests:
        if kept.operation != "create_logged_model" or kept.known:
            continue
        local = argument_of(kept.arguments, "model_id")
        remote = (ledger.meta(f"model/{local}") or b"").decode()
        if not remote:
            continue  # it was refused
        for model_id, model in sink.find_models(
            record.experiment_id, mark_of(arguments_of(kept.arguments), local)
        ).items():
            # One of another run is somebody else's, who replays the same files.
            if model_id != remote and model == ("PENDING", record.remote_id):
                arguments = msgspec.json.encode({"model_id": model_id}).decode()
                delete = functools.partial(sink.call, "delete_logged_model", arguments)
                _delete(sink, f"model {model_id}", counters, delete)


def _delete(sink: Sink, what: str, counters: Counters, delete: Callable[[], object]) -> None:
    """Delete a twin, or say that it stays: who may write to an experiment may not always delete from it."""
    try:
        delete()
    except SinkError as error:
        if error.status != HTTPStatus.FORBIDDEN or not is_admitted(sink):
            raise
        counters.add("twins_left")
        counters.warn_once(
            ("twin", what),
            f"mlflow-outbox: the empty {what}, which a create without an answer has left in MLflow, may not be "
            f"deleted by this user, and stays: {printable(error, 300)}",
        )
    else:
        counters.add("twins_deleted")
