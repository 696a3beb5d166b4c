"""Where delivery takes runs from: an outbox of one's own, or run directories that are only read.

``OutboxSource`` is an outbox with its ledger and its lease; what was delivered from it may be filed. ``RunsSource``
is any number of directories, moved, renamed, copied or on read-only media: nothing in them is ever written, locked,
moved or deleted, and what was sent from them is remembered in a ledger of this machine, one for each destination.
Directories that hold segments of the same run (the outboxes of three jobs that went on with it, or two copies of one)
are read as one run.

The id of a run is the one in its segments' headers; the name of its directory says nothing.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

from mlflow_outbox.destination import Destination
from mlflow_outbox.errors import OutboxUnusable
from mlflow_outbox.settings import state_directory
from mlflow_outbox.spool import provisional
from mlflow_outbox.spool.directory import (
    OutboxDirectory,
    OutboxIdentity,
    is_run_id,
    read_identity,
    run_directories,
)
from mlflow_outbox.spool.private import make_all_private
from mlflow_outbox.spool.reader import RunReader
from mlflow_outbox_worker.host_lease import WorkerLease, lease_of
from mlflow_outbox_worker.lease import Lease
from mlflow_outbox_worker.wording import quoted


class Source(Protocol):
    """Runs to deliver.

    Attributes:
        path: what to call the source in messages.
        quarantine: where bytes that are no frames are kept.
        filing: the outbox whose delivered files may be moved and reclaimed; None when nothing may be touched.
        elsewhere: the destination is another one than the runs were logged for.
        again: everything is sent once more, because the destination may have lost it.
        remote: other machines may write to it, so that only looking tells what is new.
        sends, resends: the commands that send what waits, and everything once more, for messages.
    """

    path: Path
    quarantine: Path
    filing: OutboxDirectory | None
    elsewhere: bool
    again: bool
    remote: bool
    sends: str
    resends: str

    def lease(self, kind: str) -> WorkerLease:
        """Return the right to deliver from it."""
        ...

    def ledger_in(self, place: Path | None) -> Path:
        """Return where its progress is recorded.

        Args:
            place: directory for the ledgers of outboxes; None is in each.
        """
        ...

    def run_ids(self) -> list[str]:
        """Return the ids of all runs there are at present."""
        ...

    def folders(self, run_id: str) -> tuple[Path, ...]:
        """Return the directories that together hold a run, at least one."""
        ...

    def everywhere(self, run_id: str) -> tuple[Path, ...]:
        """Return all directories in which something of a run may be, filed as delivered or not."""
        ...

    def lacks(self, run_id: str) -> bool:
        """Return whether a run is not among these and never will be, so that it is waited for in vain."""
        ...

    def experiment(self, name: str) -> str:
        """Return the experiment to which a run goes that was logged for the one called name."""
        ...

    def rung(self, offset: int) -> tuple[set[str], int] | None:
        """Return the runs to look at since an offset, and the next offset; None when all are to be looked at."""
        ...

    def answer_doorbell(self) -> None:
        """Take notice that all runs are looked at now."""
        ...

    def ring(self, run_id: str) -> None:
        """Ask for a look at a run."""
        ...

    def hurry_asked(self) -> int:
        """Return when hurry was last asked for, only good for comparing."""
        ...

    def check_unchanged(self) -> None:
        """Raise OutboxUnusable when it is not the same place any more."""
        ...


class OutboxSource:
    """An outbox that is delivered to its own destination.

    Args:
        directory: the outbox.
        filing: whether delivered files may be moved and reclaimed.
        chosen: only these runs; None means all.
        again: everything is sent once more.
        lock: a descriptor of the outbox's lock file that is locked already; -1 when there is none.
    """

    def __init__(
        self,
        directory: OutboxDirectory,
        *,
        filing: bool = True,
        chosen: Collection[str] | None = None,
        again: bool = False,
        lock: int = -1,
    ) -> None:
        self._directory = directory
        self._chosen = chosen
        self._lock = lock
        self.path = directory.path
        self.ledger_in = directory.ledger_in
        self.quarantine = directory.quarantine
        self.filing = directory if filing else None
        self.elsewhere = False
        self.again = again
        self.remote = directory.network
        self.sends, self.resends = "mlflow-outbox flush", f"mlflow-outbox replay --again {quoted(directory.path)}"
        self.answer_doorbell = directory.answer_doorbell
        self.ring = directory.ring
        self.hurry_asked = directory.hurry_asked
        self.check_unchanged = directory.check_unchanged

    def lease(self, kind: str) -> WorkerLease:
        """Return the outbox's lease."""
        lock, self._lock = self._lock, -1
        return lease_of(self._directory, kind, inherited=lock)

    def run_ids(self) -> list[str]:
        """Return the ids of the runs that are not filed."""
        return [run_id for run_id in self._directory.run_ids() if self._chosen is None or run_id in self._chosen]

    def folders(self, run_id: str) -> tuple[Path, ...]:
        """Return a run's directory; segments that were filed before are delivered, so they are not read again."""
        return (self._directory.run(run_id),)

    def everywhere(self, run_id: str) -> tuple[Path, ...]:
        """Return a run's directory and that of its filed segments."""
        return self._directory.run(run_id), self._directory.delivered / run_id

    def lacks(self, run_id: str) -> bool:
        """Return whether it waits in the outbox, and only others were chosen."""
        return self._chosen is not None and run_id not in self._chosen and self._directory.run(run_id).is_dir()

    def experiment(self, name: str) -> str:
        """Return the name itself."""
        return name

    def rung(self, offset: int) -> tuple[set[str], int] | None:
        """Return the runs that rang since an offset."""
        rung = self._directory.rung(offset)
        if rung is None or self._chosen is None:
            return rung
        return rung[0] & set(self._chosen), rung[1]


