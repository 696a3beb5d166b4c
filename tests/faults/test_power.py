"""Power cuts on a real file system: what was acknowledged as durable is there afterwards, and arrives once."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import select
import shutil
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from faults import manners, workload
from faults.children import Nest
from faults.mounts import PowerCut, own_namespace
from faults.oracle import held, kind_of
from faults.table import Row
from mlflow_outbox.spool.caretaker import RELIEVED
from mlflow_outbox_worker.lease import Lease

#: Seconds between two background syncs; and where the process that delivers does them too.
INTERVAL = 0.05
STEADY = 0.1


def lose_power(fd: int, folder: str, uri: str, sync: str, worker: str, pause: float) -> None:
    """Log to a file system, cut its power, and report what was acknowledged and when; the file system is on again."""

    def work() -> dict[str, Any]:
        own_namespace()
        disk = PowerCut(Path(folder))
        read, write = os.pipe()
        victim = os.fork()
        if victim == 0:
            os.close(read)
            changed = {"sync": sync, "sync_interval": INTERVAL, "free_bytes": 0, **workload.TINY}
            log_with_times(write, uri, str(disk.path / "outbox"), worker, changed)
        os.close(write)
        data = bytearray()
        began = threading.Event()
        listener = threading.Thread(target=_listen, args=(read, data, began), daemon=True)
        listener.start()
        assert began.wait(60), "nothing was logged"
        threading.Event().wait(pause)  # the power goes at a moment that nothing announces
        before = time.monotonic()
        disk.cut()
        os.kill(victim, signal.SIGKILL)
        os.waitpid(victim, 0)
        listener.join()
        disk.off()
        disk.on()
        fields = [line.split() for line in data.decode().splitlines()]
        acked = {int(number): float(when) for what, number, when in fields if what == "logged"}
        # What came while the power went nobody can judge.
        synced = max((int(n) for what, n, when in fields if what == "synced" and float(when) < before), default=-1)
        durable = [n for n, when in acked.items() if (when < before if sync == "always" else n <= synced)]
        _drain(fd, uri, str(disk.path / "outbox"), "power")
        disk.off()
        ages = {number: before - when for number, when in acked.items()}
        return {"durable": durable, "issued": [*acked, max(acked) + 1], "ages": ages}

    workload.reported(fd, work)


def _drain(fd: int, uri: str, outbox: str, experiment: str) -> None:
    """Be the next program, in a process of its own, which leaves no file open on the disk."""
    drained = os.fork()
    if drained == 0:
        workload.drain(fd, uri, outbox, experiment, 90_000, {"free_bytes": 0})
        os._exit(0)
    os.waitpid(drained, 0)


def log_with_times(fd: int, uri: str, outbox: str, worker: str, changed: dict[str, Any]) -> None:
    """Log numbered events, and acknowledge each with the time at which its call returned."""
    if changed["sync"] == "always":
        manners.excuse_syncs()
    tracker = workload.MLflowTracker(
        "power",
        uri,
        outbox_dir=outbox,
        worker=worker,
        settings=workload.settings(**changed),  # type: ignore[arg-type]  # one of the kinds
    )
    run = tracker.start_run("cut")
    pace = threading.Event()  # never set: without pauses the events would be used up before the power goes
    for number in range(9_000):
        # On a disk without power, events are kept in memory: they are kept, but nobody calls them durable.
        if workload.log_event(run, number):
            os.write(fd, f"logged {number} {time.monotonic()}\n".encode())
        if number % 100 == 60:
            tracker._outbox.sync()  # type: ignore[union-attr]  # it was made
            os.write(fd, f"synced {number} {time.monotonic()}\n".encode())
        if number % 8 == 0:
            pace.wait(0.001)
    threading.Event().wait()


def _listen(fd: int, data: bytearray, began: threading.Event) -> None:
    while part := os.read(fd, 65536):
        data += part
        began.set()


@pytest.mark.needs("loop")
@pytest.mark.fault("F16", "power cut (ext4 shut down without flushing) at a random time, disk and ledger both")
@pytest.mark.parametrize(
    ("sync", "worker", "store"),
    [("always", "thread", "sqlite"), ("interval", "none", "sqlite"), ("interval", "thread", "file")],
)
def test_a_power_cut_takes_no_more_than_the_ladder_says(
    sync: str,
    worker: str,
    store: str,
    empty_database: Callable[[Path], Path],
    nest: Nest,
    row: Row,
    rng: random.Random,
    tmp_path: Path,
) -> None:
    """What a call at "always" returned from, and what a sync has passed, arrives; a gap in the rest is counted."""
    for number in range(row.pick(1, 100, 1000)):
        folder = tmp_path / str(number)
        folder.mkdir()
        database = f"sqlite:///{empty_database(folder / 'mlflow.db')}"
        uri = database if store == "sqlite" else (folder / "mlruns").as_uri()
        pause = rng.uniform(0.0, 0.8)
        child = nest.start(lose_power, str(folder), uri, sync, worker, pause)
        last = child.report()
        after = next(line for line in child.lines() if '"acked"' in line)
        assert '"pending": 0, "parked": 0, "dead": 0' in after, after
        fresh = set(range(90_000, 90_010))
        found = held(uri, "power")
        found.check(set(last["durable"]) | fresh, set(last["issued"]) | fresh)
        there = sorted(set(found.events) - fresh)
        if worker == "none":  # what a worker had sent before the cut is there anyway
            # The kernel may write newer segments before older ones; neither was promised yet, but a gap is told.
            counted = json.loads(after)["counters"]
            gap = set(range(max(there, default=-1) + 1)) - set(there)  # nothing at all, if the power went at once
            assert len(gap) <= counted.get("missing", 0), (sorted(gap), counted)
        row.done()
        lost = set(last["issued"][:-1]) - set(there)
        oldest = max((last["ages"][str(n)] for n in lost), default=0.0)
        row.measure(
            sync=sync, store=store, durable=len(last["durable"]), lost=len(lost), oldest_lost_s=max(0.0, oldest)
        )


def lose_power_stopped(fd: int, folder: str, uri: str, calls: int) -> None:
    """Log until the process that delivers syncs too, log on, and be stopped; then cut the power, and drain the rest.

    Somebody else has the right to deliver, so that nothing has arrived before. The victim stops itself at once after
    its last call: whatever is durable of that, the other process has made so.
    """

    def work() -> dict[str, Any]:
        own_namespace()
        disk = PowerCut(Path(folder))
        outbox = str(disk.path / "outbox")
        read, write = os.pipe()
        victim = os.fork()
        if victim == 0:
            given = workload.settings(sync_interval=STEADY, free_bytes=0)
            tracker = workload.MLflowTracker("power", uri, outbox_dir=outbox, worker="process", settings=given)
            other = Lease(Path(str(tracker.outbox_path), "worker.lock"), "test")
            assert other.acquire()
            run = tracker.start_run("stopped")
            numbers = (number for number in range(90_000) if kind_of(number) == "metric")
            caretaker = tracker._outbox._caretaker  # type: ignore[union-attr]  # it was made
            asked, found = caretaker._intervals, [0]

            def told() -> int:
                found[0] = asked()
                return found[0]

            caretaker._intervals = told  # type: ignore[method-assign]  # to hear of it
            acked = []
            while found[0] != RELIEVED:
                number = next(numbers)
                acked += [number] if workload.log_event(run, number) else []
                threading.Event().wait(0.001)
            acked += [number for number in itertools.islice(numbers, calls) if workload.log_event(run, number)]
            worker = tracker._outbox._worker.pid  # type: ignore[union-attr]  # it was started
            os.writev(write, [json.dumps([worker, acked]).encode() + b"\n"])
            os.kill(os.getpid(), signal.SIGSTOP)
        os.close(write)
        with os.fdopen(read) as lines:
            worker, acked = json.loads(lines.readline())
        os.waitpid(victim, os.WUNTRACED)
        threading.Event().wait(3 * STEADY)  # what is promised is a time
        disk.cut()
        ended = os.pidfd_open(worker)  # no child of this one; its files are let go of after its list of them is empty
        for one in (victim, worker):
            os.kill(one, signal.SIGKILL)
        os.waitpid(victim, 0)
        assert select.select([ended], [], [], 60)[0]
        os.close(ended)
        disk.off()
        disk.on()
        _drain(fd, uri, outbox, "power")
        disk.off()
        return {"acked": acked}

    workload.reported(fd, work)


#: The calls between which a power cut can find the disk in another state.
BOUNDARIES = ("fdatasync", "fsync", "fallocate", "rename", "unlink", "unlinkat")
#: What a session logs: one of them is an artifact.
SESSION = range(40, 52)


def lose_power_at(fd: int, folder: str, uri: str, what: str, call: str, when: int) -> None:
    """Log on a file system that loses its power just before the Nth call of a kind, then drain it.

    What is done is a "session", which delivers too, or a "conflict", a session in which a param becomes a dead letter.
    With ``when`` 0 nothing is lost, and the report counts the calls of each kind.
    """

    def work() -> dict[str, Any]:
        own_namespace()
        disk = PowerCut(Path(folder))
        outbox, trace = str(disk.path / "outbox"), Path(folder, "trace")
        read, write = os.pipe()
        gate, opened = os.pipe()
        victim = os.fork()
        if victim == 0:
            os.close(read)
            os.read(gate, 1)
            first, count = SESSION.start, len(SESSION)
            workload.session(write, uri, outbox, "cut", first, count, {"free_bytes": 0}, what == "conflict")
        os.close(write)
        calls = ",".join(BOUNDARIES)
        command = ["strace", "-f", "-p", str(victim), "-o", str(trace), "-e", f"trace={calls}", "-e", "signal=none"]
        if when:
            command += ["-e", f"inject={call}:signal=SIGKILL:when={when}"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL) as tracer:
            assert tracer.stderr is not None
            assert b"attached" in tracer.stderr.readline()
            os.write(opened, b"x")
            _, status = os.waitpid(victim, 0)
            disk.cut()
        said = bytearray()
        _listen(read, said, threading.Event())
        disk.off()
        disk.on()
        _drain(fd, uri, outbox, "cut")
        letters = len(workload.letters_of(outbox, uri))
        disk.off()
        lines = trace.read_text(errors="replace").splitlines()
        names = [found[1] for line in lines if (found := re.match(rf"{victim}\s+(\w+)\(", line))]
        heard = said.decode().split("\n")[:-1]
        acked = [int(line) for line in heard if line.isdigit()]
        return {
            "acked": acked,
            "conflict": "conflict" in heard,
            "letters": letters,
            "counts": {c: names.count(c) for c in BOUNDARIES},
            "fired": os.WIFSIGNALED(status),
        }

    workload.reported(fd, work)


@pytest.mark.needs("loop")
@pytest.mark.fault("F16", "power cut while a program is stopped, and the process that delivers syncs for it")
def test_what_a_stopped_program_has_logged_is_made_durable_by_the_process_that_delivers(
    empty_database: Callable[[Path], Path], nest: Nest, row: Row, rng: random.Random, tmp_path: Path
) -> None:
    """All of it, two intervals later: the program's own background cannot have done it."""
    for number in range(row.pick(1, 25, 250)):
        folder = tmp_path / str(number)
        folder.mkdir()
        uri = f"sqlite:///{empty_database(folder / 'mlflow.db')}"
        child = nest.start(lose_power_stopped, str(folder), uri, rng.randint(1, 300))
        report = child.report()
        after = next(line for line in child.lines() if '"left"' in line)
        assert '"pending": 0, "parked": 0, "dead": 0' in after, after
        fresh = set(range(90_000, 90_010))
        held(uri, "power").check(set(report["acked"]) | fresh)
        row.done()


