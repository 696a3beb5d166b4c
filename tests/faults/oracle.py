"""The judge: what MLflow's own store holds, read from its database or files, against what was acknowledged.

An event is a number. From the number follows what is logged for it, so that a judge who knows only numbers can tell
whether the store holds the right thing: see ``kind_of``. Nothing here asks mlflow-outbox anything.
"""

from __future__ import annotations

import dataclasses
import os
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Collection
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from faults.manners import counted

_TAG = "mlflow_outbox.run_id"
#: Numbers of one writer of a run.
_WRITER = 10_000
#: Metrics that end in this digit say their time: so many milliseconds, and the number.
_STAMPED, _FIRST_MS = 5, 1_600_000_000_000


def kind_of(number: int) -> str:
    """Return what an event is: mostly metrics, now and then a param, a tag or an artifact."""
    if number % 50 == 49:
        return "artifact"
    return {3: "param", 7: "tag"}.get(number % 10, "metric")


def time_of(number: int) -> int | None:
    """Return the time in ms that a metric says of itself; None for one that is logged without."""
    return _FIRST_MS + number if number % 10 == _STAMPED else None


def log_event(run: Any, number: int) -> bool:
    """Log one event by its number; return whether it was kept. The call is counted, see ``manners``.

    A writer logs its numbers in rising order, and no two writers of a run those of the same ten thousand: with each
    tag goes the tag "last" of its ten thousand, whose last value is the highest number.
    """
    return counted(lambda: _log(run, number))


def _log(run: Any, number: int) -> bool:
    kind = kind_of(number)
    if kind == "metric":
        return bool(run.log_metric("loss", number / 2, step=number, timestamp=time_of(number)))
    if kind == "param":
        return bool(run.log_params({f"p{number}": f"value {number}"}))
    if kind == "tag":
        return bool(run.set_tags({f"t{number}": f"value {number}", f"last{number // _WRITER}": str(number)}))
    return bool(run.log_text(f"value {number}", f"a{number}.txt"))