class RunsSource:
    """Run directories that are only read.

    Args:
        runs: the directories of each run, by run id.
        destination: where they are delivered to.
        experiment: name of the experiment that all go into; "" leaves each its own.
        elsewhere: the destination is another one than the runs were logged for.
        again: everything is sent once more.
        look: finds the runs again, for sources that still grow; None when they do not.
    """

    def __init__(
        self,
        runs: Mapping[str, tuple[Path, ...]],
        destination: Destination,
        *,
        experiment: str = "",
        elsewhere: bool = False,
        again: bool = False,
        look: Callable[[], Mapping[str, tuple[Path, ...]]] | None = None,
    ) -> None:
        self._runs = dict(runs)
        self._experiment = experiment
        self._look = look
        self._rung: list[str] = []
        own = replay_directory(destination, experiment)
        self.path = next((folders[0] for folders in self._runs.values()), own)
        self._ledger = own / "delivery"
        self.quarantine = own / "quarantine"
        self._lock = own / "worker.lock"
        self.filing: OutboxDirectory | None = None
        self.elsewhere = elsewhere
        self.again = again
        self.remote = look is not None
        # The person knows with which paths, and where to; a bundle is unpacked for as long as it is sent.
        self.sends, self.resends = "the same command", "the same command with --again"

    def lease(self, kind: str) -> WorkerLease:
        """Return the lease of this machine's replays to the destination."""
        make_all_private(self._lock.parent)
        return Lease(self._lock, kind)

    def ledger_in(self, place: Path | None) -> Path:  # noqa: ARG002 - it is this machine's own, wherever others are
        """Return where the ledger of this machine's replays to the destination is."""
        return self._ledger

    def run_ids(self) -> list[str]:
        """Return the ids of all runs."""
        if self._look is not None:
            self._runs.update(self._look())
        return sorted(self._runs)

    def folders(self, run_id: str) -> tuple[Path, ...]:
        """Return the directories that together hold a run."""
        found = self._runs.get(run_id)
        if found is None and provisional.is_room(run_id):  # which its outbox calls so
            found = next((held for name, held in self._runs.items() if name.partition(".")[0] == run_id), None)
        return found or ()

    def everywhere(self, run_id: str) -> tuple[Path, ...]:
        """Return the same directories."""
        return self.folders(run_id)

    def lacks(self, run_id: str) -> bool:
        """Return whether there is no directory of it, where none is looked for later."""
        return self._look is None and not self.folders(run_id)

    def experiment(self, name: str) -> str:
        """Return the chosen experiment, or the run's own."""
        return self._experiment or name

    def rung(self, offset: int) -> tuple[set[str], int]:
        """Return the runs that the loop itself rang for."""
        rung, self._rung = self._rung, []
        return set(rung), offset

    def answer_doorbell(self) -> None:
        """Do nothing: there is no doorbell."""

    def ring(self, run_id: str) -> None:
        """Ask for another look at a run."""
        self._rung.append(run_id)

    def hurry_asked(self) -> int:
        """Return 0: nobody can ask."""
        return 0

    def check_unchanged(self) -> None:
        """Do nothing: what is gone is noticed when it is read."""


