"""What ``outbox+`` URIs cost that are not used: nothing, after a while, until they are used again."""

from __future__ import annotations

import multiprocessing
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from contents import client
from mlflow_outbox.plugin import rest, traces
from mlflow_outbox.plugin.spans import Spans
from mlflow_outbox.testing.proxy import FaultProxy
from plugin_world import deliver, store, tracking
from servers import MlflowServer, eventually
from spools import open_files

#: The threads that there were when the test began.
_earlier: set[threading.Thread] = set()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Look at the stores often; begin and end with the thread that does so ended."""
    monkeypatch.setattr(rest, "_LOOK", 0.02)
    monkeypatch.setattr(rest, "_watched", set())
    eventually(lambda: rest._thread is None, 60, "the stores of earlier tests of this process are let go")
    monkeypatch.setattr(sys.modules[__name__], "_earlier", set(threading.enumerate()))
    yield
    eventually(lambda: rest._thread is None, message="nobody is left to be put to rest")


def threads(*names: str) -> list[str]:
    """Return this package's threads whose names begin with one of those given, earlier tests' aside."""
    return [one.name for one in threading.enumerate() if one.name.startswith(names) and one not in _earlier]


def test_a_uri_that_is_not_used_has_no_thread_and_no_open_file_until_the_next_call(
    sqlite_uri: str, tmp_path: Path
) -> None:
    """Worker, syncing and connections end in the middle of a run; the run goes on as if nothing had happened."""
    uri = f"outbox+{sqlite_uri}"
    with tracking(uri, tmp_path / "outbox", idle_timeout=0) as mlflow:
        with mlflow.start_run() as run:
            for step in range(3):
                mlflow.log_metric("m", float(step), step=step)
                eventually(lambda: not threads("mlflow-outbox"), message="it rests")
                if Path("/proc/self/fd").exists():
                    assert [] == open_files(tmp_path)
        deliver(uri)
        assert 0 == store(uri).outbox.counters["workers_replaced"]
    with client(sqlite_uri) as api:
        assert [0.0, 1.0, 2.0] == [point.value for point in api.get_metric_history(run.info.run_id, "m")]
        assert "FINISHED" == api.get_run(run.info.run_id).info.status


def test_of_many_uris_only_the_last_few_stay_awake(empty_database: Callable[[Path], Path], tmp_path: Path) -> None:
    """A database for each test of a suite: threads and files do not add up; each database has its run."""
    plain = [f"sqlite:///{empty_database(tmp_path / f'{number}.db')}" for number in range(rest._AWAKE + 4)]
    with tracking(f"outbox+{plain[0]}", tmp_path / "outbox", idle_timeout=3600) as mlflow:
        stores = [store(f"outbox+{uri}") for uri in plain]
        for uri in plain:
            mlflow.set_tracking_uri(f"outbox+{uri}")
            with mlflow.start_run(experiment_id="0"):
                mlflow.log_metric("m", 1.0)
        eventually(lambda: all(held.pulse.rests for held in stores[:4]), message="the first ones rest")
        eventually(lambda: len(threads("mlflow-outbox-worker")) <= rest._AWAKE, message="their threads end")
        for held in stores:
            assert held.outbox.flush(60)
            held.outbox.close(0)
            held.pulse.rests = True
    for uri in plain:
        with client(uri) as api:
            assert [{"m": 1.0}] == [run.data.metrics for run in api.search_runs(["0"])]


def test_what_cannot_be_delivered_keeps_its_worker(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """However long the server is away, it is tried; once everything has arrived, there is rest."""
    with FaultProxy(mlflow_server.url) as proxy:
        uri = f"outbox+{proxy.url}"
        with tracking(uri, tmp_path, idle_timeout=0) as mlflow:
            mlflow.set_experiment(experiment_name)
            proxy.down()
            with mlflow.start_run():
                mlflow.log_metric("m", 1.0)
            looks = store(uri).pulse
            eventually(lambda: looks._wait > 8, message="it could not be put to rest a few times")
            assert ["mlflow-outbox-worker"] == threads("mlflow-outbox-worker")
            proxy.up()
            looks.beat()
            eventually(lambda: looks.rests, 60, message="it rests")
            eventually(lambda: not threads("mlflow-outbox-worker"), message="its thread ends")


def test_what_is_logged_in_the_moment_of_going_to_rest_arrives(sqlite_uri: str, tmp_path: Path) -> None:
    """A store that is put to rest again and again, by another thread, while it is logged to."""
    uri, over = f"outbox+{sqlite_uri}", threading.Event()
    with tracking(uri, tmp_path / "outbox", idle_timeout=3600) as mlflow:
        held = store(uri)

        def disturb() -> None:
            while not over.is_set():
                held.rest(1.0)

        thread = threading.Thread(target=disturb)
        with mlflow.start_run() as run:
            thread.start()
            for step in range(400):
                mlflow.log_metric("m", float(step), step=step)
                over.wait(0.002)
            over.set()
            thread.join(60)
            # Nobody is told again: whoever logged last, or was put to rest last, has seen to it.
            api = mlflow.MlflowClient(sqlite_uri)
            eventually(lambda: 400 == len(api.get_metric_history(run.info.run_id, "m")), message="all points arrive")
        deliver(uri)
        held.pulse.rests = True


def test_a_store_is_not_put_to_rest_before_it_is_all_there(
    sqlite_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A database may take long to open; the thread that puts stores to rest would meet half of one."""
    watched: list[int] = []

    def noted(outbox: Any) -> Spans:
        watched.append(len(rest._watched))
        return Spans(outbox)

    monkeypatch.setattr(traces, "Spans", noted)
    uri = f"outbox+{sqlite_uri}"
    with tracking(uri, tmp_path / "outbox", idle_timeout=0):
        assert store(uri).pulse in rest._watched
        eventually(lambda: not threads("mlflow-outbox"), message="it rests")
    assert [0] == watched


