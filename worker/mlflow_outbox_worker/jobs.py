"""What a replay consists of: which runs there are, where each goes, and how its progress is kept.

An outbox of one's own that goes to its recorded destination keeps its progress in its own ledger; everything else is
only read. Runs that are found in several places are one run, read from all of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mlflow_outbox import stopwatch
from mlflow_outbox.destination import Destination, named_for, resolve, with_credentials
from mlflow_outbox.errors import OutOfTime
from mlflow_outbox.settings import Settings, workspace_from_environment
from mlflow_outbox.spool import provisional
from mlflow_outbox.spool.directory import OutboxDirectory, find_outboxes
from mlflow_outbox.spool.reader import RunReader
from mlflow_outbox.views import RunView
from mlflow_outbox_worker.backlog import left
from mlflow_outbox_worker.copies import copying
from mlflow_outbox_worker.fragments import lost_beginnings
from mlflow_outbox_worker.ledger import Ledger
from mlflow_outbox_worker.records import DeadLetter, RunRecord
from mlflow_outbox_worker.sources import Found, OutboxSource, RunsSource, Source, find_runs, merged

Runs = dict[str, tuple[Path, ...]]


@dataclasses.dataclass(frozen=True)
class Wish:
    """What is to be replayed where.

    Attributes:
        to: the tracking URI; None means the recorded destination.
        fallback: the tracking URI of the environment, for runs without a recorded destination; it also has credentials.
        experiment: the experiment that all go into; "" leaves each its own.
        only_finished: only runs whose status is FINISHED.
        again: send what was delivered before once more.
        follow: go on while the runs are still written.
    """

    to: str | None = None
    fallback: str | None = None
    experiment: str = ""
    only_finished: bool = False
    again: bool = False
    follow: bool = False


class Job(NamedTuple):
    """One part of a replay: a source, a destination, and the runs that it is about.

    Attributes:
        own: the outbox, when this is its ordinary delivery; None when files are only read.
        again: what is known of the runs' delivery is forgotten first.
    """

    source: Source
    destination: Destination
    runs: Runs
    own: OutboxDirectory | None
    again: bool


class Prepared(NamedTuple):
    """What a replay will do: its jobs, and what cannot be replayed, a sentence each.

    Attributes:
        before: how many runs are delivered.
        fragments: how many events are not on disk any more of runs that would arrive without their beginning.
    """

    jobs: list[Job]
    problems: list[str]
    before: int
    fragments: dict[str, int]


def prepare(
    paths: Sequence[Path],
    wish: Wish,
    *,
    copies: Collection[Path] = (),
    deadline: float | None = None,
    ledger_dir: Path | None = None,
) -> Prepared:
    """Find out what there is to replay, and where to.

    Args:
        paths: outboxes, directories with several, or directories of single runs.
        wish: what is to be done with them.
        copies: those of the paths that are passing copies, for instance unpacked bundles: nothing about them is kept
            there.
        deadline: when to leave off, in seconds of the monotonic clock; None never does.
        ledger_dir: directory for the ledgers of outboxes; None is in each.

    Raises:
        DestinationError: the URI to replay to is none.
        OutOfTime: the deadline came first.
    """
    given = resolve(wish.to, workspace=workspace_from_environment()) if wish.to is not None else None
    problems: list[str] = []
    own: dict[Path, tuple[OutboxDirectory, Destination, Runs]] = {}
    loose: dict[tuple[str, bool], tuple[Destination, list[Runs], list[Path]]] = {}
    ledgers: set[Path] = set()
    before = 0
    for path in paths:
        for found in _found(path):
            problems += found.problems
            if found.outbox is not None and path not in copies:
                ledgers.add(found.outbox.ledger_in(ledger_dir))
            recorded = _recorded(found)
            target = _target(recorded, given, wish.fallback)
            if target is None:
                if found.runs:
                    problems.append(f"{path} has no outbox.json that says where its runs go; give --to")
                continue
            elsewhere = recorded is None or recorded.uri != target.uri
            runs = found.runs
            if not elsewhere and not wish.again and not wish.experiment and found.identity is not None:
                waiting = {run_id: folders for run_id, folders in runs.items() if not _is_filed(folders)}
                before, runs = before + len(runs) - len(waiting), waiting
            if wish.only_finished:
                runs = {
                    run_id: folders for run_id, folders in runs.items() if _is_finished(folders, problems, deadline)
                }
            at_home = found.outbox is not None and path not in copies and _is_home(found.outbox, runs)
            if found.outbox is not None and at_home and not elsewhere and not wish.experiment:
                held = own.get(found.outbox.path)
                own[found.outbox.path] = (found.outbox, target, merged([held[2] if held else {}, runs]))
            else:
                group = loose.setdefault((target.uri, elsewhere), (target, [], []))
                group[1].append(_of_their_outbox(runs, found))
                group[2].append(path)
    jobs = [_own_job(*one, wish) for one in own.values()]
    jobs += [_loose_job(*group, elsewhere=elsewhere, wish=wish) for (_, elsewhere), group in loose.items()]
    fragments: dict[str, int] = {}
    for job in jobs:
        if copying(job.source):
            fragments |= lost_beginnings(job.runs, ledgers)
    return Prepared([job for job in jobs if job.runs or wish.follow], problems, before, fragments)


def _found(path: Path) -> Iterator[Found]:
    outboxes = find_outboxes(path)
    for place in outboxes or [path]:
        yield find_runs(place)


def _recorded(found: Found) -> Destination | None:
    if found.identity is None:
        return None
    return Destination(found.identity.destination, found.identity.artifact_root)


def _target(recorded: Destination | None, given: Destination | None, fallback: str | None) -> Destination | None:
    """Return where runs are to go: where a person says, or where they were logged for; None when nothing tells."""
    if given is not None:
        return named_for(recorded, given)
    if recorded is not None:
        return with_credentials(recorded, fallback)
    return resolve(fallback, workspace=workspace_from_environment()) if fallback else None


def _of_their_outbox(runs: Runs, found: Found) -> Runs:
    """Return runs with rooms named after their outbox as well: another one's of the same name is another room."""
    mark = found.identity.id[:12] if found.identity is not None else ""
    if not mark:
        return runs
    return {f"{name}.{mark}" if provisional.is_room(name) else name: folders for name, folders in runs.items()}