@dataclasses.dataclass
class Held:
    """What a store holds of an experiment.

    Attributes:
        events: how often each event is held.
        wrong: what is held and was never logged like that.
        runs: how many active runs there are for each run of the outbox.
        names: how many active runs there are of each name.
        status: by name of the run.
        lasts: for each writer of each run, the tag "last" and the numbers of its other tags.
        disorder: what MLflow calls the latest metric and is not the one of the highest step.
    """

    events: Counter[int] = dataclasses.field(default_factory=Counter)
    wrong: list[str] = dataclasses.field(default_factory=list)
    runs: Counter[str] = dataclasses.field(default_factory=Counter)
    names: Counter[str] = dataclasses.field(default_factory=Counter)
    status: dict[str, str] = dataclasses.field(default_factory=dict)
    lasts: list[tuple[str, set[int]]] = dataclasses.field(default_factory=list)
    disorder: list[str] = dataclasses.field(default_factory=list)

    def check(self, acked: set[int], issued: set[int] | None = None, *, dead: AbstractSet[int] = frozenset()) -> None:
        """Check conservation and integrity: all that was acknowledged, once, unaltered, and nothing else.

        Args:
            acked: events whose logging call had returned True.
            issued: events that may be there; None means only those acknowledged.
            dead: acknowledged events that MLflow refused and that are kept as dead letters.

        Raises:
            AssertionError: something is lost, doubled, wrong, or was never logged.
        """
        there = set(self.events)
        lost = sorted(acked - there - dead)
        assert not lost, f"I1: {len(lost)} of {len(acked)} acknowledged events are lost: {lost[:20]}"
        phantoms = sorted(there - (acked if issued is None else issued))
        assert not phantoms, f"I2: {len(phantoms)} events were never logged: {phantoms[:20]}"
        assert not self.wrong, f"I2: wrong content: {self.wrong[:5]}"
        doubled = sorted(number for number, count in self.events.items() if count > 1)
        assert not doubled, f"I4: {len(doubled)} events are there twice: {doubled[:20]}"
        assert not self.twins(), f"I4: runs were created twice: {self.twins()}"
        assert not self.disorder, f"I3: not the latest metric: {self.disorder[:5]}"
        for last, numbers in self.lasts:
            known = numbers & acked  # a later one that was not acknowledged may be there, and may be gone again
            older = [number for number in numbers if number < max(known, default=0)]
            assert last in {str(number) for number in numbers.difference(older)}, (
                f"I3: the last tag is {last}, and {max(known, default=None)} was logged later"
            )

    def twins(self) -> list[str]:
        """Return the runs that are there more than once."""
        return [run for run, count in [*self.runs.items(), *self.names.items()] if count > 1]

    def _take(self, number: int, content: str, kind: str, when: int = 0) -> None:
        expected = str(number / 2) if kind == "metric" else f"value {number}"
        if kind_of(number) != kind or content != expected:
            self.wrong.append(f"{kind} {number}: {content!r}")
        if kind == "metric" and time_of(number) not in {None, when}:
            self.wrong.append(f"{kind} {number} at {when}")
        self.events[number] += 1

    def _take_tags(self, tags: dict[str, str]) -> None:
        numbers = [int(key[1:]) for key in tags if key[0] == "t" and key[1:].isdigit()]
        for number in numbers:
            self._take(number, tags[f"t{number}"], "tag")
        for writer in {number // _WRITER for number in numbers}:
            mine = {number for number in numbers if number // _WRITER == writer}
            self.lasts.append((tags.get(f"last{writer}", "absent"), mine))


def held(uri: str, experiment: str) -> Held:
    """Return what a store holds of an experiment.

    Args:
        uri: of an SQLite database or a file store.
        experiment: its name.
    """
    if uri.startswith("file:"):
        return _in_files(Path(unquote(urlsplit(uri).path)), experiment)
    return _in_database(Path(uri.removeprefix("sqlite:///")), experiment, None)


def held_of(database_uri: str, experiment: str, names: Collection[str]) -> Held:
    """Return what an SQLite database holds of some runs of an experiment: to look again and again costs little.

    Args:
        database_uri: of the database.
        experiment: its name.
        names: of the runs.
    """
    return _in_database(Path(database_uri.removeprefix("sqlite:///")), experiment, names)


def at_rest(uri: str, experiment: str, within: float) -> Held:
    """Return what a store holds of an experiment once no run is there twice, or after some seconds in any case.

    A create that was carried out after its time-out, and after the search for it, leaves an empty run, which the outbox
    deletes when the server has had as long again.

    Args:
        uri: of an SQLite database or a file store.
        experiment: its name.
        within: seconds.
    """
    deadline = time.monotonic() + within
    while (found := held(uri, experiment)).twins() and time.monotonic() < deadline:
        threading.Event().wait(0.1)
    return found


def _in_database(path: Path, experiment: str, only: Collection[str] | None) -> Held:
    found = Held()
    connection = sqlite3.connect(path, timeout=20)  # not read-only: what a killed writer left is rolled back first
    try:
        runs = connection.execute(
            "SELECT run_uuid, runs.name, status, artifact_uri FROM runs JOIN experiments USING (experiment_id)"
            " WHERE experiments.name = ? AND runs.lifecycle_stage = 'active'",
            (experiment,),
        ).fetchall()
        for run, name, status, artifacts in [run for run in runs if only is None or run[1] in only]:
            found.status[name] = status
            found.names[name] += 1
            tags = dict(connection.execute("SELECT key, value FROM tags WHERE run_uuid = ?", (run,)).fetchall())
            found.runs.update([tags[_TAG]] if _TAG in tags else [])
            found._take_tags(tags)
            for key, value in connection.execute("SELECT key, value FROM params WHERE run_uuid = ?", (run,)):
                if key[0] == "p" and key[1:].isdigit():
                    found._take(int(key[1:]), value, "param")
            # By the run's index and not, as SQLite would, by the key's: all runs of a server have that key, and for as
            # long as it is read by, the server waits with what it is to write.
            points = "SELECT step, value, timestamp FROM {} WHERE run_uuid = ? AND +key = 'loss'"
            steps = [-1]
            for step, value, when in connection.execute(points.format("metrics"), (run,)):
                found._take(step, str(value), "metric", when)
                steps.append(step)
            for step, value, _ in connection.execute(points.format("latest_metrics"), (run,)):
                if (step, value) != (max(steps), max(steps) / 2):
                    found.disorder.append(f"latest metric {step}: {value} of {max(steps)}")
            folder = Path(unquote(urlsplit(artifacts).path))
            served = artifacts.startswith("mlflow-artifacts:")  # by the server whose database this is
            _artifacts(found, path.parent / "artifacts" / folder.relative_to("/") if served else folder)
    finally:
        connection.close()
    return found


def _in_files(root: Path, experiment: str) -> Held:
    found = Held()
    for meta in root.glob("[!.]*/[!.]*/meta.yaml"):  # drafts and what is being deleted begin with a dot
        run = meta.parent
        if not (run.parent / "meta.yaml").exists():  # a draft of an experiment is not a run
            continue
        lines = dict(line.split(": ", 1) for line in meta.read_text().splitlines() if ": " in line)
        above = (run.parent / "meta.yaml").read_text()
        if f"name: {experiment}\n" not in above or "active" not in lines.get("lifecycle_stage", ""):
            continue
        found.status[lines.get("run_name", "")] = lines.get("status", "")
        found.names[lines.get("run_name", "")] += 1
        if (run / "tags" / _TAG).exists():
            found.runs[(run / "tags" / _TAG).read_text()] += 1
        found._take_tags({file.name: file.read_text() for file in (run / "tags").glob("[lt]*[0-9]")})
        for file in (run / "params").glob("p[0-9]*"):
            found._take(int(file.name[1:]), file.read_text(), "param")
        points = run / "metrics" / "loss"
        for line in points.read_text().splitlines() if points.exists() else []:
            when, value, step = line.split()
            found._take(int(step), value, "metric", int(when))
        _artifacts(found, run / "artifacts")
    return found


def _artifacts(found: Held, folder: Path) -> None:
    if not folder.is_dir():
        return
    for name in os.listdir(folder):
        if name[0] == "a" and name.endswith(".txt") and name[1:-4].isdigit():  # others have other names (F91)
            found._take(int(name[1:-4]), (folder / name).read_text(), "artifact")
