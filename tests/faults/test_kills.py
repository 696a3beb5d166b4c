"""SIGKILL at random times, at every system call, during recovery, and of whoever holds the lease."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path

import pytest

from faults import workload
from faults.children import Child, Nest
from faults.oracle import held
from faults.table import Row
from servers import MlflowServer, eventually

#: The calls that change what is on disk. A kill before each is a kill after each other one.
CALLS = (
    *("write", "pwrite64", "sendfile", "openat", "fallocate", "ftruncate", "fsync", "fdatasync"),
    *("mkdir", "rename", "link", "symlink", "unlink", "unlinkat", "rmdir"),
)
#: What is logged: one of them is an artifact, one a param that may be given another value.
EVENTS = range(40, 52)


def recovered(
    nest: Nest,
    uri: str,
    outbox: Path,
    experiment: str,
    acked: set[int],
    issued: set[int],
    fresh: int,
    *,
    patience: float = 60.0,
    dead: Collection[int] = (0,),
    judge: str = "",
) -> None:
    """Let the next program deliver what a killed one left, log more, and check what MLflow holds.

    Args:
        nest: starts that program.
        uri: that it delivers to.
        outbox: root of the killed one's outbox.
        experiment: that all programs log to.
        acked: events whose logging call had returned True.
        issued: events that may be there.
        fresh: number of the first event that the next program logs.
        patience: seconds in which everything has to be delivered.
        dead: how many dead letters there may be.
        judge: what is read in the end: the store, if that is not what ``uri`` names.
    """
    report = nest.start(workload.drain, uri, str(outbox), experiment, fresh, {}, patience).report(patience + 60)
    assert 10 == len(report["acked"]), report
    assert (0, 0) == (report["left"]["pending"], report["left"]["parked"]), report
    assert report["left"]["dead"] in dead, report
    assert report["left"]["dead"] == len(workload.letters_of(outbox, uri)), report
    more = set(report["acked"])
    held(judge or uri, experiment).check(acked | more, issued | more)


@pytest.mark.fault("F01", "SIGKILL at a random time while 4 threads log and a worker delivers")
@pytest.mark.parametrize("store", ["sqlite", "file"])
def test_kills_at_random_times_lose_and_double_nothing(
    store: str, part: slice, sqlite_uri: str, file_uri: str, nest: Nest, row: Row, rng: random.Random, tmp_path: Path
) -> None:
    """Each killed program is followed by another on its outbox; after every fifth kill all is delivered and judged."""
    uri = {"sqlite": sqlite_uri, "file": file_uri}[store]
    acked: set[int] = set()
    issued: set[int] = set()
    kills = range(row.pick(10, 500, 5000))[part]
    outbox = tmp_path / "outbox"
    for kill in range(1, len(kills) + 1):
        if kill % 50 == 0:  # an old outbox and a large store would only make it slow
            outbox, acked, issued = tmp_path / f"outbox{kill}", set(), set()
        experiment = f"kills-{kill // 50}"
        first = kill * 100_000
        child = nest.start(workload.log_forever, uri, str(outbox), experiment, first, 4, "thread", workload.TINY, 0.005)
        pause = rng.uniform(0, 0.3)
        child.wait_for_lines()
        child.process.join(pause)
        child.kill()
        acked |= child.acked()
        issued |= workload.issued_by(child.acked(), first, 4)
        row.done()
        if kill % 5 == 0 or kill == len(kills):
            recovered(nest, uri, outbox, experiment, acked, issued, first + 90_000)
            more = set(range(first + 90_000, first + 90_010))
            acked, issued = acked | more, issued | more
    row.measure(store=store)


def deliverer_of(program: Child) -> int:
    """Return the process that delivers for a program's worker thread."""
    for thread in Path(f"/proc/{program.pid}/task").iterdir():  # of which one has started it
        for name in (thread / "children").read_text().split():
            if b"mlflow_outbox_worker.child" in Path(f"/proc/{name}/cmdline").read_bytes():
                return int(name)
    failure = "there is no process that delivers"
    raise AssertionError(failure)