@pytest.mark.needs("loop", "strace")
@pytest.mark.fault("F17", "power cut just before the Nth fdatasync, fsync, fallocate, rename or unlink of a session")
@pytest.mark.parametrize("work", ["artifact", "conflict", "file store"])
def test_a_power_cut_at_any_boundary_loses_and_doubles_nothing(
    work: str, empty_database: Callable[[Path], Path], nest: Nest, row: Row, tmp_path: Path
) -> None:
    """At "always" every acknowledged event is on the disk, whatever step the worker was at."""

    def cut(name: str, call: str, when: int) -> dict[str, Any]:
        folder = tmp_path / name
        folder.mkdir()
        if work == "file store":
            uri = (folder / "mlruns").as_uri()
        else:
            uri = f"sqlite:///{empty_database(folder / 'mlflow.db')}"
        child = nest.start(lose_power_at, str(folder), uri, "conflict" if work == "conflict" else "session", call, when)
        report = child.report()
        after = next(json.loads(line) for line in child.lines() if '"left"' in line)
        assert (0, 0) == (after["left"]["pending"], after["left"]["parked"]), (name, after)
        dead = (1,) if report["conflict"] else (0, int(work == "conflict"))
        assert after["left"]["dead"] in dead, (name, after)
        assert after["left"]["dead"] == report["letters"], (name, after)
        fresh = set(range(90_000, 90_010))
        held(uri, "cut").check(set(report["acked"]) | fresh, set(SESSION) | fresh)
        return report

    whole = cut("whole", "", 0)
    points = [(call, n) for call, count in whole["counts"].items() for n in range(1, count + 1)]
    assert ([*SESSION], work == "conflict") == (whole["acked"], whole["conflict"])
    artifact = work == "artifact"
    chosen = row.sample(range(len(points)), 2 if artifact else 1, len(points) if artifact else 8, len(points))
    fired = 0
    for index in chosen:
        call, when = points[index]
        report = cut(f"{call}-{when}", call, when)
        assert report["fired"] or report["counts"][call] < when, f"{call} {when} came, and the power stayed"
        fired += report["fired"]
    assert fired > 0
    row.done(fired)
    row.measure(work=work, points=len(points))


