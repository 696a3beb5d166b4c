"""The loop that delivers an outbox: it gives runs their turns (``schedule``) as the destination allows (``gate``).

One object delivers one outbox, in a thread of the experiment, in a process of its own, or for a command: the loop is
the same. It works while it holds the lease; without it, it stands by and takes over when the holder dies.

* Runs are sent side by side by as many lanes (threads) as the store can take; one run's events go through one lane at a
  time, in order but for points (``volley``). A run gets a turn of some windows, then the next one: a long backlog holds
  up nobody.
* A failed run waits by its own back-off, so it never holds up another. A failure that says something about the
  destination (no connection, a time-out, 5xx, 401, a login page) makes all runs wait by the destination's back-off,
  and then one run at a time tries, a different one each time, with its next window alone, until one has arrived: no
  storm on a server that is coming back, and no wait for the rest of that run, nor for a large upload in that window:
  when a try takes longer than requests do, the next one is made beside it.
* Nothing here gives up. A parked run or destination is tried again slowly, and at once when somebody asks to hurry.
* An idle loop looks at the doorbell and the sizes of segments that are being written, so ten thousand runs may wait.
"""

from __future__ import annotations

import contextlib
import copy
import socket
import threading
import time
from collections.abc import Callable
from typing import Final, cast

from mlflow_outbox import stopwatch
from mlflow_outbox.counters import Counters, printable
from mlflow_outbox.destination import Destination
from mlflow_outbox.errors import LedgerUnavailable, OutboxUnusable
from mlflow_outbox.settings import Settings
from mlflow_outbox.spool.alarm import Alarm
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox_worker.asked import AskedSink
from mlflow_outbox_worker.courier import Courier
from mlflow_outbox_worker.finish import finish
from mlflow_outbox_worker.gate import Gate
from mlflow_outbox_worker.host_lease import described
from mlflow_outbox_worker.lease import Holder
from mlflow_outbox_worker.ledger import Ledger, LedgerCorrupt
from mlflow_outbox_worker.lookout import Lookout
from mlflow_outbox_worker.opener import Opener, OpenSink
from mlflow_outbox_worker.precedence import Waits
from mlflow_outbox_worker.recollection import Recollection
from mlflow_outbox_worker.requests import Later, Parked
from mlflow_outbox_worker.requeue import begun
from mlflow_outbox_worker.room import Room
from mlflow_outbox_worker.schedule import Schedule, Standing
from mlflow_outbox_worker.sink import Sink, SinkError
from mlflow_outbox_worker.sources import OutboxSource, Source
from mlflow_outbox_worker.turns import Turns
from mlflow_outbox_worker.twins import settle
from mlflow_outbox_worker.upkeep import Upkeep

#: Seconds between two tries of a standing-by worker for the lease: a dead holder is replaced within two seconds.
_STAND_BY: Final = 1.0
#: Times the limit of a request until another run tries beside one that does: what takes so long is an upload.
_UPLOADS: Final = 2.0