@pytest.mark.fault("F01", "SIGKILL of the process that delivers for a worker thread, then of the program")
def test_kills_of_a_program_and_of_its_delivering_process_lose_and_double_nothing(
    part: slice, sqlite_uri: str, file_uri: str, nest: Nest, row: Row, rng: random.Random, tmp_path: Path
) -> None:
    """Another process goes on; after the program's end nobody is left who delivers."""
    for number in range(row.pick(1, 18, 180))[part]:  # each needs three interpreters of its own, seconds each
        uri = (file_uri, sqlite_uri)[number % 2]
        experiment, outbox = f"apart-{number}", tmp_path / f"outbox{number}"
        child = nest.start(workload.log_with_delivery_apart, uri, str(outbox), experiment, 0)

        def goes_on(more: int, uri: str = uri, experiment: str = experiment) -> None:
            enough = len(held(uri, experiment).events) + more
            eventually(lambda: len(held(uri, experiment).events) >= enough, 60, "delivery goes on")

        goes_on(1)
        child.process.join(rng.uniform(0, 0.2))
        os.kill(deliverer_of(child), signal.SIGKILL)
        goes_on(10)
        child.process.join(rng.uniform(0, 0.2))
        child.kill()
        row.done(2)
        recovered(nest, uri, outbox, experiment, child.acked(), workload.issued_by(child.acked(), 0, 1), 90_000)


def points_of(trace: Path) -> Counter[str]:
    """Count the system calls of the main thread in strace's output, by name."""
    return Counter(name for name, _ in _calls_of(trace))


def changes(trace: Path) -> list[tuple[str, int]]:
    """Return the calls of the main thread that change something, each as its name and its ordinal.

    An ``openat`` changes something where it may make a file.
    """
    counts: Counter[str] = Counter()
    found = []
    for name, line in _calls_of(trace):
        counts[name] += 1
        if name != "openat" or "O_CREAT" in line:
            found.append((name, counts[name]))
    return sorted(found)


def _calls_of(trace: Path) -> list[tuple[str, str]]:
    """Return the calls of the main thread, each as its name and its line."""
    lines = trace.read_text(errors="replace").splitlines()
    main = lines[0].split(maxsplit=1)[0]
    calls = ((re.match(rf"{main}\s+(\w+)\(", line), line) for line in lines)
    return [(found[1], line) for found, line in calls if found]


class Scene:
    """A session of one thread that is killed: what it logs, where to, and what has to be there in the end.

    Args:
        nest: starts the programs.
        work: "artifact"; "conflict", in which a param becomes a dead letter; "file store"; "server".
        folder: of its store and its outboxes.
        database: makes an SQLite store at a path.
        server: of the last kind.
    """

    def __init__(
        self, nest: Nest, work: str, folder: Path, database: Callable[[Path], Path], server: MlflowServer | None = None
    ) -> None:
        self._nest = nest
        self.trace = folder / "trace"
        self.conflicting = work == "conflict"
        self.store = folder / "mlruns" if work == "file store" else folder / "mlflow.db"
        if work == "file store":
            self.uri = self.judge = self.store.as_uri()
        elif server is not None:
            self.uri, self.judge = server.url, server.database_uri
        else:
            self.uri = self.judge = f"sqlite:///{database(self.store)}"

    def run(self, inject: str, outbox: Path, experiment: str, events: range = EVENTS) -> Child:
        """Run a session under strace until its end; without events it delivers what another has left."""
        child = self._nest.traced(
            *(self.trace, ",".join(CALLS), inject, workload.session, self.uri, str(outbox), experiment),
            *(events.start, len(events), {}, self.conflicting),
        )
        child.join()
        return child

    def killed(self, point: tuple[str, int], outbox: Path, experiment: str, events: range = EVENTS) -> Child | None:
        """Kill a session just before the Nth call of a name; None when that did not come."""
        name, when = point
        child = self.run(f"{name}:signal=SIGKILL:when={when}", outbox, experiment, events)
        if child.process.exitcode == 0:
            assert points_of(self.trace)[name] < when, f"{name} {when} came, and nobody was killed"
            return None
        assert -signal.SIGKILL == child.process.exitcode, child.lines()
        return child

    def recovered(self, outbox: Path, experiment: str, logged: Child, fresh: int = 100) -> None:
        """Let the next program deliver what was logged, and check what MLflow holds."""
        dead = (1,) if "conflict" in logged.lines() else (0, int(self.conflicting))
        recovered(
            *(self._nest, self.uri, outbox, experiment, logged.acked(), set(EVENTS), fresh), dead=dead, judge=self.judge
        )


