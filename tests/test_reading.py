"""A session reads its own writes, with MLflow up, down, and down from the start."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from commands import NOBODY, offline, withhold, withhold_runs
from contents import QUICK, the_run
from mlflow_outbox import MLflowTracker, TrackingUnavailable
from mlflow_outbox.spool import disk
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox.spool.reader import RunReader
from mlflow_outbox.testing.proxy import FaultProxy
from mlflow_outbox_worker import forking, mlflow_sink, reading
from servers import MlflowServer, eventually
from wires import silent_host


def summary(runs: list[dict[str, Any]]) -> list[tuple[str, dict[str, float], dict[str, str], str]]:
    """Return what both sources must agree on."""
    return [(run["run_name"], run["metrics"], run["params"], run["status"]) for run in runs]


def log_three(tracker: MLflowTracker) -> None:
    """Log three runs, a second apart."""
    for number, status in enumerate(["FINISHED", "FAILED", "FINISHED"]):
        run = tracker.start_run(f"run{number}", start_time=1_700_000_000_000 + 1000 * number)
        run.log_metrics({"rmse": 3.0 - number, "f1": number / 10}, step=1)
        run.log_param("depth", number)
        run.end(status)


EXPECTED = [
    ("run2", {"rmse": 1.0, "f1": 0.2}, {"depth": "2"}, "FINISHED"),
    ("run1", {"rmse": 2.0, "f1": 0.1}, {"depth": "1"}, "FAILED"),
    ("run0", {"rmse": 3.0, "f1": 0.0}, {"depth": "0"}, "FINISHED"),
]


@pytest.mark.parametrize("store", ["server", "sqlite", "file"])
def test_a_run_is_called_what_it_was_called_last(
    store: str, mlflow_server: MlflowServer, sqlite_uri: str, file_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """By its tag, or by the name that it is gone on with; before and after that has arrived."""
    uri = {"server": mlflow_server.url, "sqlite": sqlite_uri, "file": file_uri}[store]
    settings = dataclasses.replace(QUICK, worker="none")
    tracker = MLflowTracker(experiment_name, uri, outbox_dir=tmp_path / "outbox", settings=settings)
    run = tracker.start_run("first", tags={"mlflow.runName": "of a copied tag"})
    names = [("first", lambda: None), ("tagged", lambda: run.set_tag("mlflow.runName", "tagged"))]
    names += [("renamed", lambda: tracker.start_run("renamed", run_id=run.run_id).end())]
    for name, call in names:
        call()
        (entry,) = tracker.get_all_runs()
        assert name == entry["run_name"]
        assert "mlflow_outbox.run_id" not in entry["tags"]
        with MLflowTracker(experiment_name, uri, outbox_dir=tmp_path / "outbox", settings=QUICK) as other:
            assert other.flush(60)
        (entry,) = tracker.get_all_runs()
        assert (name, name) == (entry["run_name"], the_run(uri, experiment_name).info.run_name)
        assert "mlflow_outbox.run_id" not in entry["tags"]


@pytest.mark.parametrize("away", [False, True], ids=["up", "down"])
def test_a_run_that_the_disk_does_not_give_keeps_nobody_from_the_others(
    away: bool, sqlite_uri: str, experiment_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another experiment, perhaps: nothing is raised into a program that asks for its best run."""
    uri = NOBODY if away else sqlite_uri
    withheld, *_ = offline(tmp_path, uri, experiment="another")
    tracker = MLflowTracker(experiment_name, uri, outbox_dir=tmp_path, worker="none", settings=QUICK)
    log_three(tracker)
    monkeypatch.setattr(disk, "_OWN_FRAMES", disk._OWN_FRAMES | {"commands"})  # as if the disk had answered
    withhold(monkeypatch, withheld)
    assert EXPECTED == summary(tracker.get_all_runs())
    best = tracker.get_best_run("f1", ascending=False)
    assert best is not None
    assert ("run2", 1 < tracker.counters["runs_not_read"]) == (best["run_name"], True)


