"""Runs that are sent side by side: what one of them meets is nothing to the others, and none is left behind."""

from __future__ import annotations

import dataclasses
import itertools
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from contents import QUICK, client, numbered, points, runs, the_run
from mlflow_outbox import MLflowTracker, Settings
from mlflow_outbox.counters import Counters
from mlflow_outbox.destination import resolve
from mlflow_outbox.errors import LedgerUnavailable
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox.spool.reader import RunReader
from mlflow_outbox.spool.window import Cursor, Window
from mlflow_outbox.testing import faults
from mlflow_outbox.testing.proxy import FaultProxy
from mlflow_outbox.testing.wire import Request
from mlflow_outbox_worker.courier import Courier, Turn
from mlflow_outbox_worker.delivery import Delivery
from mlflow_outbox_worker.ledger import Ledger
from mlflow_outbox_worker.records import RunRecord
from mlflow_outbox_worker.thread import ThreadWorker
from servers import MlflowServer, eventually
from workers import delivering


def offline(experiment: str, uri: str, root: Path, settings: Settings = QUICK) -> tuple[MLflowTracker, OutboxDirectory]:
    """A tracker that only writes, and its outbox."""
    tracker = MLflowTracker(experiment, uri, outbox_dir=root, worker="none", settings=settings)
    assert tracker.outbox_path is not None
    return tracker, OutboxDirectory.open(tracker.outbox_path)


def ended(server: MlflowServer, experiment: str) -> list[str]:
    """The names of the runs of which a server has the end, sorted."""
    return sorted(run.info.run_name for run in runs(server.url, experiment) if run.info.status == "FINISHED")


def hanging(proxy: FaultProxy) -> list[Request]:
    """The requests that got no answer."""
    return [request for request in proxy.requests if "accept_hang" == request.action]


