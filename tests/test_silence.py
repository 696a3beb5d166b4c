"""Writers that say nothing any more: when they count as gone, and what of one that lives after all."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from commands import outbox_of
from contents import QUICK, numbered, points, the_run
from mlflow_outbox import MLflowTracker
from mlflow_outbox.counters import Counters
from mlflow_outbox.destination import resolve
from mlflow_outbox.run import Run
from mlflow_outbox.spool import filesystem
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox.spool.events import RunStarted
from mlflow_outbox.spool.reader import RunReader
from mlflow_outbox.spool.snapshot import SnapshotStore
from mlflow_outbox.spool.window import Window
from mlflow_outbox.spool.writer import boot_id
from mlflow_outbox_worker import upkeep
from mlflow_outbox_worker.delivery import Delivery
from mlflow_outbox_worker.thread import ThreadWorker
from servers import eventually
from spools import RUN, AllShared, Everything, closing, header, make_outbox, metric, packed, write_segment
from workers import delivering

#: Seconds of silence: after the first a writer on another machine is read to its end, after the second it has left.
QUIET, LONG = 700, 90_000


def silence(folder: Path, seconds: float) -> None:
    """Let nothing have been written to a run for so long."""
    for path in folder.glob("*.log"):
        os.utime(path, (time.time() - seconds,) * 2)


class Ranks(NamedTuple):
    """A run to which two programs log, and that the first has ended."""

    directory: OutboxDirectory
    trackers: tuple[MLflowTracker, MLflowTracker]
    run_id: str
    other: Run

    @property
    def folder(self) -> Path:
        """Where the run is until it is filed."""
        return self.directory.run(self.run_id)


@pytest.fixture
def ranks(experiment_name: str, sqlite_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    """They share a file system of the network; the second has logged one point and is silent."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(filesystem, "_known", AllShared())
    first, second = (
        MLflowTracker(experiment_name, sqlite_uri, outbox_dir=tmp_path / "outbox", worker="none", settings=QUICK)
        for _ in range(2)
    )
    run = first.start_run("of two")
    other = second.start_run(run_id=run.run_id)
    other.log_metric("loss", 0.0, step=0)
    begun = time.time_ns() // 1_000_000
    eventually(lambda: time.time_ns() // 1_000_000 > begun, 10)  # the end is the last word, then
    run.end()
    for tracker in (first, second):
        tracker.flush(0)
    yield Ranks(OutboxDirectory.open(outbox_of(tmp_path / "outbox")), (first, second), run.run_id, other)
    for tracker in (first, second):
        tracker.close(0)


def test_what_a_silent_writer_logs_after_the_end_of_its_run_arrives(
    ranks: Ranks, sqlite_uri: str, experiment_name: str
) -> None:
    """Where no lock tells that it lives its segment stays in its place, for it would go on in it wherever it lies."""
    silence(ranks.folder, QUIET)
    with delivering(ranks.directory, sqlite_uri, QUICK) as counters:
        eventually(lambda: counters["runs_verified"], 60)
        assert ranks.other.log_metric("loss", 0.5, step=1)
        eventually(lambda: counters["delivered"] == 5, 60, lambda: f"{counters}")
    assert numbered(2) == points(sqlite_uri, the_run(sqlite_uri, experiment_name).info.run_id, "loss")


def test_a_writer_whose_segment_was_filed_after_all_goes_on_in_another(
    ranks: Ranks, sqlite_uri: str, experiment_name: str
) -> None:
    """After a day it counts as gone; one that lives sees that its file is not there any more."""
    silence(ranks.folder, LONG)
    with delivering(ranks.directory, sqlite_uri, QUICK) as counters:
        eventually(lambda: ranks.directory.run_ids() == [], 60)
        eventually(lambda: "segments_removed" in ranks.trackers[1].counters, 60)
        assert ranks.other.log_metric("loss", 0.5, step=1)
        eventually(lambda: counters["delivered"] == 5, 60, lambda: f"{counters}")
        ranks.other.end()
        eventually(lambda: ranks.directory.run_ids() == [], 60)
    assert numbered(2) == points(sqlite_uri, the_run(sqlite_uri, experiment_name).info.run_id, "loss")


def test_a_closed_segment_is_filed_at_once_wherever_it_lies(ranks: Ranks, sqlite_uri: str) -> None:
    """Its writer has said that nothing follows."""
    ranks.other.end()
    with delivering(ranks.directory, sqlite_uri, QUICK):
        eventually(lambda: ranks.directory.run_ids() == [], 60)


@pytest.mark.parametrize("closed", [False, True])
def test_what_arrives_over_a_network_in_another_order_is_waited_for(
    closed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later piece of what another machine writes can be there before an earlier one, which is zeros until then."""
    monkeypatch.setattr(filesystem, "_known", AllShared())
    head = header(host="elsewhere", boot_id="another")
    frames = packed(map(metric, range(9)), head)
    end = [closing(9, head)] if closed else []
    late = write_segment(tmp_path, head, [*frames[:3], *(bytes(len(one)) for one in frames[3:6]), *frames[6:], *end])
    early = Everything(tmp_path)
    assert ([0, 1, 2], [], True) == (early.steps, early.broken, early.live)
    assert late == write_segment(tmp_path, head, [*frames, *end])
    rest = Everything(tmp_path, early.cursors)
    assert (list(range(3, 9)), [], 0) == (rest.steps, rest.broken, rest.missing)


def test_a_run_of_which_something_is_on_its_way_is_not_said_to_be_sent(
    sqlite_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replay would end with all well, and whoever started it delete the files."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(filesystem, "_known", AllShared())
    directory, counters = make_outbox(tmp_path / "outbox"), Counters()
    head = header(host="elsewhere", boot_id="another")
    frames = packed([RunStarted(1, "in pieces"), *map(metric, range(4))], head)
    write_segment(directory.run(RUN), head, [*frames[:3], bytes(len(frames[3])), frames[4]])
    looks, window = list[int](), RunReader.window

    def counted(self: RunReader, *given: Any, **more: Any) -> Window:
        looks.append(counters["delivered"])
        return window(self, *given, **more)

    monkeypatch.setattr(RunReader, "window", counted)
    delivery = Delivery(directory, resolve(sqlite_uri), QUICK, counters, kind="command")
    worker = ThreadWorker(lambda: delivery, counters)
    worker.start()
    try:
        eventually(lambda: looks.count(3) > 1, 60)
        assert "waiting" == delivery.standings()[RUN].state
        write_segment(directory.run(RUN), head, frames)
        eventually(lambda: delivery.standings()[RUN].state == "sent", 60)
    finally:
        worker.stop(60)
    assert (5, 0, 0) == tuple(counters[reason] for reason in ("delivered", "missing", "quarantined"))


@pytest.mark.parametrize(("place", "idle", "settle"), [("local", 0, 60.0), ("shared", 0, 0.0), ("shared", QUIET, 60.0)])
def test_damage_is_read_around_where_nothing_comes_late_or_long_enough_was_waited(
    place: str, idle: int, settle: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies behind it is delivered then."""
    if place == "shared":
        monkeypatch.setattr(filesystem, "_known", AllShared())
    head = header(host="elsewhere", boot_id="another")
    frames = packed(map(metric, range(9)), head)
    write_segment(tmp_path, head, [*frames[:3], bytes(len(frames[3])), *frames[4:]])
    silence(tmp_path, idle)
    found = Everything(tmp_path, settle=settle)
    assert ([0, 1, 2, 4, 5, 6, 7, 8], ["corrupt"]) == (found.steps, [one.kind for one in found.broken])


def test_a_file_that_another_machine_logs_after_the_end_is_kept_while_the_run_is_filed(
    ranks: Ranks, sqlite_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lock is not seen here; what it copies just now is. A copy of a program that died is removed after a day."""
    ranks.other.end()
    draft = SnapshotStore(ranks.folder).path / ".draft-0"
    draft.parent.mkdir(0o700, exist_ok=True)
    draft.touch()
    tries: list[bool] = []
    file_run = upkeep.file_run

    def watched(*given: Any) -> bool:
        tries.append(file_run(*given))
        return tries[-1]

    monkeypatch.setattr(upkeep, "file_run", watched)
    with delivering(ranks.directory, sqlite_uri, QUICK):
        eventually(lambda: tries, 60)
        assert ([False], True) == (tries[:1], draft.exists())
        os.utime(draft, (time.time() - LONG,) * 2)
        eventually(lambda: ranks.directory.run_ids() == [], 60)


@pytest.mark.parametrize(("ago", "ended"), [(0, False), (7 * 24 * 3600, True)])
def test_a_run_whose_program_s_number_another_process_has_by_now_is_filed(
    ago: float, ended: bool, sqlite_uri: str, tmp_path: Path
) -> None:
    """As in a container that was killed and started anew under its name, where each program has the same number."""
    directory = make_outbox(tmp_path / "outbox")
    created_ms = int((time.time() - ago) * 1000)
    head = header(host=os.uname().nodename, boot_id=boot_id(), pid=os.getpid(), created_ms=created_ms)
    write_segment(directory.run(RUN), head, packed([RunStarted(1, "killed"), metric(0)], head))
    with delivering(directory, sqlite_uri, QUICK) as counters:
        eventually(lambda: counters["delivered"] == 2, 60)
        eventually(lambda: not ended or directory.run_ids() == [], 60)
    assert int(ended) == counters["runs_verified"]


def test_a_run_that_nobody_has_ended_is_filed_when_its_program_ends_after_all_of_it_was_delivered(
    sqlite_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had closed its journal by then, as at an exit that waits for delivery, so that no lock tells of its end."""
    monkeypatch.setattr(upkeep, "_LOOK", 0.1)
    directory = make_outbox(tmp_path / "outbox")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as program:
        head = header(
            host=os.uname().nodename, boot_id=boot_id(), pid=program.pid, created_ms=int((time.time() + 1) * 1000)
        )
        frames = [*packed([RunStarted(1, "left"), metric(0)], head), closing(2, head)]
        write_segment(directory.run(RUN), head, frames)
        with delivering(directory, sqlite_uri, QUICK) as counters:
            eventually(lambda: counters["delivered"] == 2, 60)
            assert not counters["runs_verified"]
            program.communicate(b"\n", timeout=60)
            eventually(lambda: directory.run_ids() == [], 60)
    assert 1 == counters["runs_verified"]
    assert [RUN] == directory.delivered_ids()


@pytest.mark.parametrize("place", ["of this machine", "of the network"])
def test_a_run_that_was_killed_in_a_container_is_filed_after_a_day(
    place: str, sqlite_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its host has a name of its own, and its number is another process's here; nothing new makes anybody look."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(upkeep, "_LOOK", 0.1)
    if place == "of the network":
        monkeypatch.setattr(filesystem, "_known", AllShared())
    directory = make_outbox(tmp_path / "outbox")
    head = header(host="pod-7f9c", boot_id=boot_id(), pid=os.getpid())
    write_segment(directory.run(RUN), head, packed([RunStarted(1, "killed"), metric(0)], head))
    silence(directory.run(RUN), QUIET)
    with delivering(directory, sqlite_uri, QUICK) as counters:
        eventually(lambda: counters["delivered"] == 2, 60)
        assert not counters["runs_verified"]
        silence(directory.run(RUN), LONG)
        eventually(lambda: directory.run_ids() == [], 60)
    assert 1 == counters["runs_verified"]
    assert [RUN] == directory.delivered_ids()
    assert 2 == sum(RunReader(directory.delivered / RUN).next_numbers().values())
