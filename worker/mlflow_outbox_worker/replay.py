"""Replay: runs that are on disk, wherever they lie, into MLflow, once; interrupted and started again it goes on.

What is replayed decides how:

* An outbox of one's own, into its recorded destination: with its own ledger and lease, as any worker does it. Nothing
  new.
* Everything else (another destination or experiment, loose or copied run directories, bundles, read-only media, an
  outbox that a machine without internet is writing on a shared file system): the files are only read. How far it has
  come is kept in a ledger of this machine, one per destination. That ledger may be lost, or another machine may
  replay the same files: runs are found in MLflow by their tag, and nothing is there twice.

One loop does both (``delivery``); this module says what goes into it and when it is done. A run that cannot be read
or that MLflow refuses is skipped and named, the others go on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, Literal, NamedTuple, Protocol

from mlflow_outbox import stopwatch
from mlflow_outbox.counters import Counters
from mlflow_outbox.errors import LeaseHeld, LedgerUnavailable
from mlflow_outbox.settings import Settings
from mlflow_outbox.spool.reader import RunReader
from mlflow_outbox.spool.writer import is_closed, writer_state
from mlflow_outbox_worker.delivery import Delivery
from mlflow_outbox_worker.host_lease import described, is_elsewhere, worker_of
from mlflow_outbox_worker.jobs import Job, Runs, Wish, known_records, pending_events
from mlflow_outbox_worker.lease import Holder
from mlflow_outbox_worker.opener import OpenSink
from mlflow_outbox_worker.records import RunRecord
from mlflow_outbox_worker.requeue import requeue
from mlflow_outbox_worker.schedule import TRIES
from mlflow_outbox_worker.thread import ThreadWorker

#: Seconds between two looks at how far it is.
_LOOK: Final = 0.1
#: Seconds between two looks at whether writers live.
_LIVES: Final = 1.0
#: Seconds that the end waits for the delivery to finish in order, and for requests under way when time is up.
_FINISH: Final = 2.0
_PARTING: Final = 0.5
#: Seconds to wait for a lease that nobody seems to hold before it is an error.
_LEASE: Final = 15.0
_GONE: Final = "it is not on disk any more"


#: Seconds without a sign of life of a writer on another machine after which it counts as dead.
GIVE_UP: Final = 3600.0


class Stop(Protocol):
    """What ends a replay early, a ``threading.Event`` for instance."""

    def is_set(self) -> bool:
        """Return whether it has been asked to end."""
        ...

    def wait(self, timeout: float) -> bool:
        """Wait for that, for so many seconds at most, and return whether it has been asked."""
        ...


class RunResult(NamedTuple):
    """What has become of one run.

    Attributes:
        state: "sent" and, if it has ended, read back; "skipped" for the reason; "left" when there was no time or no
            server.
        reason: why it was skipped or left; of one that was followed, what is known of its writer.
        remote_id: its id in MLflow; "" when it has none yet.
        dead: its events that MLflow refused for good.
        missing: its events that are not on disk any more, or damaged.
        gone: nothing of it is on disk any more, and it was not sent before.
    """

    run_id: str
    state: Literal["sent", "skipped", "left"]
    reason: str = ""
    remote_id: str = ""
    delivered: int = 0
    dead: int = 0
    missing: int = 0
    gone: bool = False


class JobResult(NamedTuple):
    """How a job ended: its runs, and why it ended early.

    Attributes:
        cut_short: "" when it did not, "before" when all was sent before, "parked", "interrupted", or "time".
        reason: what the destination said.
    """

    runs: list[RunResult]
    cut_short: str = ""
    reason: str = ""


class Progress(NamedTuple):
    """How far a job is: events and runs sent of all, and what there is to say."""

    events: int
    total: int
    runs: int
    all_runs: int
    note: str = ""


class Replay:
    """Carries out one job.

    Args:
        job: what to do.
        settings: the options; of ``ledger_dir`` only an outbox's own delivery takes notice.
        wish: what was asked for.
        stopped: set to end early.
        give_up: seconds without a sign of life of a writer on another machine after which following it ends.
        open_sink: makes the sink.
    """

    def __init__(
        self,
        job: Job,
        settings: Settings,
        wish: Wish,
        *,
        stopped: Stop,
        give_up: float = GIVE_UP,
        open_sink: OpenSink | None = None,
    ) -> None:
        self._job = job
        self._settings = settings if job.own is not None else dataclasses.replace(settings, ledger_dir=None)
        self._wish = wish
        self._stopped = stopped
        self._give_up = give_up
        self._open_sink = open_sink
        self._counters = Counters()
        self._lives: dict[str, str] = {}
        self._lost: set[str] = set()
        self._look_at_lives = 0.0

    def __repr__(self) -> str:
        return f"<Replay of {len(self._job.runs)} runs to {self._job.destination.uri!r}>"

    def run(self, show: Callable[[Progress], None], *, timeout: float | None = None) -> JobResult:
        """Send the runs until they are sent or cannot be.

        Args:
            show: told now and then how far it is.
            timeout: seconds to take at most, looking at the files included; None goes on until done.

        Raises:
            LeaseHeld: another worker delivers from the source.
            LedgerUnavailable: the ledger cannot be used.
            OSError: the local state directory cannot be written.
        """
        job, deadline = self._job, None if timeout is None else stopwatch.seconds() + timeout
        if job.again:
            requeue(job.source, job.own, job.runs, self._settings)
            self._lost = {run_id for run_id in job.runs if not self._is_there(run_id)}
        records = self._records()
        before = pending_events(job, records)
        done = [run_id for run_id, record in records.items() if record.state == "done" and before.get(run_id) == 0]
        if len(done) == len(job.runs) and not self._wish.follow:
            return JobResult(self._results({}), "before")
        if deadline is not None and stopwatch.seconds() >= deadline:
            if job.own is not None:
                self._respect(worker_of(job.own))
            return JobResult(self._results({}), "time")
        delivery = Delivery(
            job.source,
            job.destination,
            self._settings,
            self._counters,
            kind="command",
            open_sink=self._open_sink,
        )
        worker = ThreadWorker(lambda: delivery, self._counters)
        worker.start()
        why = ("", "")
        try:
            why = self._until_done(delivery, show, sum(before.values()), deadline)
        finally:
            standings = {run_id: (one.state, one.reason) for run_id, one in delivery.standings().items()}
            worker.stop(_FINISH if not why[0] else _PARTING)
        return JobResult(self._results(standings), *why)

    def _until_done(
        self, delivery: Delivery, show: Callable[[Progress], None], total: int, deadline: float | None
    ) -> tuple[str, str]:
        started = stopwatch.seconds()
        while True:
            runs = self._runs()
            settled = self._settled(delivery, runs)
            done = self._counters["delivered"] + self._counters["dead_events"]
            state, reason = delivery.condition()
            note = f"the destination does not take events now: {reason}" if state == "away" else ""
            over = not self._wish.follow or self._nobody_writes(runs)
            is_late = deadline is not None and stopwatch.seconds() >= deadline
            show(Progress(done, max(total, done), len(settled), len(runs), note or self._said_of_lives()))
            sent = over and len(settled) == len(runs) and (not self._wish.follow or self._is_at_the_end(delivery))
            # What was created in doubt is read back a little later: worth waiting for, but it is sent already.
            if sent and (is_late or self._stopped.is_set() or not delivery.is_settling()):
                return "", ""
            if state == "parked":
                return "parked", reason
            if self._stopped.is_set():
                return "interrupted", ""
            now = stopwatch.seconds()
            is_over = deadline is not None and now >= deadline
            # Once before the end too, however late a busy machine has let this begin.
            self._check_lease(delivery, _LOOK if is_over else now - started)
            if is_over:
                return "time", reason
            self._stopped.wait(_LOOK if deadline is None else max(0.0, min(_LOOK, deadline - now)))

    def _runs(self) -> Runs:
        if self._wish.follow:
            known = {run_id: self._job.source.everywhere(run_id) for run_id in self._job.source.run_ids()}
            self._job.runs.update(known)
        return self._job.runs

    def _settled(self, delivery: Delivery, runs: Runs) -> set[str]:
        """Return the runs that are sent, or that cannot be."""
        standings = delivery.standings()
        if not standings and not delivery.holds_lease():
            return set()
        result = set()
        present: set[str] | None = None
        for run_id in runs:
            standing = standings.get(run_id)
            if standing is None:
                if present is None:
                    present = set(self._job.source.run_ids())
                if run_id not in present:
                    result.add(run_id)  # filed
            elif standing.state in {"sent", "parked"} or (standing.state == "broken" and standing.failures >= TRIES):
                result.add(run_id)
        return result

    def _check_lease(self, delivery: Delivery, waited: float) -> None:
        if delivery.holds_lease() or waited < _LOOK:
            return
        self._respect(delivery.other_worker())
        if waited > _LEASE:
            place = self._job.source.ledger_in(self._settings.ledger_dir)
            msg = f"no ledger could be opened in {place}; see the warnings above"
            raise LedgerUnavailable(msg)

    def _respect(self, found: Holder | None) -> None:
        """Leave the source to the worker that delivers from it, if there is one."""
        if found is None:
            return
        if self._job.own is None:  # what is held is the place, not the runs: the other may send any
            place = f"another replay to {self._job.destination.uri} is under way, by {described(found)}"
            msg = f"{place}; repeat this one afterwards"
        else:
            msg = f"{described(found)} delivers {self._job.source.path}; it sends these runs, or end it first"
            if is_elsewhere(found):  # such as a node of a cluster, which keeps the lease for as long as its job runs
                advice = "a program on one that does not reach the server should only write (MLFLOW_OUTBOX_WORKER=none)"
                msg += f"; {advice}"
        raise LeaseHeld(msg)

    # -- following

    def _nobody_writes(self, runs: Runs) -> bool:
        now = stopwatch.seconds()
        if now >= self._look_at_lives:
            self._look_at_lives = now + _LIVES
            self._lives = {run_id: life_of(folders, self._give_up) for run_id, folders in runs.items()}
        return not any(life.startswith(("writing", "silent")) for life in self._lives.values())

    def _is_at_the_end(self, delivery: Delivery) -> bool:
        """Return whether runs that are settled are so to the end of their files.

        A run was settled before the look that found nobody writing: what its writer did in between, the run's end
        above all, may not have been sent. So this looks at the writers once more, and then at what they left.
        """
        self._look_at_lives = 0.0
        if not self._nobody_writes(self._runs()):
            return False
        standings = delivery.standings()
        rest = pending_events(self._job, self._records())
        sent = all(
            not left for run_id, left in rest.items() if run_id in standings and standings[run_id].state == "sent"
        )
        if not sent:
            delivery.wake()
        return sent

    def _said_of_lives(self) -> str:
        said = [f"run {run_id[:8]}: {life}" for run_id, life in self._lives.items() if life]
        return "; ".join(said[:3])

    # -- results

    def _records(self) -> dict[str, RunRecord]:
        return known_records(self._job, self._settings)

    def _results(self, standings: Mapping[str, tuple[str, str]]) -> list[RunResult]:
        records = self._records()
        rest = pending_events(self._job, records)
        results = []
        for run_id in self._job.runs:
            record = records.get(run_id) or RunRecord(run_id)
            state, reason = standings.get(run_id, ("", ""))
            if record.state == "parked":
                state, reason = "parked", record.reason
            gone = self._is_gone(run_id, record)
            if gone:
                state, reason = "broken", _GONE
            if state in {"parked", "broken"}:
                shown: Literal["sent", "skipped", "left"] = "skipped"
            else:
                shown = "left" if rest.get(run_id) and state != "sent" else "sent"
            results.append(
                RunResult(
                    run_id,
                    shown,
                    reason if shown != "sent" else self._lives.get(run_id, ""),
                    record.remote_id,
                    record.delivered,
                    record.dead,
                    record.missing + record.quarantined,
                    gone,
                )
            )
        return results

    def _is_gone(self, run_id: str, record: RunRecord) -> bool:
        """Return whether a run was reclaimed or deleted before it was sent as a whole.

        Of an outbox's own delivery what is not there any more is delivered, unless it was to be sent once more.
        """
        if self._job.own is not None:
            return run_id in self._lost
        return record.state != "done" and not self._is_there(run_id)

    def _is_there(self, run_id: str) -> bool:
        return any(folder.is_dir() for folder in self._job.source.everywhere(run_id))


def life_of(folders: tuple[Path, ...], give_up: float) -> str:
    """Return what is known of the writers of a run, for people; "" when nobody writes to it and nobody died.

    Args:
        folders: the run's directories.
        give_up: seconds of silence after which a writer on another machine counts as dead.
    """
    lives: list[tuple[int, str]] = []
    for held in RunReader(*folders).segments().values():
        last = held[-1]
        if is_closed(last.path, last.header):
            continue
        state = writer_state(last.path, last.header)
        where = f"on {last.header.host or 'another machine'} (process {last.header.pid})"
        if state.kind == "writing":
            lives.append((0, f"writing, last event {state.idle:.0f} s ago"))
        elif state.kind == "died" or state.idle >= give_up:
            lives.append((2, f"its writer {where} died {state.idle:.0f} s ago or so, without ending it"))
        else:
            lives.append((1, f"silent for {state.idle:.0f} s; its writer {where} may be idle or dead"))
    return min(lives, default=(0, ""))[1]