def test_a_failure_beside_a_long_upload_does_not_hold_up_the_others_until_that_is_through(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """The server fails once while a file is on its way; whether it is there again is tried beside that."""
    settings = dataclasses.replace(QUICK, request_timeout=120.0)
    with FaultProxy(mlflow_server.url) as proxy:
        proxy.on("mlflow-artifacts", faults.accept_hang(), times=1)
        proxy.on("runs/log-batch", faults.status(503), times=1)
        tracker, directory = offline(experiment_name, proxy.url, tmp_path, settings)
        with tracker.start_run("large") as run:
            run.log_text("a checkpoint", "large.txt")
        for name in ("small", "smaller"):
            with tracker.start_run(name) as run:
                run.log_metric("loss", 0.0, step=0)
        tracker.close(0)

        with delivering(directory, proxy.url, settings) as counters:
            eventually(
                lambda: ["small", "smaller"] == ended(mlflow_server, experiment_name),
                60,
                "the others arrive during the upload",
            )
            assert [None] == [request.ended for request in hanging(proxy)]
            assert counters["retried"]
            proxy.down()


def test_a_try_that_is_a_long_upload_does_not_hold_up_the_others_until_that_is_through(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """The server was away, and the run that tries first whether it is there again has a large file to send."""
    settings = dataclasses.replace(QUICK, request_timeout=2.0)
    with FaultProxy(mlflow_server.url) as proxy:
        proxy.on("api/2.0/mlflow", faults.status(503), times=None)
        tracker, directory = offline(experiment_name, proxy.url, tmp_path, settings)
        with tracker.start_run("large") as run:
            large = tmp_path / "large.bin"
            large.write_bytes(bytes(30 << 20))  # for which it is waited two minutes
            run.log_artifact(large)

        with delivering(directory, proxy.url, settings) as counters:
            eventually(lambda: counters["retried"] > 0, 60, "the server is known to be away")
            proxy.clear()
            proxy.on("mlflow-artifacts", faults.accept_hang(), times=1)
            eventually(lambda: 1 == len(hanging(proxy)), 60, "the run that tries sends its file")
            for name in ("small", "smaller"):
                with tracker.start_run(name) as run:
                    run.log_metric("loss", 0.0, step=0)
            tracker.close(0)
            eventually(
                lambda: ["small", "smaller"] == ended(mlflow_server, experiment_name),
                60,
                "the others arrive during the upload",
            )
            assert [None] == [request.ended for request in hanging(proxy)]
            proxy.down()


def test_a_run_that_has_tried_and_goes_on_with_a_long_upload_holds_up_no_later_try(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """A server that has just come back fails once more: the next try is made beside the upload, not after it."""
    settings = dataclasses.replace(QUICK, request_timeout=120.0, batch_points=1)
    with FaultProxy(mlflow_server.url) as proxy:
        proxy.on("api/2.0/mlflow", faults.status(503), times=None)
        tracker, directory = offline(experiment_name, proxy.url, tmp_path, settings)
        with tracker.start_run("large") as run:
            run.log_metric("loss", 0.0, step=0)  # the window with which it tries
            run.log_text("a checkpoint", "large.txt")

        with delivering(directory, proxy.url, settings) as counters:
            eventually(lambda: counters["retried"] > 0, 60, "the server is known to be away")
            proxy.clear()
            proxy.on("mlflow-artifacts", faults.accept_hang(), times=1)
            eventually(lambda: 1 == len(hanging(proxy)), 60, "the run that has tried sends its file")
            proxy.on("runs/log-batch", faults.status(503), times=1)
            with tracker.start_run("small") as run:
                run.log_metric("loss", 0.0, step=0)
            tracker.close(0)
            eventually(
                lambda: ["small"] == ended(mlflow_server, experiment_name),
                60,
                "the other one arrives during the upload",
            )
            assert [None] == [request.ended for request in hanging(proxy)]
            proxy.down()


def test_one_run_at_a_time_tries_whether_the_server_is_there_again(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Each of them meets silence for as long as a request may take, and none of them is asked for beside another."""
    settings = dataclasses.replace(QUICK, request_timeout=1.0)
    with FaultProxy(mlflow_server.url) as proxy:
        tracker, directory = offline(experiment_name, proxy.url, tmp_path, settings)
        proxy.on("api/2.0/mlflow", faults.status(503), times=None)
        tracker.start_run("one").end()
        with delivering(directory, proxy.url, settings) as counters:
            eventually(lambda: counters["retried"] > 0, 60, "the server is known to be away")
            for name in ("two", "three", "four"):
                tracker.start_run(name).end()
            tracker.close(0)
            proxy.clear()
            proxy.on("api/2.0/mlflow", faults.accept_hang(), times=4)
            eventually(lambda: 4 == len(runs(mlflow_server.url, experiment_name)), 60)
        silent = hanging(proxy)
        assert 4 == len(silent)
        for before, after in itertools.pairwise(silent):
            assert after.arrived - before.arrived > 0.5, "it waited until the one before had given up"


def test_a_run_that_waits_for_a_person_is_tried_again_although_that_could_not_be_noted(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lane found the ledger locked when MLflow had refused the run; it arrives once it is restored."""
    tracker, directory = offline(experiment_name, mlflow_server.url, tmp_path)
    run = tracker.start_run("deleted")
    run.log_metric("loss", 0.0, step=0)
    with delivering(directory, mlflow_server.url, QUICK) as counters:
        eventually(lambda: counters["delivered"] == 2, 60)
    remote = the_run(mlflow_server.url, experiment_name).info.run_id
    with client(mlflow_server.url) as api:
        api.delete_run(remote)
    run.log_metric("loss", 0.5, step=1)
    run.end()
    tracker.close(0)
    commit, refused = Ledger.commit, list[str]()

    def locked(self: Ledger, record: RunRecord, **given: Any) -> None:
        if record.state == "parked" and len(refused) < 2:
            refused.append(record.run_id)
            msg = "database is locked"
            raise LedgerUnavailable(msg)
        commit(self, record, **given)

    monkeypatch.setattr(Ledger, "commit", locked)
    with delivering(directory, mlflow_server.url, QUICK) as counters:
        eventually(lambda: 2 == len(refused), 60, "it is tried again, and refused again")
        with client(mlflow_server.url) as api:
            api.restore_run(remote)
        eventually(lambda: numbered(2) == points(mlflow_server.url, remote, "loss"), 60, "it is delivered")
    assert 2 == counters["ledger_errors"]


def test_what_is_logged_to_a_run_that_somebody_deleted_is_looked_through_once_for_its_restoration(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried again for as long as it is deleted, and a program may log on for days meanwhile."""
    tracker, directory = offline(experiment_name, mlflow_server.url, tmp_path)
    run = tracker.start_run("deleted")
    run.log_metric("loss", 0.0, step=0)
    window, read = RunReader.window, list[int]()

    def noted(self: RunReader, cursors: Mapping[str, Cursor], **given: Any) -> Window:
        found = window(self, cursors, **given)
        if 100_000 == given.get("items"):
            read.append(len(found.events))
        return found

    with delivering(directory, mlflow_server.url, QUICK) as counters:
        eventually(lambda: counters["delivered"] == 2, 60)
        with client(mlflow_server.url) as api:
            api.delete_run(the_run(mlflow_server.url, experiment_name).info.run_id)
        monkeypatch.setattr(RunReader, "window", noted)
        for step in range(1, 101):
            run.log_metric("loss", step / 2, step=step)
        eventually(lambda: counters["parked"] > 5, 60)
        assert 100 == sum(read)
    tracker.close(0)


def test_a_lane_that_comes_back_after_it_was_given_up_gives_back_nothing_of_its_successor_s(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a third one would begin with the run while the second is at it."""
    settings = dataclasses.replace(QUICK, request_timeout=1.0)
    tracker, directory = offline(experiment_name, mlflow_server.url, tmp_path, settings)
    with tracker.start_run("run") as run:
        run.log_metric("loss", 0.0, step=0)
    tracker.close(0)
    begun, going, turn = list[str](), [threading.Event(), threading.Event()], Courier.turn

    def held(self: Courier, run_id: str, **given: Any) -> Turn:
        begun.append(threading.current_thread().name)
        if len(begun) <= len(going):
            assert going[len(begun) - 1].wait(120)
        return turn(self, run_id, **given)

    def are_there() -> set[str]:
        return {thread.name for thread in threading.enumerate()}

    monkeypatch.setattr(Courier, "turn", held)
    counters = Counters()
    delivery = Delivery(directory, resolve(mlflow_server.url), settings, counters, kind="thread")
    worker = ThreadWorker(lambda: delivery, counters)
    worker.start()
    try:
        eventually(lambda: 1 == len(begun), 60)
        os.unlink(directory.lock)
        eventually(lambda: 2 == len(begun), 60, "another lane has the run, since the lease was lost")
        assert (1, 1) == (counters["leases_lost"], counters["lanes_abandoned"])
        going[0].set()
        eventually(lambda: begun[0] not in are_there(), 60, "the first comes back, to a ledger that is closed")
        assert 1 == delivery._schedule.busy()
        assert 2 == len(begun)
        going[1].set()
        eventually(lambda: 3 == counters["delivered"], 60)
    finally:
        for event in going:
            event.set()
        worker.stop(60)
    assert numbered(1) == points(mlflow_server.url, the_run(mlflow_server.url, experiment_name).info.run_id, "loss")