def _is_filed(folders: tuple[Path, ...]) -> bool:
    return all(folder.parent.name == "delivered" for folder in folders if not _is_empty(folder))


def _is_empty(folder: Path) -> bool:
    """Return whether there is nothing in a directory, or no directory."""
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is None
    except FileNotFoundError:
        return True
    except OSError:  # whoever reads it will say so
        return False


def _is_home(outbox: OutboxDirectory, runs: Runs) -> bool:
    """Return whether runs lie where their outbox looks for them, under their own names."""
    return all(
        folder.parent in {outbox.runs, outbox.delivered} and folder.name == run_id
        for run_id, folders in runs.items()
        for folder in folders
    )


def _own_job(outbox: OutboxDirectory, destination: Destination, runs: Runs, wish: Wish) -> Job:
    filing = not wish.follow and not outbox.network
    chosen = None if wish.follow else set(runs)
    source = OutboxSource(outbox, filing=filing, chosen=chosen, again=wish.again)
    return Job(source, destination, runs, outbox, wish.again)


def _loose_job(destination: Destination, found: list[Runs], paths: list[Path], *, elsewhere: bool, wish: Wish) -> Job:
    runs = merged(found)

    def look() -> Mapping[str, tuple[Path, ...]]:
        return merged(_of_their_outbox(one.runs, one) for path in paths for one in _found(path))

    source = RunsSource(
        runs,
        destination,
        experiment=wish.experiment,
        elsewhere=elsewhere,
        again=wish.again,
        look=look if wish.follow else None,
    )
    return Job(source, destination, runs, None, wish.again)


def _is_finished(folders: tuple[Path, ...], problems: list[str], deadline: float | None) -> bool:
    try:
        return view_of(folders, deadline).status.value == "FINISHED"
    except OSError as error:
        problems.append(f"{folders[0]} cannot be read: {error.strerror or error}")
        return False


def view_of(folders: tuple[Path, ...], deadline: float | None = None) -> RunView:
    """Return a run as all its events on disk describe it.

    Args:
        folders: the run's directories.
        deadline: when to leave off, in seconds of the monotonic clock; None never does.

    Raises:
        OSError: they cannot be read.
        OutOfTime: the deadline came first.
    """
    view, reader = RunView(), RunReader(*folders)
    window = reader.window({}, points=100_000, items=100_000)
    while True:
        for writer, event in window.events:
            view.fold(event, writer)
        if not window.more:
            return view
        if deadline is not None and stopwatch.seconds() >= deadline:
            msg = "time was up before the runs were read; nothing of them was sent, give a longer --timeout"
            raise OutOfTime(msg)
        window = reader.window(window.cursors, points=100_000, items=100_000)


def _ledger_of(job: Job, settings: Settings) -> contextlib.closing[Ledger]:
    return contextlib.closing(Ledger.open(job.source.ledger_in(settings.ledger_dir), read_only=True))


def known_records(job: Job, settings: Settings) -> dict[str, RunRecord]:
    """Return what is known of the delivery of a job's runs.

    Args:
        job: the job.
        settings: where the ledger of an own outbox is.

    Raises:
        LedgerUnavailable: the ledger cannot be read now.
    """
    with _ledger_of(job, settings) as ledger:
        found = {run_id: ledger.record(run_id) for run_id in job.runs}
    return {run_id: record for run_id, record in found.items() if record is not None}


def refused_of(job: Job, settings: Settings) -> list[DeadLetter]:
    """Return what MLflow refused for good of a job's runs.

    Args:
        job: the job.
        settings: where the ledger of an own outbox is.

    Raises:
        LedgerUnavailable: the ledger cannot be read now.
    """
    with _ledger_of(job, settings) as ledger:
        return [letter for letter in ledger.dead_letters() if letter.run_id in job.runs]


def pending_events(job: Job, records: Mapping[str, RunRecord]) -> dict[str, int]:
    """Return how many events of each run of a job are not sent yet; a run that cannot be read counts none.

    Args:
        job: the job.
        records: what its ledger holds.
    """
    result = {}
    for run_id, folders in job.runs.items():
        record = records.get(run_id)
        try:
            ends = RunReader(*folders).next_numbers(record.cursors if record is not None else None)
        except OSError:
            continue  # it is skipped and named when its turn comes
        result[run_id] = sum(left(ends, record, parked=False))
    return result
