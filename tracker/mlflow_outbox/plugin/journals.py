"""The journals that this process writes for one tracking URI, and what it knows of their runs."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from mlflow.exceptions import MlflowException

from mlflow_outbox.counters import printable
from mlflow_outbox.courtesy import courtesy
from mlflow_outbox.errors import ArtifactRefused
from mlflow_outbox.plugin import codec
from mlflow_outbox.spool import frame, provisional
from mlflow_outbox.spool.enclosure import append_enclosing
from mlflow_outbox.spool.events import Event, Request, RunStarted
from mlflow_outbox.spool.identity import RunIdentity
from mlflow_outbox.spool.reader import RunReader
from mlflow_outbox.spool.snapshot import Hold, Snapshot, SnapshotStore

if TYPE_CHECKING:
    from mlflow_outbox.outbox import Outbox
    from mlflow_outbox.spool.journal import Journal

#: Journals kept open for further events; a closed one is begun again when it is needed.
_MOST: Final = 512
#: Bytes of the arguments of a call that stand in its event; larger ones, of spans with images say, become a file.
MOST_INLINE: Final = frame.MAX_PAYLOAD - 64 * 1024
#: Calls that begin something, without which all others about it are for nothing.
_BEGINNINGS: Final = frozenset({"create_experiment", "create_logged_model"})
#: Of those for which there was no room, how many of a journal are kept in memory until there is.
_UNWRITTEN: Final = 100
#: What is said of an outage (``say_once``).
_OF_OUTAGES: Final = ("search", "models", "provisional")


def now_ms() -> int:
    """Return wall-clock milliseconds since the epoch."""
    return time.time_ns() // 1_000_000


class OpenRun:
    """One run, or room, that this process writes to.

    Attributes:
        begun: how it began, if it did here and without the server; a full disk may not have taken that.
        params: those that it is known to have, for MLflow's rule that a param never changes.
        outputs: models that this process logged as outputs, which a database takes once.
        linked: of each metric of each model its last step, and from when to when in ms it has points of that.
        unwritten: calls that begin something here, without the server, and for which there was no room; they are
            written before the next call, if there is some then.
    """

    def __init__(self, run_id: str, journal: Journal, outbox: Outbox) -> None:
        self.run_id = run_id
        self.journal = journal
        self._outbox = outbox
        self.begun: RunStarted | None = None
        self.params: dict[str, str] = {}
        self.outputs: set[str] = set()
        self.linked: dict[tuple[str, str], tuple[int, int, int]] = {}
        self.unwritten: list[Request] = []

    def append(self, event: Event) -> bool:
        """Write one event; return whether it was kept. What is refused is counted and said by the journal."""
        kept = self.journal.append(event)
        now = time.time_ns()
        if now >= courtesy.due:
            courtesy.give_way(now)
        return kept

    def append_with(
        self, size: int, copy: Callable[[SnapshotStore, Hold], Snapshot], event: Callable[[Snapshot], Event]
    ) -> bool:
        """Copy a file and write the event that names it; return whether it was kept, as ``append`` does.

        Args:
            size: of the file in bytes.
            copy: copies it.
            event: returns the event, given the copy.

        Raises:
            ArtifactRefused: it cannot be copied.
        """
        return append_enclosing(self.journal, self._outbox.settings.sync, size, copy, event)

    def request(self, operation: str, *, known: str = "", **arguments: Any) -> int:
        """Write a call of the tracking store; return the bytes of its arguments.

        Args:
            operation: the store's method.
            known: id that MLflow gave already to what the call creates.
            **arguments: the method's arguments.

        Raises:
            MlflowException: they cannot be written, or are larger than the outbox takes; counted, because MLflow's
                exporter of traces keeps it to itself.
        """
        if self.unwritten:
            self._catch_up()
        try:
            content = codec.dumps(arguments)
            if len(content) <= MOST_INLINE:
                call = Request(operation, content, now_ms(), known)
                if not self.append(call) and operation in _BEGINNINGS and not known:
                    self.unwritten.append(call)
                    del self.unwritten[:-_UNWRITTEN]
                return len(content)
            short, limit = codec.short(arguments), self._outbox.settings.artifact_bytes
            self.append_with(
                len(content),
                lambda store, hold: store.add_bytes(content, limit=limit, name="arguments", hold=hold),
                lambda kept: Request(operation, short, now_ms(), known, kept.sha256),
            )
            return len(content)
        except (TypeError, ValueError, RecursionError, ArtifactRefused) as error:
            self._outbox.counters.add("requests_refused")
            reason = f"{operation} cannot be kept: {printable(error, 300)}"
            say_once(self._outbox, f"refused {operation} {type(error).__name__}", reason)
            raise MlflowException.invalid_parameter_value(reason) from error

    def _catch_up(self) -> None:
        """Write what began here when there was no room, if there is some now; twice, by two threads, is no harm."""
        if self._outbox.guard.reason() is not None:
            return
        for call in list(self.unwritten):
            if self.append(call):
                with contextlib.suppress(ValueError):  # another thread has written it too
                    self.unwritten.remove(call)


class Journals:
    """Opens and closes journals.

    Args:
        outbox: the outbox.
        names: of experiments, as far as they are known, by id.
        used: called whenever a journal is asked for.
    """

    def __init__(self, outbox: Outbox, names: Mapping[str, str], used: Callable[[], None]) -> None:
        self._outbox = outbox
        self._used = used
        self._names = names
        self._lock = threading.RLock()
        self._open: dict[str, OpenRun] = {}

    def forked(self) -> None:
        """Renew the lock in a forked child; journals know of forks themselves."""
        self._lock = threading.RLock()

    def get(self, run_id: str) -> OpenRun | None:
        """Return a run that this process writes to already, or None."""
        self._used()
        return self._open.get(run_id)

    def open(self, run_id: str, experiment: str) -> OpenRun:
        """Return a run to write to.

        Args:
            run_id: the id under which the outbox keeps it.
            experiment: the name of its experiment, if nothing on disk says otherwise.
        """
        self._used()
        with self._lock:
            held = self._open.get(run_id)
            if held is None:
                held = self._open[run_id] = OpenRun(
                    run_id, self._outbox.journal(self._identity(run_id, experiment)), self._outbox
                )
                while len(self._open) > _MOST:
                    first = next(iter(self._open))
                    self._open.pop(first).journal.close()
            return held

    def room(self, experiment_id: str) -> OpenRun:
        """Return the room of an experiment."""
        if not experiment_id:
            return self.open(provisional.COMMON_ROOM, "")
        return self.open(provisional.room_of(experiment_id), self._names.get(experiment_id, ""))

    def close(self, run_id: str) -> None:
        """Close a run's journal; it may be opened again."""
        with self._lock:
            held = self._open.get(run_id)
        if held is not None:
            held.journal.close()

    def _identity(self, run_id: str, experiment: str) -> RunIdentity:
        if provisional.is_room(run_id):
            return RunIdentity(run_id, experiment)
        directory = self._outbox.directory
        for parent in (directory.runs, directory.delivered):
            for held in RunReader(parent / run_id).segments().values():
                return RunIdentity(run_id, held[0].header.experiment, held[0].header.remote)
        return RunIdentity(run_id, experiment, remote=not provisional.is_provisional(run_id))

    def runs(self) -> list[str]:
        """Return the ids of the runs that this process writes to."""
        return [run_id for run_id in list(self._open) if not provisional.is_room(run_id)]

    def unwritten(self, run_id: str) -> list[Request]:
        """Return the calls that begin something in a run or room of this process, and found no room on disk."""
        held = self._open.get(run_id)
        return list(held.unwritten) if held is not None else []

    def wrote(self) -> bool:
        """Return whether this process has written anything."""
        return any(run.journal.events for run in list(self._open.values()))

    def exists(self, run_id: str) -> bool:
        """Return whether the outbox has anything of a run on disk."""
        directory = self._outbox.directory
        return (directory.runs / run_id).is_dir() or (directory.delivered / run_id).is_dir()


def say_once(outbox: Outbox, key: str, text: str) -> None:
    """Warn once per outbox and key."""
    outbox.counters.warn_once(("plugin", key), f"mlflow-outbox: {text}")


def outage_is_over(outbox: Outbox) -> None:
    """Have what is said of an outage be said again in a later one."""
    for key in _OF_OUTAGES:
        outbox.counters.forget(("plugin", key))