WORKS = ("artifact", "conflict", "file store", "server")


@pytest.mark.needs("strace")
@pytest.mark.fault("F02", "SIGKILL at system calls of append, copy, rotate, deliver, record, verify, file and reclaim")
@pytest.mark.fault("F33", "SIGKILL at system calls of append, copy, rotate, deliver, record, verify, file and reclaim")
@pytest.mark.fault("F34", "SIGKILL at system calls of append, copy, rotate, deliver, record, verify, file and reclaim")
@pytest.mark.parametrize("work", WORKS)
def test_a_kill_at_any_system_call_loses_and_doubles_nothing(
    work: str,
    part: slice,
    empty_database: Callable[[Path], Path],
    nest: Nest,
    row: Row,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """The session of one thread is killed before its Nth call of each kind; another program delivers the rest."""
    server = request.getfixturevalue("mlflow_server") if work == "server" else None
    scene = Scene(nest, work, tmp_path, empty_database, server)
    name = f"{work}-{part.start}-{os.urandom(4).hex()}"  # the server is everybody's
    whole = scene.run("", tmp_path / "whole", f"whole-{name}")
    assert (0, set(EVENTS)) == (whole.process.exitcode, whole.acked())
    held(scene.judge, f"whole-{name}").check(set(EVENTS))
    assert scene.conflicting == ("conflict" in whole.lines())
    points = changes(scene.trace)[part]
    nightly = len(points) if work == "artifact" else 5  # of each of six parts
    chosen = row.sample(points, {"artifact": 6, "conflict": 4}.get(work, 2), nightly, len(points))
    for index, point in enumerate(chosen):
        experiment, outbox = f"killed-{name}-{index}", tmp_path / f"outbox{index}"
        child = scene.killed(point, outbox, experiment)
        if child is not None:
            row.done()
            scene.recovered(outbox, experiment, child)
        shutil.rmtree(outbox)
    assert row.times > 0
    row.measure(work=work, points=len(points), chosen=len(chosen))


@pytest.mark.needs("strace")
@pytest.mark.fault("F03", "SIGKILL at system calls of the recovery from a kill")
def test_a_kill_during_the_recovery_from_a_kill_is_harmless(
    part: slice, empty_database: Callable[[Path], Path], nest: Nest, row: Row, rng: random.Random, tmp_path: Path
) -> None:
    """What one killed program left is kept, and each time a second one, which only delivers, is killed elsewhere."""
    recoveries: list[int] = []
    for number in range(row.pick(2, 12, 60))[part]:
        folder, kept = tmp_path / "now", tmp_path / "kept"
        folder.mkdir()
        scene, outbox = Scene(nest, WORKS[number % 2], folder, empty_database), folder / "outbox"
        whole = scene.run("", folder / "whole", "whole")
        assert (0, set(EVENTS)) == (whole.process.exitcode, whole.acked()), whole.lines()
        points, crashed, experiment = changes(scene.trace), None, ""
        while crashed is None or not crashed.acked():
            assert experiment.count("twice") < 30, f"nothing was logged before any kill: {crashed and crashed.lines()}"
            shutil.rmtree(outbox, ignore_errors=True)
            experiment += "twice "
            crashed = scene.killed(rng.choice(points), outbox, experiment)
        shutil.copytree(folder, kept, symlinks=True)
        clean = scene.run("", outbox, experiment, range(0))
        assert 0 == clean.process.exitcode
        points = changes(scene.trace)
        recoveries.append(len(points))
        for point in row.sample(points, 5, 10, 40):
            shutil.rmtree(folder)
            shutil.copytree(kept, folder, symlinks=True)
            if scene.killed(point, outbox, experiment, range(0)) is not None:
                row.done()
                scene.recovered(outbox, experiment, crashed)
        shutil.rmtree(folder)
        shutil.rmtree(kept)
    assert row.times > 0
    row.measure(states=len(recoveries), fewest_points=min(recoveries), most_points=max(recoveries))


@pytest.mark.fault("F81", "SIGKILL of the worker that holds the lease; another stands by")
def test_a_killed_lease_holder_is_replaced_within_two_seconds(
    sqlite_uri: str, nest: Nest, row: Row, rng: random.Random, tmp_path: Path
) -> None:
    """The survivor takes over in time, and all events of both arrive once."""
    outbox = str(tmp_path / "outbox")
    acked: set[int] = set()
    issued: set[int] = set()
    slowest = 0.0
    holder: Child | None = None
    for number in range(row.pick(4, 150, 5001)):
        first = (number + 1) * 100_000
        if holder is None:
            holder = nest.start(workload.log_forever, sqlite_uri, outbox, "lease", first, 1, "thread", {}, 0.01)
            eventually(
                lambda holder=holder: workload.lease_pid(outbox, sqlite_uri) == holder.pid, 30, "the lease is taken"
            )
            continue
        other = nest.start(workload.log_forever, sqlite_uri, outbox, "lease", first, 1, "thread", {}, 0.01)
        other.wait_for_lines(20)
        assert holder.pid == workload.lease_pid(outbox, sqlite_uri), "two workers"
        holder.process.join(rng.uniform(0, 0.2))
        holder.kill()
        slowest = max(
            slowest, workload.seconds_until(lambda other=other: workload.lease_pid(outbox, sqlite_uri) == other.pid)
        )
        acked |= holder.acked()
        issued |= holder.acked() | {max(holder.acked()) + 1}
        holder = other
        row.done()
    assert holder is not None
    holder.kill()
    acked |= holder.acked()
    issued |= holder.acked() | {max(holder.acked()) + 1}
    row.measure(slowest_takeover_s=slowest)
    recovered(nest, sqlite_uri, tmp_path / "outbox", "lease", acked, issued, 50, patience=60 + len(acked) / 400)
    assert slowest <= 2.0 + workload.PATIENCE


@pytest.mark.fault("F01", "a worker killed between making and writing a file store's param")
def test_a_param_that_a_killed_worker_left_empty_is_written_again(
    file_uri: str, nest: Nest, row: Row, tmp_path: Path
) -> None:
    """The empty file that MLflow's own code leaves is not taken for somebody's value."""
    experiment, outbox = "torn", tmp_path / "outbox"
    report = nest.start(workload.drain, file_uri, str(outbox), experiment, 0, {}).report()
    (param,) = (tmp_path / "mlruns").glob("*/*/params/p3")
    param.write_bytes(b"")
    shutil.rmtree(workload.directory_of(outbox, file_uri) / "delivery")  # the worker died before it recorded anything
    filed = workload.directory_of(outbox, file_uri) / "delivered"
    for run in filed.iterdir():
        run.rename(filed.parent / "runs" / run.name)
    recovered(nest, file_uri, outbox, experiment, set(report["acked"]), set(report["acked"]), 100)
    row.done()