def _log_and_rest(uri: str, run_id: str) -> None:
    import mlflow

    looks = store(uri).pulse
    looks.timeout = float
    mlflow.MlflowClient().log_metric(run_id, "child", 1.0)
    eventually(lambda: looks.rests, message="it rests")
    eventually(lambda: not threads("mlflow-outbox"), message="its threads end")


def test_a_child_that_is_forked_from_a_program_in_the_middle_of_its_work_rests_too(
    sqlite_uri: str, tmp_path: Path
) -> None:
    """The thread that puts stores to rest is the parent's; one of its own begins when the child uses a store."""
    uri = f"outbox+{sqlite_uri}"
    with tracking(uri, tmp_path / "outbox", idle_timeout=3600) as mlflow:
        with mlflow.start_run() as run:
            mlflow.log_metric("parent", 1.0)
            assert not store(uri).pulse.rests
            context = multiprocessing.get_context("fork")
            child = context.Process(target=_log_and_rest, args=(uri, run.info.run_id))
            child.start()
            child.join(150)
            code = child.exitcode
            if code is None:
                child.kill()
            assert 0 == code
            assert not store(uri).pulse.rests
        deliver(uri)
        store(uri).pulse.rests = True
    with client(sqlite_uri) as api:
        assert {"parent": 1.0, "child": 1.0} == api.get_run(run.info.run_id).data.metrics


class _Nobody:
    """A store that is gone as soon as it is made."""


class _Met(rest.Pulse):
    """Of a store in whose look another store is made."""

    def is_gone(self) -> bool:
        """Return whether there is no store any more."""
        rest._watched.add(rest.Pulse(cast("Any", _Nobody())))
        return super().is_gone()


def test_a_store_that_is_made_during_a_look_ends_no_look() -> None:
    """The thread that looks would be gone for good, and nothing be put to rest any more."""
    _Met(cast("Any", _Nobody())).begin()
    eventually(lambda: not rest._watched and rest._thread is None, message="all that are gone are let go")