def die_at_fsync(when: int) -> None:
    """Have this process killed just before its Nth ``fsync``, whichever thread makes it.

    Not by strace, which can do that too, but stops each thread twice at every call that it makes of the system: what a
    logging call takes, which copies a file here, would be strace's time.
    """
    sync, numbers = os.fsync, itertools.count(1)

    def fsync(fd: Any) -> None:
        if next(numbers) >= when:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(fd)

    os.fsync = fsync


def lose_power_among_artifacts(fd: int, folder: str, uri: str, when: int) -> None:
    """Log artifacts on a file system that loses its power just before the Nth fsync, then drain it."""

    def work() -> dict[str, Any]:
        own_namespace()
        disk = PowerCut(Path(folder))
        outbox = str(disk.path / "outbox")
        read, write = os.pipe()
        victim = os.fork()
        if victim == 0:
            os.close(read)
            die_at_fsync(when)
            log_artifacts(write, uri, outbox)
        os.close(write)
        said = bytearray()
        _listen(read, said, threading.Event())  # until it is killed
        _, status = os.waitpid(victim, 0)
        disk.cut()
        disk.off()
        disk.on()
        _drain(fd, uri, outbox, "cut")
        disk.off()
        return {"acked": [int(line) for line in said.decode().split("\n")[:-1]], "fired": os.WIFSIGNALED(status)}

    workload.reported(fd, work)


