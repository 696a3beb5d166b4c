"""What was filed before the ledger was lost is known again, so that it is reclaimed; nothing of it is sent."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from contents import QUICK, numbered, points, runs
from mlflow_outbox import MLflowTracker
from mlflow_outbox.spool import guard
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox.spool.guard import used_bytes
from mlflow_outbox_worker import recollection, room, upkeep
from mlflow_outbox_worker.ledger import Ledger
from mlflow_outbox_worker.sink import SinkError
from servers import eventually
from workers import delivering


@pytest.fixture(autouse=True)
def _in_a_hurry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(upkeep, "_RECLAIM", 0.05)
    monkeypatch.setattr(guard, "_MEASURE_EVERY", 0.05)
    monkeypatch.setattr(room, "_MEASURE", 0.05)
    monkeypatch.setattr(room, "_RARELY", 1.0)
    monkeypatch.setattr(room, "_AGAIN", 0.5)


def filed(root: Path, uri: str, experiment: str, number: int) -> tuple[OutboxDirectory, list[str]]:
    """Make an outbox of runs that were delivered, read back and filed, whose ledger is lost then."""
    tracker = MLflowTracker(experiment, uri, outbox_dir=root, worker="none", settings=QUICK)
    ids = []
    for one in range(number):
        with tracker.start_run(f"run-{one}") as run:
            run.log_param("number", one)
            run.log_text("x" * 100_000, "notes.txt")
            for step in range(100):
                run.log_metric("loss", step / 2, step=step)
        ids.append(run.run_id)
    tracker.close(0)
    assert tracker.outbox_path is not None
    directory = OutboxDirectory.open(tracker.outbox_path)
    with delivering(directory, uri, QUICK):
        eventually(lambda: sorted(ids) == directory.delivered_ids(), 60)
    shutil.rmtree(directory.ledger)
    return directory, ids


def test_what_mlflow_holds_is_known_again_and_reclaimed(sqlite_uri: str, experiment_name: str, tmp_path: Path) -> None:
    """After the retention time, counted from then on; MLflow has each run once, as before."""
    directory, ids = filed(tmp_path, sqlite_uri, experiment_name, 3)
    with delivering(directory, sqlite_uri, QUICK) as counters:
        eventually(lambda: 3 == counters["runs_known_again"], 60)
        assert sorted(ids) == directory.delivered_ids()
        with contextlib.closing(Ledger.open(directory.ledger, read_only=True)) as ledger:
            found = [ledger.record(run_id) for run_id in ids]
            seen = [ledger.view(run_id) for run_id in ids]
    assert [("done", True, 104)] * 3 == [(one.state, one.ended, one.delivered) for one in found if one is not None]
    assert [100] * 3 == [view.metrics["loss"].points for view in seen if view is not None]
    with delivering(directory, sqlite_uri, dataclasses.replace(QUICK, retention=0)) as counters:
        eventually(lambda: not directory.delivered_ids(), 60)
    assert 0 == counters["delivered"]
    held = runs(sqlite_uri, experiment_name)
    assert 3 == len(held)
    assert [numbered(100)] * 3 == [points(sqlite_uri, run.info.run_id, "loss") for run in held]


def test_a_run_that_was_filed_behind_the_ledger_s_back_is_known_again(
    sqlite_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """Another machine has delivered the rest and filed it, or the ledger was set back; it knows of the beginning."""
    tracker = MLflowTracker(experiment_name, sqlite_uri, outbox_dir=tmp_path, worker="none", settings=QUICK)
    run = tracker.start_run("by two")
    run.log_metric("loss", 0.0, step=0)
    tracker.flush(0)
    assert tracker.outbox_path is not None
    directory = OutboxDirectory.open(tracker.outbox_path)
    with delivering(directory, sqlite_uri, QUICK) as counters:
        eventually(lambda: 2 == counters["delivered"], 60)
    shutil.copytree(directory.ledger, tmp_path / "before")
    run.log_metric("loss", 0.5, step=1)
    run.end()
    tracker.close(0)
    with delivering(directory, sqlite_uri, QUICK):
        eventually(lambda: [run.run_id] == directory.delivered_ids() and not directory.run_ids(), 60)
    shutil.rmtree(directory.ledger)
    (tmp_path / "before").rename(directory.ledger)
    with delivering(directory, sqlite_uri, QUICK) as counters:
        eventually(lambda: 1 == counters["runs_known_again"], 60)
    with contextlib.closing(Ledger.open(directory.ledger, read_only=True)) as ledger:
        [record] = ledger.records()
    assert ("done", True, 4) == (record.state, record.ended, record.delivered)
    with delivering(directory, sqlite_uri, dataclasses.replace(QUICK, retention=0)) as counters:
        eventually(lambda: not directory.delivered_ids(), 60)
    assert 0 == counters["delivered"]


def test_at_the_cap_it_gives_way(sqlite_uri: str, experiment_name: str, tmp_path: Path) -> None:
    """A program that begins with an outbox that is full of it logs as soon as MLflow was asked."""
    directory, _ = filed(tmp_path, sqlite_uri, experiment_name, 8)
    settings = dataclasses.replace(QUICK, sync_interval=0.05, outbox_bytes=used_bytes(directory) - 1000)
    with MLflowTracker(experiment_name, sqlite_uri, outbox_dir=tmp_path, worker="none", settings=settings) as tracker:
        assert not tracker.start_run("late").log_metric("loss", 0.5)
        with delivering(directory, sqlite_uri, settings):
            late = tracker.start_run("later")
            eventually(lambda: late.log_metric("loss", 0.5), 90)
            late.end()


@pytest.mark.parametrize("what", ["a run", "a point", "a file"])
def test_what_mlflow_lacks_is_kept_and_not_made_again(
    what: str, sqlite_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """Who deleted a run did not ask for it; ``replay --again`` sends it."""
    directory, ids = filed(tmp_path, sqlite_uri, experiment_name, 2)
    gone, _ = (run for run in runs(sqlite_uri, experiment_name))
    local = gone.data.tags["mlflow_outbox.run_id"]
    if what == "a file":
        (Path(gone.info.artifact_uri.removeprefix("file://")) / "notes.txt").unlink()
    else:
        with contextlib.closing(sqlite3.connect(sqlite_uri.removeprefix("sqlite:///"), timeout=60)) as base, base:
            name = gone.info.run_id
            if what == "a point":
                base.execute("DELETE FROM metrics WHERE run_uuid = ? AND step = 5", (name,))
            else:
                base.execute("DELETE FROM tags WHERE run_uuid = ? AND key = 'mlflow_outbox.run_id'", (name,))
    settings = dataclasses.replace(QUICK, retention=0, verify="full")
    with delivering(directory, sqlite_uri, settings) as counters:
        eventually(lambda: [local] == directory.delivered_ids(), 60)
        eventually(lambda: 1 == counters["runs_known_again"], 60)
    assert 2 == len(ids) == len(runs(sqlite_uri, experiment_name))
    assert 0 == counters["delivered"]
    with delivering(directory, sqlite_uri, QUICK) as counters:
        assert not directory.run_ids()
    assert 0 == counters["delivered"]


def test_a_store_that_is_gone_is_not_made_for_it(sqlite_uri: str, experiment_name: str, tmp_path: Path) -> None:
    """Nor is one asked that is away, again and again."""
    directory, ids = filed(tmp_path, sqlite_uri, experiment_name, 1)
    path = Path(sqlite_uri.removeprefix("sqlite:///"))
    path.rename(path.with_name("elsewhere"))
    with delivering(directory, sqlite_uri, QUICK) as counters:
        eventually(directory.ledger.is_dir, 60)
        assert not path.exists()
        path.with_name("elsewhere").rename(path)
        eventually(lambda: 1 == counters["runs_known_again"], 60)
    assert ids == directory.delivered_ids()


def test_what_fails_is_asked_for_again_later(
    experiment_name: str, sqlite_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that is away or refuses to be asked says nothing of a run; what is unforeseen ends with its run."""
    directory, ids = filed(tmp_path, sqlite_uri, experiment_name, 2)
    monkeypatch.setattr(recollection, "_AGAIN", 0.05)
    original = recollection.differences
    failures = [
        ZeroDivisionError("unforeseen"),
        SinkError("busy", kind="answer", status=503),
        SinkError("who are you", kind="answer", status=401),
    ]

    def failing(*given: Any, **named: Any) -> list[str]:
        if failures:
            raise failures.pop()
        return original(*given, **named)

    monkeypatch.setattr(recollection, "differences", failing)
    with delivering(directory, sqlite_uri, QUICK) as counters:
        eventually(lambda: 1 == counters["runs_known_again"], 60)
    assert ([], 1) == (failures, counters["worker_crashes"])
    with delivering(directory, sqlite_uri, QUICK) as counters:
        eventually(lambda: 1 == counters["runs_known_again"], 60)
    assert sorted(ids) == directory.delivered_ids()