class Delivery:
    """Delivers one outbox until it is stopped.

    Args:
        directory: the outbox, or whatever else holds runs.
        destination: where to, with credentials if there are any.
        settings: the options.
        counters: what happened, by reason.
        kind: what holds the lease, for messages: "thread", "process" or "command".
        open_sink: makes the sink; a parameter for tests and for other destinations.
        now_ms: wall-clock milliseconds since the epoch.
        clock: seconds of a clock that never goes back.
        leave: asked once a second by a loop that delivers whether to give up, for another one to go on.
    """

    def __init__(
        self,
        directory: OutboxDirectory | Source,
        destination: Destination,
        settings: Settings,
        counters: Counters,
        *,
        kind: str,
        open_sink: OpenSink | None = None,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        clock: Callable[[], float] = stopwatch.seconds,
        leave: Callable[[], bool] = lambda: False,
    ) -> None:
        self._source: Source = OutboxSource(directory) if isinstance(directory, OutboxDirectory) else directory
        self._settings = settings
        self._counters = counters
        self._now_ms = now_ms
        self._clock = clock
        self._leave = leave
        self._lease = self._source.lease(kind)
        self._room = Room(self._source.filing, settings, counters)
        self._upkeep = Upkeep(self._source.filing, settings, counters, self._room, now_ms=now_ms, clock=clock)
        self._recollection = Recollection(
            self._source.filing, destination, settings, counters, now_ms=now_ms, clock=clock
        )
        self._stop = threading.Event()
        self._wakeup = Alarm()  # which a logging call rings, and what interrupts one in the middle of that
        self._schedule = Schedule(settings, clock)
        self._gate = Gate(destination.uri, settings, counters, clock=clock, now_ms=now_ms)
        self._turns = Turns(self._source, settings, counters, self._gate)
        self._opener = Opener(
            destination, settings, self._gate, counters, open_sink=open_sink, now_ms=now_ms, clock=clock
        )
        self._lookout = Lookout(self._source, self._schedule, self._gate, clock)
        #: Which runs there are is known since the lease was taken: opening the ledger comes before.
        self._has_looked = False
        self._lanes = 0
        #: The run that tried last whether the destination is there again, and until when it tries alone.
        self._trying, self._alone_until = "", 0.0
        self._ledger: Ledger | None = None
        self._sink: AskedSink | None = None
        self._courier: Courier | None = None
        #: Runs of which a replay had begun to send everything once more, and who goes on with those alone.
        self._begun: frozenset[str] = frozenset()
        self._resender: Courier | None = None

    def __repr__(self) -> str:
        state = "delivering" if self._lease.is_held() else "standing by"
        return f"<Delivery of {str(self._source.path)!r}, {state}, {len(self._schedule)} runs ready>"

    # -- from other threads

    def wake(self) -> None:
        """Look at the doorbell now."""
        self._wakeup.ring()

    def stop(self) -> None:
        """Leave the loop after the requests under way."""
        self._stop.set()
        self._wakeup.ring()
        with self._schedule.changed:
            self._schedule.changed.notify_all()

    def syncs(self, segments: tuple[str, ...]) -> bool:  # noqa: ARG002 - nobody does in a process of its own
        """Return whether another process syncs segments for this one: there is none."""
        return False

    def is_stopped(self) -> bool:
        """Return whether the loop is to end."""
        return self._stop.is_set()

    def holds_lease(self) -> bool:
        """Return whether this worker is the one that delivers."""
        return self._lease.is_held()

    def is_idle(self) -> bool:
        """Return whether everything that is on disk was delivered, as far as the last look told."""
        return self._lease.is_held() and self._has_looked and self._schedule.is_quiet()

    def is_at_work(self) -> bool:
        """Return whether a run has its turn, or may have one at once."""
        return self._lease.is_held() and bool(self._schedule.busy() or (len(self._schedule) and self._gate.is_open()))

    def is_sending(self) -> bool:
        """Return whether a run has its turn, and the last attempt, if there was one, says nothing against it."""
        return self._lease.is_held() and self._schedule.busy() > 0 and self._gate.notes.state in {"", "ok"}

    def is_settling(self) -> bool:
        """Return whether a run of which everything was sent may still get a twin."""
        return self._lease.is_held() and self._schedule.is_settling()

    def standings(self) -> dict[str, Standing]:
        """Return how every run stands that the loop has taken notice of."""
        return self._schedule.standings()

    def condition(self) -> tuple[str, str]:
        """Return how the destination stands ("ok", "away", "parked"; "" before the first attempt), and why."""
        return self._gate.notes.state, self._gate.notes.reason

    def other_worker(self) -> Holder | None:
        """Return who else delivers; None when nobody does, or this worker."""
        return self._lease.other()

    # -- the loop

    def run(self) -> None:
        """Deliver until stopped. Never raises: trouble is counted, said once, and tried again."""
        while not self._stop.is_set():
            try:
                self._source.check_unchanged()  # or the lease would be that of an outbox which another worker delivers
                if self._lease.acquire():
                    self._hold()
                else:
                    self._say_who_delivers()
                    self._pause(_STAND_BY)
            except LedgerCorrupt as error:
                self._trouble("ledger_corrupt", error)  # opening it again sets it aside and makes a new one
                self._pause(self._settings.poll_interval)
            except (LedgerUnavailable, OutboxUnusable, OSError) as error:
                self._trouble("worker_errors", error)
                self._pause(_STAND_BY)
            except BaseException as error:  # the worker must outlive all mistakes; counted and said
                if not isinstance(error, Exception) and threading.current_thread() is threading.main_thread():
                    raise  # ctrl-C of a command; in a thread, which nobody may be there to replace, it means nothing
                self._trouble("worker_crashes", error)
                self._pause(_STAND_BY)
            finally:
                self._let_go()

    def _say_who_delivers(self) -> None:
        """Say once that another machine delivers; that another process here does needs no words."""
        found = self._lease.other() if self._source.remote else None
        if found is not None and found.host != socket.gethostname():
            self._counters.warn_once(
                ("host", found.host),
                f"mlflow-outbox: {described(found)} delivers {self._source.path}; this one stands by",
            )

    def _trouble(self, reason: str, error: BaseException) -> None:
        self._counters.add(reason)
        self._counters.warn_once(
            (reason, type(error), str(error)[:80]), f"mlflow-outbox: delivery: {printable(repr(error), 300)}"
        )

    def _pause(self, seconds: float) -> None:
        self._wakeup.sleep(seconds)

    def _hold(self) -> None:
        """Deliver as long as the lease is sound."""
        self._ledger = self._room.opened(
            self._source.ledger_in(self._settings.ledger_dir),
            lambda text: self._counters.warn_once(text, f"mlflow-outbox: {text}"),
        )
        self._schedule.clear()
        self._gate.notes.begin()
        self._lookout.begin()
        self._has_looked = True
        self._upkeep.begin()
        self._room.begin(self._ledger)
        self._recollection.begin(self._ledger)
        next_check = self._clock() + _STAND_BY
        while not self._stop.is_set():
            now = self._clock()
            if self._lookout.look():
                self._room.look(self._ledger, measure=True)
            if now >= next_check:
                if not self._lease.is_sound():
                    self._counters.add("leases_lost")
                    return
                if self._leave():
                    self._stop.set()
                    return
                self._source.check_unchanged()
                delivered, sending = self._counters["delivered"], self.is_sending()
                self._gate.notes.pace(self._ledger, delivered, now, self._now_ms(), sending=sending)
                self._room.look(self._ledger)
                next_check = now + _STAND_BY
            self._upkeep.reclaim(self._ledger)
            if not self._dispatch():
                self._recollect(self._ledger)
                self._pause(self._settings.poll_interval)

    def _let_go(self) -> None:
        self._has_looked = False
        with self._schedule.changed:
            lanes_quiet = self._schedule.changed.wait_for(
                lambda: not self._schedule.busy(), timeout=self._settings.request_timeout + 5
            )
        if not lanes_quiet:
            self._counters.add("lanes_abandoned")
            self._schedule = Schedule(self._settings, self._clock)  # what such a lane gives back is not its successor's
            self._lookout = Lookout(self._source, self._schedule, self._gate, self._clock)
        self._courier = self._resender = None
        sink, self._sink = self._sink, None
        if sink is not None:
            with contextlib.suppress(SinkError):
                sink.close()
        ledger, self._ledger = self._ledger, None
        if ledger is not None:
            with contextlib.suppress(LedgerUnavailable):
                ledger.close()
        self._lease.release()

    # -- what there is to do

    def _dispatch(self) -> bool:
        """Give ready runs to lanes; return whether it is worth coming back at once."""
        if not len(self._schedule) or not self._gate.is_open():
            return False
        if self._courier is None and not self._open():
            return False
        if self._sink is None or not self._sink.parallel:
            chosen = self._schedule.take(1)
            for run_id in chosen:
                self._take_turn(run_id)
            return bool(chosen)
        if self._gate.is_proven():
            self._trying = ""  # what it does from now on tries nothing
            chosen = self._schedule.take(self._settings.parallel_runs)
        else:
            chosen = self._one_that_tries()
        for run_id in chosen:
            self._start_lane(run_id)
        if chosen or self._schedule.busy():
            with self._schedule.changed:
                if self._schedule.busy():  # else it has come back already
                    self._schedule.changed.wait(self._settings.poll_interval)
            return True
        return False

    def _one_that_tries(self) -> list[str]:
        """Take a run that tries, beside lanes in the middle of something, which may be an upload of an hour."""
        now = self._clock()
        if self._schedule.is_busy(self._trying) and now < self._alone_until:
            return []
        chosen = self._schedule.take(min(self._settings.parallel_runs, self._schedule.busy() + 1))
        if chosen:
            self._trying, self._alone_until = chosen[0], now + _UPLOADS * self._settings.request_timeout
        return chosen

    def _recollect(self, ledger: Ledger) -> None:
        """See to a filed run that the ledger does not know, while there is nothing to send."""
        if not self._recollection.is_due() or not self._gate.is_open() or self._schedule.busy():
            return
        if (self._courier is not None or self._open()) and self._recollection.step(cast("Sink", self._sink), ledger):
            self._room.filed()

    def _open(self) -> bool:
        assert self._ledger is not None  # noqa: S101 - for the type checker: _hold opened it
        self._sink = self._opener.open(self._ledger)
        if self._sink is None:
            return False
        self._begun = begun(self._source, self._ledger)
        courier = self._made(self._source)
        if self._begun:
            again = copy.copy(self._source)
            again.again = True
            self._resender = self._made(again, beside=courier)
        self._courier = courier
        return True

    def _made(self, source: Source, *, beside: Courier | None = None) -> Courier:
        sink, ledger = cast("Sink", self._sink), cast("Ledger", self._ledger)
        return Courier(
            *(source, sink, ledger, self._settings, self._counters),
            now_ms=self._now_ms,
            stopped=self.is_stopped,
            beside=beside,
        )

    # -- lanes

    def _start_lane(self, run_id: str) -> None:
        self._lanes += 1
        lane = threading.Thread(
            target=self._take_turn, args=(run_id,), name=f"mlflow-outbox-lane-{self._lanes}", daemon=True
        )
        try:
            lane.start()
        except RuntimeError:  # no threads left, or the interpreter is exiting: go on in this one
            self._counters.add("lanes_not_started")
            self._take_turn(run_id)

    def _take_turn(self, run_id: str) -> None:
        schedule = self._schedule
        try:
            self._attempt(run_id, schedule)
        except (LedgerUnavailable, OSError) as error:
            self._trouble("ledger_errors" if isinstance(error, LedgerUnavailable) else "run_errors", error)
            schedule.again(run_id, _STAND_BY, Standing("broken", str(error)))
            if isinstance(error, LedgerCorrupt):
                self._counters.add("ledger_corrupt")
                self._lease.release()  # ends _hold; the next one opens a new ledger
        except Exception as error:  # noqa: BLE001 - one run's trouble must not end the others' delivery; counted and said
            self._trouble("run_crashes", error)
            schedule.again(run_id, self._settings.retry_max, Standing("broken", repr(error)))
        except BaseException as error:  # this thread ends, and if it is a lane nobody else would return to the run
            self._trouble("run_crashes", error)
            schedule.again(run_id, self._settings.retry_max, Standing("broken", repr(error)))
            raise
        finally:
            schedule.release(run_id)

    def _attempt(self, run_id: str, schedule: Schedule) -> None:
        """Give a run its turn, and note what came of it, which may fail as well."""
        courier = self._resender if run_id in self._begun else self._courier
        ledger, asked = self._ledger, self._sink
        assert courier is not None and ledger is not None and asked is not None  # noqa: S101, PT018 - opened before any lane
        sink, before = cast("Sink", asked), asked.calls
        began_ms = self._now_ms()
        try:
            stamp = self._lookout.stamp(run_id)
            turn = courier.turn(run_id, windows=None if self._gate.is_proven() else 1)
            settles_in = 0.0
            if turn.progress != "more":
                settles_in = settle(sink, ledger, turn.record, self._settings, self._counters, now_ms=self._now_ms)
            complete = turn.progress != "more" and not turn.waits
            if turn.progress == "idle" and not settles_in:
                complete = finish(self._source, sink, ledger, self._settings, self._counters, turn, now_ms=self._now_ms)
            filed_in = self._upkeep.file(ledger, turn)
            # After finish, which asks MLflow too: a turn that had nothing to send says nothing about the destination.
            if asked.calls > before:
                self._gate.succeeded(ledger)
            self._turns.went_well(schedule, run_id, turn)
            if complete:
                schedule.sent(run_id, stamp, settles_in=settles_in, filed_in=filed_in)
                self._room.look(ledger, measure=True)
        except Waits as waits:  # for another run's turn; nothing is wrong with the destination
            self._turns.waits(schedule, run_id, waits, ledger, began_ms)
        except Later as later:
            self._counters.add("retried")
            schedule.failed(run_id, later.error, later.outcome.reason)
            self._gate.failed(ledger, later.error, later.outcome, began_ms)
        except Parked as parked:
            self._turns.parked(schedule, run_id, parked, ledger, began_ms, asked, before)