def log_artifacts(fd: int, uri: str, outbox: str) -> None:
    """Log artifacts as fast as possible while the background syncs all the time, until the power goes."""
    given = workload.settings(sync="interval", sync_interval=0.001, free_bytes=0)
    tracker = workload.MLflowTracker("cut", uri, outbox_dir=outbox, worker="none", settings=given)
    run = tracker.start_run("files")
    for index, number in enumerate(artifacts()):
        if workload.log_event(run, number):
            workload.ack(fd, number)
        if index == 0:
            tracker.flush(0)  # is durable, so that something is there however slow the machine is
    threading.Event().wait()


def artifacts() -> Iterator[int]:
    """Return the events that are artifacts, without an end."""
    return (number for number in itertools.count() if kind_of(number) == "artifact")


@pytest.mark.needs("loop")
@pytest.mark.fault("F16", "power cut before the Nth fsync while artifacts are logged all the time")
def test_a_power_cut_leaves_no_event_without_its_copied_file(
    empty_database: Callable[[Path], Path], nest: Nest, row: Row, tmp_path: Path
) -> None:
    """What is lost is lost whole: an event that is there has its file, and nothing is a dead letter."""
    there = 0
    for when in row.sample(range(8, 128), 1, 24, 120):
        folder = tmp_path / str(when)
        folder.mkdir()
        uri = f"sqlite:///{empty_database(folder / 'mlflow.db')}"
        child = nest.start(lose_power_among_artifacts, str(folder), uri, when)
        report = child.report()
        assert report["fired"]
        after = next(json.loads(line) for line in child.lines() if '"left"' in line)
        assert [0, 0, 0] == [after["left"][k] for k in ("pending", "parked", "dead")], (when, after)
        fresh = set(range(90_000, 90_010))
        unacknowledged = next(itertools.islice(artifacts(), len(report["acked"]), None))
        found = held(uri, "cut")
        found.check(fresh, {*report["acked"], *fresh, unacknowledged})
        there += len(found.events) - len(fresh)
        row.done()
    assert there > 0
    row.measure(artifacts_there=there)


