"""What the ledger still knows of runs of which nothing is on disk any more: where their ids lead, and their counts.

A run that was delivered, read back and reclaimed needs no cursors and no view. It is *retired*: its record and its
view give way, in one transaction, to a row of about a hundred bytes, and what was counted of it is added to a sum. So
whoever reads all records reads those of runs on disk, and what was delivered does not go down.

The row is what ids need. A provisional id was given to user code, is good for ever, and only this row says what has
become of it: it stays. Every other run is found in MLflow by its own id or its tag, here as from another outbox; its
row spares that question for a while, for programs that go on with a run, and is then dropped (``expire``), unless runs
of this outbox were sent once more and ids that MLflow gave have become others. A run that goes on after all gets a
record again, and the row goes.
"""

from __future__ import annotations

from typing import Final

import msgspec

from mlflow_outbox.spool import provisional
from mlflow_outbox_worker import rows
from mlflow_outbox_worker.dbconnection import Cache
from mlflow_outbox_worker.records import RunRecord

_TOTAL: Final = "meta/retired"
_SETTLED: Final = "SELECT key FROM Cache WHERE key > 'settled/' AND key < 'settled0' AND raw = 1 AND tag = ?"
_OLD: Final = "SELECT key FROM Cache WHERE key > 'gone/' AND key < 'gone0' AND raw = 1 AND store_time < ?"


class Totals(msgspec.Struct, frozen=True, array_like=True):
    """What was counted of all retired runs, as in ``RunRecord``."""

    runs: int = 0
    delivered: int = 0
    dead: int = 0
    quarantined: int = 0
    missing: int = 0


class _Gone(msgspec.Struct, array_like=True):
    remote_id: str
    experiment: str = ""
    experiment_id: str = ""


_encode = msgspec.msgpack.Encoder().encode
_record_decoder = msgspec.msgpack.Decoder(RunRecord)
_gone_decoder = msgspec.msgpack.Decoder(_Gone)
_totals_decoder = msgspec.msgpack.Decoder(Totals)


def key_of(run_id: str) -> str:
    """Return the key of a retired run's row."""
    return f"gone/{run_id}"


def decoded_totals(value: bytes) -> Totals:
    """Return the sums that a value holds; none when it does not decode."""
    try:
        return _totals_decoder.decode(value) if value else Totals()
    except msgspec.DecodeError:
        return Totals()


def record_of(run_id: str, value: bytes) -> RunRecord:
    """Return what is known of a retired run as a record; it counts nothing, which is in the sum.

    Raises:
        msgspec.DecodeError: the value is not one of these.
    """
    found = _gone_decoder.decode(value)
    # Whatever comes of it again may be in MLflow already.
    return RunRecord(
        run_id,
        found.experiment,
        found.experiment_id,
        found.remote_id,
        state="done",
        ended=True,
        verified_at_ms=1,
        adopted=True,
    )


def retire(cache: Cache, run_id: str) -> bool:
    """Replace what is stored of a run, unless it is not done; return whether it was.

    Args:
        cache: in a transaction.
        run_id: a run of which nothing is on disk.
    """
    stored = rows.stored(cache, f"run/{run_id}")
    if stored is None:
        return False
    record = _record_decoder.decode(stored)
    if record.state != "done" or not record.verified_at_ms:
        return False
    rows.put(cache, key_of(run_id), _encode(_Gone(record.remote_id, record.experiment, record.experiment_id)))
    for name in ("run", "view"):
        rows.delete(cache, f"{name}/{run_id}")
    for (key,) in cache.query(_SETTLED, (run_id,)):
        rows.delete(cache, key)
    sums = decoded_totals(rows.stored(cache, _TOTAL) or b"")
    sums = Totals(
        sums.runs + 1,
        sums.delivered + record.delivered,
        sums.dead + record.dead,
        sums.quarantined + record.quarantined,
        sums.missing + record.missing,
    )
    rows.put(cache, _TOTAL, _encode(sums))
    return True


def old(cache: Cache, before: float) -> list[str]:
    """Return the retired runs whose rows are older than a time and carry nothing that MLflow does not know.

    Args:
        cache: the database.
        before: wall-clock seconds since the epoch.
    """
    ids = (str(key).partition("/")[2] for (key,) in cache.query(_OLD, (before,)))
    return [run_id for run_id in ids if not provisional.is_provisional(run_id)]


def expire(cache: Cache, run_id: str) -> None:
    """Drop the row of a retired run, and what leads to it.

    Args:
        cache: in a transaction.
        run_id: from ``old``.
    """
    stored = rows.stored(cache, key_of(run_id))
    remote_id = _gone_decoder.decode(stored).remote_id if stored is not None else ""
    if remote_id and rows.stored(cache, f"remote/{remote_id}") == run_id.encode():
        rows.delete(cache, f"remote/{remote_id}")
    rows.delete(cache, key_of(run_id))