def replay_directory(destination: Destination, experiment: str = "") -> Path:
    """Return where this machine remembers what it replayed to a destination, or there into one experiment.

    Args:
        destination: where to.
        experiment: the experiment that replaces the runs' own; "" for none.
    """
    name = f"replay-{hashlib.sha256(experiment.encode()).hexdigest()[:12]}" if experiment else "replay"
    return state_directory() / destination.slug / name


class Found(NamedTuple):
    """What there is at one path.

    Attributes:
        identity: of the outbox that the path is, or is in; None for a loose run directory.
        outbox: that outbox, when it is safe to deliver from; None for one of somebody else, or on read-only media.
        runs: the directories of each run by run id, filed ones too; in an outbox not all of them need be there.
        whole: the path is the outbox itself, not one of its runs.
        problems: what could not be used, a sentence each.
    """

    identity: OutboxIdentity | None
    outbox: OutboxDirectory | None
    runs: dict[str, tuple[Path, ...]]
    whole: bool
    problems: list[str]


def find_runs(path: Path) -> Found:
    """Find out what a path holds: an outbox, or the directory of one run.

    Args:
        path: the directory, wherever it was moved and whatever it is called.
    """
    path = Path(os.path.abspath(path.expanduser()))
    if os.path.lexists(path / "outbox.json"):
        return _of_outbox(path)
    problems: list[str] = []
    run_id = run_id_of(path, problems)
    if run_id is None:
        return Found(
            None, None, {}, whole=False, problems=problems or [f"{path} is neither an outbox nor a run's directory"]
        )
    identity, outbox = None, None
    folders: tuple[Path, ...] = (path,)
    for place in (path.parent, path.parent.parent):
        if identity is None and os.path.lexists(place / "outbox.json"):
            identity, outbox = _opened(place, problems)
            both = _both(place, path.name)
            folders = both if path in both else folders
    return Found(identity, outbox, {run_id: folders}, whole=False, problems=problems)


def merged(found: Iterable[Mapping[str, tuple[Path, ...]]]) -> dict[str, tuple[Path, ...]]:
    """Return runs of several places, with all the directories of each."""
    result: dict[str, tuple[Path, ...]] = {}
    for runs in found:
        for run_id, folders in runs.items():
            result[run_id] = tuple(dict.fromkeys((*result.get(run_id, ()), *folders)))
    return result


def run_id_of(path: Path, problems: list[str] | None = None) -> str | None:
    """Return the id of the run whose segments a directory holds; None when it holds none, or several runs'.

    Args:
        path: the directory.
        problems: a sentence is added for what is wrong with it.
    """
    said = [] if problems is None else problems
    reader = RunReader(path)
    try:
        ids = {segment.header.run_id for held in reader.segments().values() for segment in held}
    except OSError as error:
        said.append(f"{path} cannot be read: {error.strerror or error}")
        return None
    said += [f"{broken.path}: {broken.reason}" for broken in reader.bad_headers()]
    if len(ids) > 1:
        said.append(f"{path} holds segments of {len(ids)} runs; move those of each into a directory of its own")
        return None
    run_id = next(iter(ids), None)
    if run_id is not None and not is_run_id(run_id):
        said.append(f"{path} holds segments of a run whose id is none")
        return None
    return run_id


def _of_outbox(path: Path) -> Found:
    problems: list[str] = []
    identity, outbox = _opened(path, problems)
    if identity is None:
        return Found(None, None, {}, whole=True, problems=problems)
    if outbox is not None:
        outbox.look_anew()
    runs: dict[str, tuple[Path, ...]] = {}
    for part in ("runs", "delivered"):
        for name in run_directories(path / part):
            run_id = run_id_of(path / part / name, problems)
            if run_id is not None:
                runs[run_id] = (*runs.get(run_id, ()), path / part / name)
    for run_id, folders in runs.items():
        runs[run_id] = tuple(dict.fromkeys((*_both(path, run_id), *folders)))
    return Found(identity, outbox, runs, whole=True, problems=problems)


def _opened(path: Path, problems: list[str]) -> tuple[OutboxIdentity | None, OutboxDirectory | None]:
    """Open an outbox to deliver from, or at least find out what it is."""
    try:
        identity = read_identity(path)
    except OutboxUnusable as error:
        problems.append(str(error))
        return None, None
    if not os.access(path, os.W_OK):
        return identity, None
    try:
        return identity, OutboxDirectory.open(path)
    except OutboxUnusable:
        return identity, None  # not safe to deliver from; safe to read


def _both(outbox: Path, name: str) -> tuple[Path, Path]:
    """Return where a run of an outbox lies and where it is filed: a worker may move it while its files are read."""
    return outbox / "runs" / name, outbox / "delivered" / name
