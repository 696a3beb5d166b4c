"""Programs that hand their runs to processes of ``multiprocessing``, and log nothing themselves."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import pytest

from contents import client
from plugin_world import NOWHERE, the_runs
from servers import MlflowServer, eventually
from test_plugin_processes import program


def _pooled(experiment: str, body: str) -> str:
    """Return a program of which four tasks log fifty points each, in two processes that are forked."""
    return textwrap.dedent(f"""
        import concurrent.futures, multiprocessing

        def task(number):
            mlflow.set_experiment({experiment!r})
            with mlflow.start_run(run_name=f"task {{number}}"):
                for step in range(50):
                    mlflow.log_metric("m", step, step=step)

        forked = multiprocessing.get_context("fork")
        """) + textwrap.dedent(body)


def _make(server: MlflowServer, experiment: str) -> None:
    """Make an experiment before several processes want it: of two, MLflow lets one log to the default one."""
    with client(server.url) as api:
        api.create_experiment(experiment)


def _held(server: MlflowServer, experiment: str) -> list[tuple[str, str, Any]]:
    return sorted(
        (run.info.run_name, run.info.status, run.data.metrics.get("m")) for run in the_runs(server.url, experiment)
    )


_ALL = [(f"task {number}", "FINISHED", 49.0) for number in range(4)]


def test_what_a_pool_has_logged_arrives_although_its_processes_are_ended_by_a_signal(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """As a pool does that is left: its processes are gone before they have delivered, and their program has no part."""
    body = """
        with forked.Pool(2) as pool:
            pool.map(task, range(4))
    """
    _make(mlflow_server, experiment_name)
    child = program(tmp_path, _pooled(experiment_name, body), MLFLOW_TRACKING_URI=f"outbox+{mlflow_server.url}")
    output, _ = child.communicate(timeout=250)
    assert 0 == child.returncode, output
    # By a process that imports MLflow, and stands back for all else on this machine.
    eventually(lambda: _ALL == _held(mlflow_server, experiment_name), 200, "all has arrived")


def test_a_process_that_ends_without_handlers_of_its_exit_waits_for_delivery(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """So that all is there when the program has ended, as it is without an outbox."""
    body = """
        with concurrent.futures.ProcessPoolExecutor(2, mp_context=forked) as pool:
            list(pool.map(task, range(4)))
    """
    uri = f"outbox+{mlflow_server.url}"
    text = _pooled(experiment_name, body)
    _make(mlflow_server, experiment_name)
    child = program(tmp_path, text, MLFLOW_TRACKING_URI=uri, MLFLOW_OUTBOX_EXIT_TIMEOUT="60")
    output, _ = child.communicate(timeout=250)
    assert 0 == child.returncode, output
    assert _ALL == _held(mlflow_server, experiment_name)


def test_a_process_that_ends_without_handlers_of_its_exit_says_what_is_left(tmp_path: Path) -> None:
    """With the command that sends it."""
    body = """
        child = forked.Process(target=task, args=(0,))
        child.start()
        child.join()
    """
    settings = {"MLFLOW_OUTBOX_EXIT_TIMEOUT": "0.1", "MLFLOW_OUTBOX_LINGER": "0"}
    child = program(tmp_path, _pooled("away", body), MLFLOW_TRACKING_URI=NOWHERE, **settings)
    output, _ = child.communicate(timeout=250)
    assert 0 == child.returncode, output
    assert "events wait in " in output
    assert "nothing is lost. To send them: mlflow-outbox flush" in output


def test_a_process_that_has_forgotten_the_handlers_of_its_program_says_what_is_left(tmp_path: Path) -> None:
    """As Python 3.13 begins and ends one that was forked; the program has imported all that registers handlers."""
    body = """
        import atexit, threading
        from multiprocessing import popen_fork, util

        def newer(number):
            atexit._clear()
            atexit.register(util._exit_function)
            task(number)
            threading._shutdown()
            atexit._run_exitfuncs()

        does_so = hasattr(popen_fork, "atexit")
        popen_fork.atexit = atexit
        child = forked.Process(target=task if does_so else newer, args=(0,))
        child.start()
        child.join()
    """
    settings = {"MLFLOW_OUTBOX_EXIT_TIMEOUT": "0.1", "MLFLOW_OUTBOX_LINGER": "0"}
    child = program(tmp_path, _pooled("away", body), MLFLOW_TRACKING_URI=NOWHERE, **settings)
    output, _ = child.communicate(timeout=60)
    assert 0 == child.returncode, output
    assert 1 == output.count("nothing is lost. To send them: mlflow-outbox flush"), output


@pytest.mark.parametrize("method", ["spawn", "loky"])
def test_only_a_process_of_which_handlers_of_its_exit_are_run_is_left_to_them(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would wait twice."""
    import multiprocessing

    from mlflow_outbox import pool

    monkeypatch.setattr(multiprocessing, "get_start_method", lambda *, allow_none: method)
    assert pool._has_handlers()
