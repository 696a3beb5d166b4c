"""What the turn of a run means for its next one: what it is watched for, what it waits for, who has to see to it."""

from __future__ import annotations

from pathlib import Path
from typing import Final, cast

from mlflow_outbox.counters import Counters, printable
from mlflow_outbox.settings import Settings
from mlflow_outbox.spool.writer import has_left
from mlflow_outbox_worker.asked import AskedSink
from mlflow_outbox_worker.courier import Turn
from mlflow_outbox_worker.gate import Gate, concerns_destination
from mlflow_outbox_worker.ledger import Ledger
from mlflow_outbox_worker.outcome import remedy
from mlflow_outbox_worker.precedence import Waits
from mlflow_outbox_worker.records import RunRecord
from mlflow_outbox_worker.requests import Parked
from mlflow_outbox_worker.schedule import TRIES, Schedule, Standing
from mlflow_outbox_worker.sink import Sink, SinkError
from mlflow_outbox_worker.sources import Source

#: Seconds until the next turn of a run of which something is on its way.
_SOON: Final = 1.0


class Turns:
    """Notes in the schedule what has come of turns; used by several threads for different runs.

    Args:
        source: where the runs come from.
        settings: how long pauses are.
        counters: what happened, by reason.
        gate: told what a turn says about the destination.
    """

    def __init__(self, source: Source, settings: Settings, counters: Counters, gate: Gate) -> None:
        self._source = source
        self._settings = settings
        self._counters = counters
        self._gate = gate

    def went_well(self, schedule: Schedule, run_id: str, turn: Turn) -> None:
        """Have a run watched for what comes next, and give it another turn where there is more."""
        tails: dict[Path, int] = {}
        if turn.progress == "live" or (self._source.remote and turn.progress == "idle"):
            for writer, held in turn.reader.segments().items():
                cursor = turn.record.cursors.get(writer)
                for segment in held[-1:]:
                    if turn.progress == "idle" and turn.record.ended and has_left(segment.path, segment.header):
                        continue
                    offset = cursor.offset if cursor is not None and cursor.ordinal == segment.header.ordinal else 0
                    tails[segment.path] = offset
        schedule.turned(run_id, tails, live=turn.progress == "live", more=turn.progress == "more")
        self._counters.forget(("parked", run_id))  # it may wait for a person once more, weeks later
        if turn.waits:
            schedule.again(run_id, _SOON)

    def waits(self, schedule: Schedule, run_id: str, waits: Waits, ledger: Ledger, began_ms: int) -> None:
        """Give a run another turn, soon unless what it waits for cannot be delivered: then it stands as that does.

        Args:
            schedule: whose turn it was.
            run_id: the run.
            waits: for what.
            ledger: where it is recorded that it waits for a person.
            began_ms: when the turn began, in wall-clock milliseconds since the epoch.

        Raises:
            LedgerUnavailable: it could not be recorded.
        """
        other = schedule.standing(waits.on) if waits.on != run_id else Standing()
        if other.state == "parked":
            standing = Standing("parked", f"it waits for {waits.on}, which is parked: {other.reason}")
            self._park_run(ledger, run_id, standing.reason, began_ms)
        elif other.state == "broken" and other.failures >= TRIES:
            standing = Standing("broken", f"it waits for {waits.on}, which cannot be read: {other.reason}", TRIES)
        elif waits.on and self._source.lacks(waits.on):
            reason = f"it waits for {waits.on}, which is not among what is sent; send both"
            standing = Standing("broken", reason, TRIES)
        else:
            schedule.waits(run_id, after=waits.on)
            return
        schedule.again(run_id, self._settings.retry_max, standing, after=waits.on)

    def parked(
        self,
        schedule: Schedule,
        run_id: str,
        parked: Parked,
        ledger: Ledger,
        began_ms: int,
        asked: AskedSink,
        before: int,
    ) -> None:
        """Have a run wait for a person, or the whole destination if it is to blame.

        Args:
            schedule: whose turn it was.
            run_id: the run.
            parked: why.
            ledger: where that is recorded.
            began_ms: when the turn began, in wall-clock milliseconds since the epoch.
            asked: the tracking store.
            before: the requests that were made of it before the turn.

        Raises:
            LedgerUnavailable: it could not be recorded.
        """
        self._counters.add("parked")
        standing = Standing("parked", parked.outcome.reason)
        if concerns_destination(parked.error, cast("Sink", asked)):
            self._gate.park(ledger, parked.outcome.reason, began_ms, parked.error.login)
            schedule.again(run_id, 0.0, standing)
            return
        if asked.calls > before:
            self._gate.succeeded(ledger)  # MLflow has answered
        self._park_run(ledger, run_id, parked.outcome.reason, began_ms, parked.error)
        schedule.again(run_id, self._settings.parked_retry, standing)

    def _park_run(
        self, ledger: Ledger, run_id: str, reason: str, began_ms: int, error: SinkError | None = None
    ) -> None:
        record = ledger.record(run_id) or RunRecord(run_id)
        source = self._source
        advice = remedy(error, record, source.sends, source.resends) if error is not None else ""
        reason = printable(reason, 300).rstrip(".") + advice  # MLflow's own sentences end with a full stop
        record.state, record.reason, record.failed_at_ms = "parked", reason, began_ms
        ledger.commit(record)
        self._counters.warn_once(
            ("parked", run_id),
            f"mlflow-outbox: run {run_id} waits for a person: {reason}. Its events stay on disk",
        )