#: What is torn: no artifacts, whose copies are files of their own.
EVENTS = [number for number in range(98) if kind_of(number) != "artifact"]


def log_unsynced(fd: int, uri: str, outbox: str) -> None:
    """Log to several segments, none of which is synced; report which segment took each event."""

    def work() -> dict[str, Any]:
        given = workload.settings(sync="os", **workload.TINY)
        tracker = workload.MLflowTracker("torn", uri, outbox_dir=outbox, worker="none", settings=given)
        run = tracker.start_run("torn")
        runs = Path(str(tracker.outbox_path), "runs", run.run_id)
        segments = []
        for number in EVENTS:
            assert workload.log_event(run, number)
            segments.append(max(path.name for path in runs.glob("*.log")))
        return {"segments": segments}

    workload.reported(fd, work)
    os._exit(0)


def tear(path: Path, rng: random.Random) -> str:
    """Do to a segment what a cut may do to one that was never synced: parts of it, of any order, were not written."""
    data = path.read_bytes()
    what = rng.choice(["absent", "cut", "sectors", "grown"])
    if what == "absent":
        path.unlink()
    elif what == "cut":
        path.write_bytes(data[: rng.randrange(len(data))])
    elif what == "grown":  # its size was written, and none of its data
        path.write_bytes(bytes(len(data)))
    else:
        parts = [data[at : at + 128] for at in range(0, len(data), 128)]
        path.write_bytes(b"".join(bytes(len(part)) if rng.random() < 0.4 else part for part in parts))
    return what


@pytest.mark.fault("F18", "unsynced writes kept in any subset and order: segments absent, cut, or with holes of zeros")
def test_writes_that_reached_the_disk_in_any_order_are_never_taken_for_others(
    part: slice, sqlite_uri: str, nest: Nest, row: Row, rng: random.Random, tmp_path: Path
) -> None:
    """Every event of a segment that is whole arrives once, none that was not logged; the next program goes on."""
    outbox = tmp_path / "outbox"
    where = nest.start(log_unsynced, sqlite_uri, str(outbox)).report()["segments"]
    folder = workload.directory_of(outbox, sqlite_uri)
    names = sorted(set(where))
    assert len(names) > 3, "too few segments"
    for number in range(row.pick(3, 500, 20_000))[part]:
        state, experiment = tmp_path / f"state{number}", f"torn-{number}"
        shutil.copytree(folder, workload.directory_of(state, sqlite_uri), symlinks=True)
        torn = {name for name in names if rng.random() < 0.4} or {names[-1]}
        did = {
            path.name: tear(path, rng)
            for path in sorted(workload.directory_of(state, sqlite_uri).glob("runs/*/*.log"))
            if path.name in torn
        }
        report = nest.start(workload.drain, sqlite_uri, str(state), experiment, 100, {}).report()
        assert [0, 0, 0] == [report["left"][k] for k in ("pending", "parked", "dead")], (did, report)
        # The torn run keeps its own experiment, and all states share the database: its runs are judged by their rows.
        fresh = set(range(100, 110))
        held(sqlite_uri, experiment).check(fresh)
        whole = {event for event, name in zip(EVENTS, where, strict=True) if name not in torn}
        held(sqlite_uri, "torn").check(whole, set(EVENTS))
        forget(sqlite_uri)
        shutil.rmtree(state)
        row.done()


def forget(uri: str) -> None:
    """Take the torn run out of MLflow's database, so that the next state is delivered afresh."""
    with sqlite3.connect(uri.removeprefix("sqlite:///")) as database:
        for table in ("metrics", "latest_metrics", "params", "tags", "runs"):
            database.execute(f"DELETE FROM {table}")
    database.close()
