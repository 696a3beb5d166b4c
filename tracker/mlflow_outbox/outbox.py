"""One process's end of an outbox: its journals, its counters, and the worker it starts for delivery.

There is one ``Outbox`` object per outbox directory, worker kind and settings in a process, however many trackers use
it. It costs a directory check to make, and a look at its size where it is small; threads, processes and imports come
with the first event.

At the exit of the interpreter every outbox gets the chance to deliver what is left, for ``exit_timeout`` seconds in
all, and says in one line what stays on disk and how to send it. A forked child does not wait while its parent is there:
what it wrote is on disk, and its parent's worker, or the next one, delivers it. A parent that has none, for it has
logged nothing itself, starts one at its own exit. A process of ``multiprocessing`` that has opened the outbox itself
does all of that too, though Python may run no handlers of ``atexit`` in it (``pool``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import threading
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from mlflow_outbox import delivery, stopwatch
from mlflow_outbox.counters import Counters
from mlflow_outbox.ending import usable
from mlflow_outbox.interrupts import forward
from mlflow_outbox.living import Living
from mlflow_outbox.remainder import say_what_is_left
from mlflow_outbox.restarts import Restarts
from mlflow_outbox.settings import Settings, WorkerKind
from mlflow_outbox.spool.caretaker import Caretaker
from mlflow_outbox.spool.disk import is_being_written, is_locked
from mlflow_outbox.spool.guard import DiskGuard
from mlflow_outbox.spool.identity import RunIdentity
from mlflow_outbox.spool.journal import Journal
from mlflow_outbox.spool.tally import Tally

if TYPE_CHECKING:
    from mlflow_outbox.destination import Destination
    from mlflow_outbox.spool.directory import OutboxDirectory
    from mlflow_outbox.spool.disk import SystemDisk

#: Seconds for which a flush without a time, and the exit, wait for a disk that fails, and between two looks at it.
_PATIENCE: Final = 5.0
_AGAIN: Final = 0.1


@dataclasses.dataclass(frozen=True)
class FlushResult:
    """What delivery of an outbox has come to, in events; true when nothing is left to deliver but dead letters.

    Attributes:
        delivered: have arrived in MLflow in all, as far as the ledger knows.
        pending: wait on disk and are sent as soon as MLflow takes them; in memory too, while the disk takes none, from
            where ``close`` gives them up; 1 also where the disk does not tell.
        parked: wait on disk for a person, because MLflow refuses their run or the whole outbox.
        dead: were refused by MLflow for good, one by one, and are kept as dead letters, until somebody sends them again
            or drops them.
    """

    delivered: int = 0
    pending: int = 0
    parked: int = 0
    dead: int = 0

    def __bool__(self) -> bool:
        return self.pending == 0 and self.parked == 0


class Outbox:
    """Writes to one outbox directory and has it delivered.

    Args:
        directory: the outbox.
        destination: where it delivers to, with credentials if there are any.
        settings: the options.
        worker: "thread", "process", or "none" to only write.

    Attributes:
        arrived: events that had arrived in MLflow when a flush ended last.
        disk: the system calls of the journals that are made from now on; None is the machine's.
        stands_back: no worker is started while another process delivers, of which there may be many.
        restarts: when a worker that has ended is begun anew.
    """

    def __init__(
        self, directory: OutboxDirectory, destination: Destination, settings: Settings, worker: WorkerKind
    ) -> None:
        self.directory = directory
        self.destination = destination
        self.settings = settings
        self.worker_kind = worker
        self.counters = Counters()
        self.guard = DiskGuard(directory, settings, self.counters)
        self.guard.begin()
        self._tally = Tally(directory.path, self.counters)
        self._caretaker = Caretaker(
            settings.sync_interval,
            self.counters,
            each_round=self._look,
            let_go=self._note_written,
            is_relieved=None if worker == "none" or directory.network else self._is_relieved,
        )
        self.arrived = 0
        self.disk: SystemDisk | None = None
        self.stands_back = False
        self._parent, self._pid = 0, os.getpid()
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.RLock()
        self._worker: delivery.Worker | None = None
        self._is_starting = self._is_without_worker = False
        self.restarts = Restarts(self.directory.path, self.counters)
        self._journals: Living[Journal] = Living()
        self._has_written = self._has_forked = self._has_delivered = False
        self._since = time.time()
        self._written: dict[str, tuple[str, int]] = {}

    def __repr__(self) -> str:
        return f"<Outbox {str(self.directory.path)!r}, worker {self.worker_kind!r}, {self.counters!r}>"

    def journal(self, run: RunIdentity) -> Journal:
        """Return a new journal for a run; the worker is started with its first event."""
        journal = Journal(
            self.directory,
            run,
            self.settings,
            self.counters,
            registry=self._caretaker,
            wake=self._begun,
            disk=self.disk,
            refuse=self.guard.reason,
        )
        self._journals.add(journal)
        return journal

    def hand_out(self) -> None:
        """See to it that what others log who are given a handle is delivered from here, at the exit too."""
        self._begun()

    def _begun(self) -> None:
        """Note for the exit, when its journal may be gone, that something was logged; and let it be delivered."""
        self._has_written = True
        self._wake()

    def _wake(self, *, asked: bool = False) -> None:
        """Start the worker, or tell it that there is a new segment.

        Args:
            asked: somebody waits for delivery, whatever became of the workers before.
        """
        if self.worker_kind == "none" or sys.is_finalizing():  # a thread started by now would be waited for forever
            return
        worker = self._worker
        if worker is not None and worker.is_alive():
            worker.wake()
            return
        failed = ""
        with self._lock:
            if self._is_starting or (self._worker is not None and self._worker.is_alive()):
                return  # the first: a signal handler, or a __del__, logs while this very thread starts it
            if self.stands_back and is_locked(self.directory.lock):
                return  # if that one ends, the background looks again
            before = self._worker
            if before is not None:
                self.restarts.ended(before.end)
            if not asked and not self.restarts.is_due():
                return
            self._is_starting = self._is_without_worker = True
            try:
                self._worker = delivery.start(self)
                self._is_without_worker = False
                self.restarts.begun()
                if before is not None:
                    self.counters.add("workers_replaced")
            except (OSError, RuntimeError) as error:  # no threads or processes left, or the interpreter is exiting
                forward(error)
                self.counters.add("worker_not_started")
                failed = f"mlflow-outbox: no worker could be started ({error}); events stay on disk"
            finally:
                self._is_starting = False
        # Not under the lock: a log handler of the program's may be waiting for it in another thread.
        if failed and threading.main_thread().is_alive():  # else the exit has begun: it tries a process, and says more
            self.counters.warn_once("worker", failed)

    def has_worker(self) -> bool:
        """Return whether a worker of this process is there, which may not have begun to deliver.

        Asked by a flush that sees nobody deliver. Another tracker's ``close`` may have ended the one that it waits for.
        """
        if self._worker is None:
            self._wake()
        worker = self._worker
        return worker is not None and worker.is_alive()

    def _look(self) -> None:
        """Look at the disk budget, and see to it that somebody delivers while somebody logs, in the background.

        A worker may have died, or could not be started, or ended with another tracker of this outbox.
        """
        self.guard.look()
        self._tally.note()
        worker = self._worker
        if worker is not None and worker.is_alive():
            worker.look()
        elif worker is not None or (self.worker_kind != "none" and self._caretaker.is_watching):
            self._wake()

    def _is_relieved(self, segments: tuple[str, ...]) -> bool:
        """Return whether the process that delivers syncs these segments in this one's place."""
        worker = self._worker if self.disk is None else None  # another process syncs on the machine's
        return worker is not None and worker.syncs(segments)

    def _note_written(self, journal: Journal) -> None:
        """Remember how much a journal has written that may be gone at the exit, where nobody delivers meanwhile."""
        if self.worker_kind == "none":
            self._written[journal.writer] = (journal.run.run_id, journal.events)

    def sync(self) -> None:
        """Make everything logged so far survive a power cut."""
        self._caretaker.round()

    def flush(self, timeout: float | None, *, settled: bool = False) -> FlushResult:
        """Deliver what has been logged until now, as far as possible within a time.

        Args:
            timeout: seconds; None waits until nothing is pending, but not for a disk that goes on failing, and for
                minutes only where another machine delivers, and what it has delivered is not seen here.
            settled: wait too until no second run can come of a create that the server did not answer in time.
        """
        if sys.is_finalizing():  # nothing can be started or imported any more, and what is left was said at the exit
            self.counters.add("flushed_too_late")
            return FlushResult(self.arrived, pending=1)
        begun = stopwatch.seconds()
        deadline, patience = (None, _PATIENCE) if timeout is None else (begun + timeout, timeout)
        while True:
            self.sync()
            if self.worker_kind != "none":
                self._wake(asked=True)
            held = sum(journal.in_memory for journal in self._journals.members())
            remaining = None if deadline is None else max(0.0, deadline - stopwatch.seconds())
            result = delivery.flush(self, remaining, settled=settled)
            self.arrived = result.delivered
            left = begun + patience - stopwatch.seconds()
            if not held or left <= 0 or self.worker_kind == "none":
                return dataclasses.replace(result, pending=result.pending + held)
            time.sleep(min(_AGAIN, left))

    def rest(self, timeout: float) -> bool:
        """End what this process runs for the outbox, if everything was delivered; the next event starts it again.

        Args:
            timeout: seconds for the delivery of what is left, the ends of segments above all.

        Returns:
            Whether it rests.
        """
        journals, delivers = self._journals.members(), self.worker_kind != "none"
        if any(journal.in_memory for journal in journals) or (delivers and not delivery.flush(self, 0)):
            return False
        for journal in journals:
            journal.close()
        if delivers and not delivery.flush(self, timeout):
            return False
        self._caretaker.stop()  # before the worker, or a round of it would miss that
        with self._lock:
            worker, self._worker = self._worker, None
        if worker is not None:
            worker.stop(timeout=1.0)
        if delivers and not delivery.flush(self, 0):  # logged meanwhile, and told to a worker that was on its way out
            self._wake()
            return False
        self._has_delivered = True
        return True

    def close(self, timeout: float, own: Iterable[Journal] = ()) -> FlushResult:
        """Close the journals, deliver within a time, and stop this process's worker.

        Another tracker that logs to this outbox meanwhile or afterwards gets a worker again.

        Args:
            timeout: seconds for delivery.
            own: journals that nobody else uses: what the disk has not taken of them by then is given up.
        """
        for journal in self._journals.members():
            journal.close()
        self._since = time.time()
        self._tally.note()
        result = self.flush(timeout, settled=True)
        self._has_delivered = bool(result)
        self._caretaker.stop()  # before the worker, or a round of it would miss that
        self._lock = usable(self._lock)
        with self._lock:
            worker, self._worker = self._worker, None
        if worker is not None and not sys.is_finalizing():  # which has stopped it
            worker.stop(timeout=1.0)
        for journal in own:
            journal.release()
        self._tally.note()
        return result

    def at_exit(self, deadline: float) -> None:
        """Deliver until a deadline (monotonic seconds) and say what is left."""
        journals = self._journals.members()
        for journal in journals:
            journal.close()
        self._tally.note()
        self._caretaker.stop(for_good=True)
        if self._is_the_last():
            say_what_is_left(self, *self._left_at_exit(journals, deadline))
        if self._worker is not None:
            self._worker.stop(timeout=0.5)
        for journal in journals:
            journal.release()
        self._tally.note()

    def _left_at_exit(self, journals: list[Journal], deadline: float) -> tuple[int, int]:
        """Deliver until a deadline, and return how many events are pending then, and how many are parked."""
        only_writes = self.worker_kind == "none"
        of_children = self._has_forked and self._worker is None and self._has_segments_of_children()
        if not of_children and (only_writes or not self._has_written):
            for journal in journals:
                self._note_written(journal)
            own = sum(events for run_id, events in self._written.values() if self._is_left(run_id))
            # None of them wait if there is who delivers, in another process.
            return (0 if is_locked(self.directory.lock) else own), 0
        # A signal to all of the program's processes, as systemd sends, has ended it, and the background starts no more.
        # Or the exit's own events came when it rested, or first of all: since Python 3.12 no thread is started then.
        is_lost = self._is_without_worker or (self._worker is not None and not self._worker.is_alive())
        if (of_children or is_lost) and not only_writes:
            try:
                self._worker = delivery.start_at_exit(self)
            except (OSError, RuntimeError):
                self.counters.add("worker_not_started")
        is_delivered = self.stands_back or self._worker is not None
        if not is_delivered and self._has_delivered and is_locked(self.directory.lock):
            return 0, 0  # nothing was logged here since all had arrived: what waits is others', and on its way
        result = self._delivered_until(deadline if is_delivered else 0.0)
        if self._has_taken(journals, min(deadline, stopwatch.seconds() + _PATIENCE)):
            result = self._delivered_until(deadline if is_delivered else 0.0)
        return result.pending, result.parked

    def _delivered_until(self, deadline: float) -> FlushResult:
        return delivery.flush(self, max(0.0, deadline - stopwatch.seconds()), settled=True)

    def _has_taken(self, journals: list[Journal], deadline: float) -> bool:
        """Return whether a disk that failed takes some of what would be lost; nothing else tries any more.

        It may have been full, and what was delivered at the exit has made room.
        """
        before = held = sum(journal.in_memory for journal in journals)
        while held:
            self._caretaker.stop(for_good=True)
            held = sum(journal.in_memory for journal in journals)
            if stopwatch.seconds() >= deadline:
                break
            time.sleep(_AGAIN if held else 0.0)
        return held < before

    def _has_segments_of_children(self) -> bool:
        """Return whether a forked child has left something, that ended and did not wait for its delivery."""
        for run_id in self.directory.run_ids():
            for path in self.directory.segments(run_id):
                with contextlib.suppress(OSError):
                    if path.stat().st_mtime >= self._since and not is_being_written(path):
                        return True
        return False

    def _is_the_last(self) -> bool:
        """Return whether no parent is there that delivers after this process, as none is for a daemon."""
        return not self._parent or os.getppid() != self._parent

    def _is_left(self, run_id: str) -> bool:
        """Return whether something of a run was not delivered by somebody else, who files what is."""
        return bool(self.directory.segments(run_id))

    def has_forked(self) -> None:
        """Take note in the parent: a child does not wait at its end for the delivery of what it writes."""
        self._has_forked = True

    def forked(self) -> None:
        """Begin anew in a forked child: the worker thread stayed in the parent; runs go on, as writers of their own."""
        self._parent, self._pid = self._pid, os.getpid()
        journals = self._journals
        self._begin()
        self._journals = journals
