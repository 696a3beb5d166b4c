"""What a signal handler raises reaches the program also while a call through ``outbox+`` asks the server or copies."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlflow_outbox import delivery
from mlflow_outbox.spool import snapshot
from mlflow_outbox.testing import faults
from mlflow_outbox.testing.proxy import FaultProxy
from plugin_world import deliver, store, tracking
from servers import MlflowServer


class Limit(Exception):
    """A program's own time limit."""


@contextlib.contextmanager
def limited(seconds: float, kind: type[Exception]) -> Iterator[None]:
    """Raise in the block when time is up, as a program does that limits a step of its own."""

    def handler(number: int, frame: object) -> None:
        raise kind

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", [TimeoutError, Limit])
def test_a_time_limit_ends_the_wait_for_a_server_that_hangs(
    kind: type[Exception], mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """It is not taken for the server's silence: the next call asks it, and gets its id."""
    with FaultProxy(mlflow_server.url) as proxy:
        uri = f"outbox+{proxy.url}"
        with tracking(uri, tmp_path, create_timeout=30) as mlflow:
            mlflow.set_experiment(experiment_name)
            proxy.on("runs/create", faults.accept_hang(), times=1)
            with limited(0.5, kind), pytest.raises(kind):
                mlflow.start_run()
            assert not store(uri).server.is_away()
            with mlflow.start_run() as run:
                mlflow.log_metric("m", 1.0)
            deliver(uri)
            assert {"m": 1.0} == mlflow.get_run(run.info.run_id).data.metrics


@pytest.mark.parametrize("kind", [TimeoutError, Limit])
def test_a_time_limit_ends_the_copying_of_a_file(
    kind: type[Exception], mlflow_server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not taken for a file that cannot be read; logged again, the file is there."""
    uri, folder = f"outbox+{mlflow_server.url}", tmp_path / "files"
    folder.mkdir()

    def interrupt(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGALRM)

    (folder / "a.txt").write_text("a")
    with tracking(uri, tmp_path / "outbox") as mlflow, mlflow.start_run() as run:
        for call in (lambda: mlflow.log_artifact(folder / "a.txt"), lambda: mlflow.log_artifacts(folder)):
            with monkeypatch.context() as patch, limited(60, kind), pytest.raises(kind):
                patch.setattr(snapshot.SnapshotStore, "add_file", interrupt)
                call()
        mlflow.log_artifacts(folder)
        deliver(uri)
        assert ["a.txt"] == [file.path for file in mlflow.artifacts.list_artifacts(run_id=run.info.run_id)]


def test_a_signal_handler_that_asks_while_the_store_is_opened_does_not_wait_for_itself(
    mlflow_server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on without the server, which is not taken for one that is away."""
    uri = f"outbox+{mlflow_server.url}"
    with tracking(uri, tmp_path):
        server, open_store, heard = store(uri).server, delivery.open_store, list[bool]()

        def interrupted(*given: Any) -> Any:
            signal.raise_signal(signal.SIGUSR1)
            return open_store(*given)

        monkeypatch.setattr(delivery, "open_store", interrupted)
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            signal.signal(signal.SIGUSR1, lambda *_: heard.append(server.answers()))
            os._exit(7 if server.answers() and heard == [False] else 1)
    assert 7 == os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
