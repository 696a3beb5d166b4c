"""What the ledger keeps of each run: how far it was delivered, as what, and what went wrong.

Records are msgspec structs, stored as MessagePack maps, so that fields can be added in any version.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from mlflow_outbox.spool.window import Cursor

#: "active": deliver; "parked": waits for a person; "done": ended, delivered and verified.
RunState = Literal["active", "parked", "done"]


class RunRecord(msgspec.Struct):
    """The delivery state of one run.

    Attributes:
        run_id: the run's id in this outbox.
        experiment: name of its experiment.
        remote_id: its id in MLflow; "" until the run has been created or found there.
        creating: a create was tried whose fate may be unknown: search before the next one, and look for twins.
        creates: how many creates were tried, the program's own included.
        settles_ms: wall-clock time at which twins are looked for; 0 when none can come, or that was done.
        cursors: how far each writer (by writer id) was delivered.
        uncertain: where the window began (cursors) whose requests may have been carried out in part; None when all
            before the cursors is known to have been answered. Of stores that deduplicate only kept for large files.
        adopted: the run was found in MLflow when it was first looked for, so that any of its events may be there
            already.
        delivered, refused: counts of events, of which each is the one or the other (``refused.Refused`` says which).
        dead: count of dead letters, of which one event can yield many.
        quarantined, missing: counts of ranges that held no intact events, and of events that are not there.
        reason: why the run is parked, or the last error.
        failed_at_ms: wall-clock time at which the attempt began that met it.
        ended: the last status seen is a final one.
        verified_at_ms: when reading back showed that MLflow holds the run; 0 before.
        mismatch: what reading back found to be lacking; "" when nothing.
        settled: how far each writer was delivered when the run began to be sent once more: up to there, artifacts that
            are marked so in its view are not sent again. None when it is not sent once more.
        altered: which artifacts others had changed or deleted when the run was read back; "" when none.
    """

    run_id: str
    experiment: str = ""
    experiment_id: str = ""
    remote_id: str = ""
    creating: bool = False
    state: RunState = "active"
    cursors: dict[str, Cursor] = {}
    uncertain: dict[str, Cursor] | None = None
    delivered: int = 0
    dead: int = 0
    quarantined: int = 0
    missing: int = 0
    reason: str = ""
    failed_at_ms: int = 0
    ended: bool = False
    verified_at_ms: int = 0
    mismatch: str = ""
    adopted: bool = False
    creates: int = 0
    settles_ms: int = 0
    refused: int = 0
    settled: dict[str, Cursor] | None = None
    altered: str = ""


class DeadLetter(msgspec.Struct):
    """An event that MLflow refused for good, with the answer it gave.

    Attributes:
        id: key in the ledger, also its order; "" until it is stored.
        payload: the event (or the part of it that was refused) in the journal's encoding.
        reason: MLflow's answer in one sentence.
    """

    run_id: str
    remote_id: str
    payload: bytes
    reason: str
    code: str
    status: int | None
    time_ms: int
    id: str = ""

    @property
    def number(self) -> str:
        """Its id as people write it."""
        return self.id.lstrip("0") or "0"