def test_where_the_disk_does_not_list_runs_the_answer_is_mlflows(
    sqlite_uri: str, experiment_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a file server is gone: a session is not ended for it when it asks for its best run."""
    with MLflowTracker(experiment_name, sqlite_uri, outbox_dir=tmp_path / "box", settings=QUICK) as tracker:
        log_three(tracker)
        assert tracker.flush(60)
    assert tracker.outbox_path is not None
    monkeypatch.setattr(disk, "_OWN_FRAMES", disk._OWN_FRAMES | {"commands"})  # as if the disk had answered
    withhold_runs(monkeypatch, tracker.outbox_path)
    assert EXPECTED == summary(tracker.get_all_runs())
    best = tracker.get_best_run("f1", ascending=False)
    assert best is not None
    assert ("run2", 2) == (best["run_name"], tracker.counters["runs_not_read"])


@pytest.mark.parametrize("away", [False, True], ids=["up", "down"])
def test_who_asks_for_the_runs_of_an_experiment_waits_for_no_other_to_be_read(
    away: bool, sqlite_uri: str, experiment_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs share an outbox, in which all of their runs wait while the server is away: each asks for its own."""
    uri = NOBODY if away else sqlite_uri
    offline(tmp_path, uri, runs=2, experiment="another")
    tracker = MLflowTracker(experiment_name, uri, outbox_dir=tmp_path, worker="none", settings=QUICK)
    log_three(tracker)
    read: list[str] = []
    window = RunReader.window

    def counted(self: RunReader, *args: Any, **kwargs: Any) -> Any:
        read.append(self.paths[0].name)
        return window(self, *args, **kwargs)

    monkeypatch.setattr(RunReader, "window", counted)
    assert EXPECTED == summary(tracker.get_all_runs())
    assert 3 == len(read) == len(set(read))


@pytest.mark.compatibility
@pytest.mark.parametrize("store", ["server", "sqlite", "file"])
def test_up_the_answer_is_mlflows(
    store: str, mlflow_server: MlflowServer, sqlite_uri: str, file_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """Newest first, with MLflow's ids, from each kind of store."""
    uri = {"server": mlflow_server.url, "sqlite": sqlite_uri, "file": file_uri}[store]
    with MLflowTracker(experiment_name, uri, outbox_dir=tmp_path / "outbox", settings=QUICK) as tracker:
        log_three(tracker)
        assert tracker.flush(60)
        runs = tracker.get_all_runs()
        assert EXPECTED == summary(runs)
        assert {"mlflow"} == {run["source"] for run in runs}
        best, worst = tracker.get_best_run("rmse"), tracker.get_best_run("rmse", ascending=False)
        assert best is not None
        assert worst is not None
        assert ("run2", "run0") == (best["run_name"], worst["run_name"])
        assert tracker.get_best_run("no such metric") is None
        held = {run.info.run_id for run in tracker.client.search_runs([tracker.experiment_id])}
        assert held == {run["run_id"] for run in runs}


def test_down_from_the_start_the_answer_is_local(experiment_name: str, tmp_path: Path) -> None:
    """Everything logged can be read without MLflow; what only MLflow knows says so."""
    tracker = MLflowTracker(experiment_name, "http://127.0.0.1:9", outbox_dir=tmp_path, worker="none", settings=QUICK)
    log_three(tracker)
    runs = tracker.get_all_runs()
    assert EXPECTED == summary(runs)
    assert {"outbox"} == {run["source"] for run in runs}
    best = tracker.get_best_run("f1", ascending=False)
    assert best is not None
    assert "run2" == best["run_name"]
    with pytest.raises(TrackingUnavailable, match=r"http://127\.0\.0\.1:9"):
        _ = tracker.experiment_id
    with pytest.raises(TrackingUnavailable, match=r"http://127.0.0.1:9"):
        _ = tracker.client


@pytest.mark.parametrize(
    "error",
    [ModuleNotFoundError("No module named 'mlflow'"), TypeError("Descriptors cannot be created directly.")],
    ids=["it is not there", "a library that does not fit"],
)
def test_where_mlflow_cannot_be_imported_the_answer_is_local(
    error: Exception, experiment_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where it is down: a session is not ended for it when it asks for its best run."""
    tracker = MLflowTracker(experiment_name, NOBODY, outbox_dir=tmp_path, worker="none", settings=QUICK)
    log_three(tracker)

    def fail() -> None:
        raise error

    monkeypatch.setattr(reading, "_sinks", {})
    monkeypatch.setattr(mlflow_sink, "_import_mlflow", fail)
    assert EXPECTED == summary(tracker.get_all_runs())
    best = tracker.get_best_run("f1", ascending=False)
    assert best is not None
    assert ("run2", "outbox") == (best["run_name"], best["source"])
    with pytest.raises(TrackingUnavailable, match="cannot be imported"):
        _ = tracker.experiment_id
    with pytest.raises(TrackingUnavailable, match="cannot be imported"):
        _ = tracker.client


def test_down_after_delivery_the_local_view_still_knows_everything(
    own_mlflow_server: Callable[..., MlflowServer], experiment_name: str, tmp_path: Path
) -> None:
    """What has been delivered and filed can be read while the server is away, with MLflow's ids."""
    server = own_mlflow_server()
    tracker = MLflowTracker(experiment_name, server.url, outbox_dir=tmp_path, settings=QUICK)
    log_three(tracker)
    assert tracker.flush(60)
    ids = [run["run_id"] for run in tracker.get_all_runs()]
    server.kill()
    runs = tracker.get_all_runs()
    assert EXPECTED == summary(runs)
    assert ids == [run["run_id"] for run in runs]
    tracker.close(0.1)


def test_up_no_run_is_read_that_is_filed_as_delivered(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a week are kept, and the server has them: an answer must not take longer with each run of a session."""
    with MLflowTracker(experiment_name, mlflow_server.url, outbox_dir=tmp_path, settings=QUICK) as tracker:
        log_three(tracker)
        assert tracker.flush(60)
        assert tracker.outbox_path is not None
        directory = OutboxDirectory.open(tracker.outbox_path)
        eventually(lambda: 3 == len(directory.delivered_ids()), 60)
        read: list[str] = []
        original = reading.Reading._local_run

        def noted(self: reading.Reading, run_id: str, *more: Any) -> Any:
            read.append(run_id)
            return original(self, run_id, *more)

        monkeypatch.setattr(reading.Reading, "_local_run", noted)
        assert EXPECTED == summary(tracker.get_all_runs())
        assert [] == read


def test_up_again_what_has_not_arrived_is_folded_in(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """A run that MLflow has in part is shown whole, and says where it comes from."""
    with FaultProxy(mlflow_server.url) as proxy:
        tracker = MLflowTracker(experiment_name, proxy.url, outbox_dir=tmp_path, settings=QUICK)
        run = tracker.start_run("growing")
        run.log_metric("loss", 2.0, step=1)
        assert tracker.flush(60)
        tracker.close()
        offline = MLflowTracker(experiment_name, proxy.url, outbox_dir=tmp_path, worker="none", settings=QUICK)
        again = offline.start_run(run_id=run.run_id)
        again.log_metric("loss", 1.0, step=2)
        again.log_param("late", "yes")
        shown = offline.get_all_runs()
        assert [("growing", {"loss": 1.0}, {"late": "yes"}, "RUNNING")] == summary(shown)
        assert ["mlflow+outbox"] == [run["source"] for run in shown]
        assert the_run(mlflow_server.url, experiment_name).info.run_id == shown[0]["run_id"]
        assert {"loss": 2.0} == the_run(mlflow_server.url, experiment_name).data.metrics


def test_a_run_of_mlflow_is_gone_on_with_by_its_id(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """start_run(run_id=...) takes MLflow's id of a run of this outbox, and of a run that MLflow alone knows."""
    from contents import client, points

    uri = mlflow_server.url
    with client(uri) as mlflow:
        foreign = mlflow.create_run(mlflow.create_experiment(experiment_name)).info.run_id
    with MLflowTracker(experiment_name, uri, outbox_dir=tmp_path, settings=QUICK) as tracker:
        tracker.start_run(run_id=foreign).log_metric("loss", 1.0, step=1)
        own = tracker.start_run("own")
        own.log_metric("loss", 1.0, step=1)
        assert tracker.flush(60)
        remote = next(run["run_id"] for run in tracker.get_all_runs() if run["run_name"] == "own")
        resumed = tracker.start_run(run_id=remote)
        assert own.run_id == resumed.run_id
        resumed.log_metric("loss", 2.0, step=2)
        assert tracker.flush(60)
    assert {(1, 1.0): 1} == points(uri, foreign, "loss")
    assert {(1, 1.0): 1, (2, 2.0): 1} == points(uri, remote, "loss")


def test_a_fork_while_another_thread_opens_the_store_does_not_hang_the_child(
    sqlite_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening a store for the first answer takes seconds, and a training program forks its data loaders meanwhile."""
    tracker = MLflowTracker("e", sqlite_uri, outbox_dir=tmp_path, worker="none", settings=QUICK)
    with tracker.start_run("r") as run:
        run.log_metric("loss", 0.5, step=0)
    opening, may_go = threading.Event(), threading.Event()
    open_sink = reading.open_sink

    def slowly(*given: Any, **options: Any) -> Any:
        opening.set()
        assert may_go.wait(60)
        return open_sink(*given, **options)

    monkeypatch.setattr(reading, "open_sink", slowly)
    asking = threading.Thread(target=tracker.get_all_runs)
    asking.start()
    assert opening.wait(60)
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        reading.open_sink = open_sink  # type: ignore[attr-defined, unused-ignore]
        os._exit(7 if tracker.get_best_run("loss") is not None else 1)
    may_go.set()
    asking.join()
    assert 7 == os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("store", ["sqlite", "file"])
def test_a_fork_while_another_thread_asks_a_slow_store_does_not_hang_the_child(
    store: str, sqlite_uri: str, file_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fork waits for a second at most: not for a database that is locked, or a file store with long histories."""
    uri = {"sqlite": sqlite_uri, "file": file_uri}[store]
    tracker = MLflowTracker("e", uri, outbox_dir=tmp_path / "box", worker="none", settings=QUICK)
    with tracker.start_run("r") as run:
        run.log_metric("loss", 0.5, step=0)
    sink: Any = tracker._reading()._sink()
    asking, may_go = threading.Event(), threading.Event()
    find = sink._store.get_experiment_by_name

    def slowly(name: str) -> Any:
        asking.set()
        assert may_go.wait(60)
        return find(name)

    monkeypatch.setattr(sink._store, "get_experiment_by_name", slowly)
    monkeypatch.setattr(forking, "STORE_PATIENCE", 0.1)
    other = threading.Thread(target=tracker.get_all_runs)
    other.start()
    assert asking.wait(60)
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        sink._store.get_experiment_by_name = find
        os._exit(7 if tracker.get_best_run("loss") is not None else 1)
    may_go.set()
    other.join()
    assert 7 == os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_database_that_is_silent_is_waited_for_no_longer_than_any_server(
    experiment_name: str, tmp_path: Path
) -> None:
    """Its driver waits for as long as the connection lasts; meanwhile the answer is on disk, or there is none."""
    pytest.importorskip("psycopg2")
    settings = dataclasses.replace(QUICK, request_timeout=1.0, exit_timeout=0.0)
    with silent_host() as port:
        uri = f"postgresql://u@127.0.0.1:{port}/db"
        tracker = MLflowTracker(experiment_name, uri, outbox_dir=tmp_path, worker="none", settings=settings)
        log_three(tracker)
        answers: list[Any] = []

        def program() -> None:
            answers.append(summary(tracker.get_all_runs()))
            for name in ("experiment_id", "client"):
                try:
                    answers.append(getattr(tracker, name))
                except TrackingUnavailable as error:
                    answers.append("has not answered in time" in str(error))

        threading.Thread(target=program, daemon=True).start()
        eventually(lambda: 3 == len(answers), 120, "the program goes on")
        assert [EXPECTED, True, True] == answers


def test_a_signal_handler_that_asks_while_the_store_is_opened_does_not_wait_for_itself(
    sqlite_uri: str, experiment_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That takes seconds, in which a program may be told to end, and say what its best run was."""
    tracker = MLflowTracker(experiment_name, sqlite_uri, outbox_dir=tmp_path / "box", worker="none", settings=QUICK)
    log_three(tracker)
    heard: list[Any] = []
    open_sink = reading.open_sink

    def interrupted(*given: Any, **options: Any) -> Any:
        signal.raise_signal(signal.SIGUSR1)
        return open_sink(*given, **options)

    monkeypatch.setattr(reading, "open_sink", interrupted)
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        signal.signal(signal.SIGUSR1, lambda *_: heard.append(summary(tracker.get_all_runs())))
        os._exit(7 if summary(tracker.get_all_runs()) == EXPECTED and heard == [EXPECTED] else 1)
    assert 7 == os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
