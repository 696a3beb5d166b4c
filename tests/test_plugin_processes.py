"""The plugin in children of a program, and in programs that are killed or end in the middle of a run."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from contents import client
from plugin_world import away, deliver, picture, store, the_runs, tracking
from servers import MlflowServer


def _log_in_child(run_id: str, number: int) -> None:
    import mlflow

    mlflow.MlflowClient().log_metric(run_id, f"child-{number}", float(number))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_child_processes_log_to_the_run(
    method: str, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Each writes its own segments; nothing of a child that ends at once is lost."""
    uri = f"outbox+{mlflow_server.url}"
    with tracking(uri, tmp_path) as mlflow:
        mlflow.set_experiment(experiment_name)
        with mlflow.start_run() as run:
            mlflow.log_metric("parent", 1.0)
            if method == "fork":
                children = [
                    multiprocessing.get_context("fork").Process(target=_log_in_child, args=(run.info.run_id, i))
                    for i in range(2)
                ]
                for child in children:
                    child.start()
                for child in children:
                    child.join(120)
                assert [0, 0] == [child.exitcode for child in children]
            else:
                other = program(tmp_path, f"_log({run.info.run_id!r}, 0)\n_log({run.info.run_id!r}, 1)")
                output, _ = other.communicate(timeout=250)
                assert 0 == other.returncode, output
        deliver(uri)
    (found,) = the_runs(mlflow_server.url, experiment_name)
    assert {"parent": 1.0, "child-0": 0.0, "child-1": 1.0} == found.data.metrics


def _make_model_in_child(experiment_id: str, run_id: str | None, parent: Any) -> None:
    import mlflow

    model = mlflow.MlflowClient().create_logged_model(experiment_id, name="of-a-child", source_run_id=run_id)
    parent.send(model.model_id)


@pytest.mark.parametrize("home", ["run", "experiment"])
def test_a_model_that_a_child_makes_offline_is_named_by_its_parent(
    home: str, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Journals of one run, or of what belongs to no run, are read one after the other, and the parent's began first."""
    context = multiprocessing.get_context("fork")
    with away(mlflow_server, tmp_path) as (mlflow, proxy, uri):
        number = mlflow.set_experiment(experiment_name).experiment_id
        with mlflow.start_run() as run:
            mlflow.log_metric("before", 1.0)
            here, there = context.Pipe()
            of = run.info.run_id if home == "run" else None
            child = context.Process(target=_make_model_in_child, args=(number, of, there))
            child.start()
            assert here.poll(120)
            model_id = here.recv()
            child.join(120)
            mlflow.set_tag("best", model_id)
            mlflow.MlflowClient().set_experiment_tag(number, "best", model_id)
            mlflow.log_metric("after", 2.0)
        proxy.up()
        deliver(uri)
    (found,) = the_runs(mlflow_server.url, experiment_name)
    with client(mlflow_server.url) as api:
        experiment = api.get_experiment_by_name(experiment_name)
        (model,) = api.search_logged_models([experiment.experiment_id])
    assert ("of-a-child", found.info.run_id if home == "run" else None) == (model.name, model.source_run_id or None)
    assert (model.model_id, model.model_id) == (found.data.tags["best"], experiment.tags["best"])
    assert {"before": 1.0, "after": 2.0} == found.data.metrics


def _make_models_in_child(number: str, run_id: str, parent: Any) -> None:
    """Make a model that names another one, which a program makes whose journal begins later."""
    import mlflow

    api = mlflow.MlflowClient()
    api.log_metric(run_id, "child", 1.0)
    parent.send("its journal has begun")
    assert parent.poll(120)
    model = api.create_logged_model(number, name="second", source_run_id=run_id, tags={"base": parent.recv()})
    parent.send(model.model_id)


def test_a_model_made_by_one_child_that_names_one_of_another_is_named_by_their_parent(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Of three journals of one run each names what is made in the next one."""
    context = multiprocessing.get_context("fork")
    with away(mlflow_server, tmp_path) as (mlflow, proxy, uri):
        number = mlflow.set_experiment(experiment_name).experiment_id
        with mlflow.start_run() as run:
            pipes = [context.Pipe() for _ in range(2)]
            first = context.Process(target=_make_models_in_child, args=(number, run.info.run_id, pipes[0][1]))
            first.start()
            assert pipes[0][0].poll(120)
            pipes[0][0].recv()
            other = context.Process(target=_make_model_in_child, args=(number, run.info.run_id, pipes[1][1]))
            other.start()
            assert pipes[1][0].poll(120)
            pipes[0][0].send(pipes[1][0].recv())
            assert pipes[0][0].poll(120)
            mlflow.set_tag("best", pipes[0][0].recv())
            for child in (first, other):
                child.join(120)
        proxy.up()
        deliver(uri)
    (found,) = the_runs(mlflow_server.url, experiment_name)
    with client(mlflow_server.url) as api:
        models = {model.name: model for model in api.search_logged_models([found.info.experiment_id])}
    assert ["of-a-child", "second"] == sorted(models)
    assert models["second"].model_id == found.data.tags["best"]
    assert models["of-a-child"].model_id == models["second"].tags["base"]


def test_two_runs_that_each_name_a_model_of_the_other_arrive(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Another program makes both, in journals that are read behind those that name them."""
    context = multiprocessing.get_context("fork")
    with away(mlflow_server, tmp_path) as (mlflow, proxy, uri):
        number = mlflow.set_experiment(experiment_name).experiment_id
        api, made = mlflow.MlflowClient(), list[str]()
        ids = [api.create_run(number, run_name=name).info.run_id for name in ("one", "two")]
        for run_id in ids:
            here, there = context.Pipe()
            child = context.Process(target=_make_model_in_child, args=(number, run_id, there))
            child.start()
            assert here.poll(120)
            made.append(here.recv())
            child.join(120)
        for run_id, model_id in zip(ids, reversed(made), strict=True):
            api.set_tag(run_id, "other", model_id)
            api.set_terminated(run_id)
        proxy.up()
        deliver(uri)
    runs = {run.info.run_id: run for run in the_runs(mlflow_server.url, experiment_name)}
    with client(mlflow_server.url) as api:
        models = api.search_logged_models([next(iter(runs.values())).info.experiment_id])
    assert sorted(runs) == sorted(model.source_run_id for model in models), "each run has one"
    for model in models:
        (naming,) = [run_id for run_id, run in runs.items() if run.data.tags["other"] == model.model_id]
        assert naming != model.source_run_id


def _begin_in_child(experiment: str) -> None:
    import mlflow

    mlflow.set_experiment(experiment)
    with mlflow.start_run():
        mlflow.log_metric("m", 1.0)


def test_a_child_forked_while_other_threads_hold_the_locks_goes_on(
    sqlite_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """A lock that is held at a fork stays held in the child for ever, unless it is renewed."""
    from mlflow_outbox_worker.mlflow_sink import stores

    uri = f"outbox+{sqlite_uri}"
    with tracking(uri, tmp_path) as mlflow:
        mlflow.create_experiment(experiment_name)
        held = store(uri)
        with held.server._lock, held.journals._lock, held._recent_lock, stores._building.held(AssertionError):
            child = multiprocessing.get_context("fork").Process(target=_begin_in_child, args=(experiment_name,))
            child.start()
            child.join(120)
        code = child.exitcode
        if code is None:
            child.kill()
        assert 0 == code


def program(directory: Path, text: str, **environment: str) -> subprocess.Popen[str]:
    """Start a Python program that logs through the plugin, registered as its entry points would."""
    source = """
        import sys
        sys.path[:0] = {paths!r}
        from plugin_world import register
        register()
        import mlflow
        def _log(run_id, number):
            mlflow.MlflowClient().log_metric(run_id, f"child-{{number}}", float(number))
    """
    here = [str(Path(__file__).parent), *[path for path in sys.path if path.endswith(("tracker", "worker"))]]
    code = textwrap.dedent(source).format(paths=here) + text
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "MLFLOW_OUTBOX_DIR": str(directory), **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_killed_program_has_lost_nothing(mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path) -> None:
    """SIGKILL right after the calls; another process delivers what the first one had logged."""
    uri = f"outbox+{mlflow_server.url}"
    text = textwrap.dedent(f"""
        mlflow.set_experiment({experiment_name!r})
        mlflow.start_run(run_name="killed")
        for step in range(300):
            mlflow.log_metric("m", step / 2, step=step)
        mlflow.log_text("hello", "a.txt")
        print("logged", flush=True)
        sys.stdin.read()
    """)
    child = program(tmp_path, text, MLFLOW_TRACKING_URI=uri, MLFLOW_OUTBOX_WORKER="none")
    assert child.stdout is not None
    assert any("logged" in line for line in child.stdout)
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=60)
    with tracking(uri, tmp_path):
        deliver(uri)
    (found,) = picture(mlflow_server.url, experiment_name)["runs"]
    assert 300 == len(found["metrics"]["m"])
    assert [["a.txt", 5]] == found["files"]


#: For programs of which all is to have arrived when they end: a busy server takes more than the usual ten seconds.
PATIENT = {"MLFLOW_OUTBOX_EXIT_TIMEOUT": "60"}


def left_open(experiment: str) -> str:
    """Return a program that traces, and leaves the end of its run to MLflow."""
    return textwrap.dedent(f"""
        mlflow.set_experiment({experiment!r})
        mlflow.start_run(run_name="left open")
        mlflow.log_metric("m", 1.0)
        @mlflow.trace
        def traced(x):
            return x
        traced(1)
    """)


def test_a_program_that_ends_without_ending_its_run_delivers_the_end_too(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """MLflow ends an active run and sends its last traces at the exit; both are delivered before that."""
    uri = f"outbox+{mlflow_server.url}"
    child = program(tmp_path, left_open(experiment_name), MLFLOW_TRACKING_URI=uri, **PATIENT)
    output, _ = child.communicate(timeout=250)
    assert 0 == child.returncode, output
    shown = picture(mlflow_server.url, experiment_name)
    assert [("left open", "FINISHED")] == [(run["name"], run["status"]) for run in shown["runs"]], output
    assert 1 == len(shown["traces"]), output


@pytest.mark.parametrize("prefix", ["", "outbox+"])
def test_a_handler_of_the_exit_logs_to_the_run_that_is_active(
    prefix: str, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """One that was registered before the first call of MLflow's; it would begin a run of its own without that one."""
    text = textwrap.dedent(f"""
        import atexit
        atexit.register(lambda: mlflow.log_metric("last", 1.0))
        mlflow.set_experiment({experiment_name!r})
        mlflow.start_run(run_name="left open")
        mlflow.log_metric("first", 0.5)
    """)
    child = program(tmp_path, text, MLFLOW_TRACKING_URI=f"{prefix}{mlflow_server.url}")
    output, _ = child.communicate(timeout=60)
    assert 0 == child.returncode, output
    assert [("FINISHED", {"first": 0.5, "last": 1.0})] == [
        (run.info.status, run.data.metrics) for run in the_runs(mlflow_server.url, experiment_name)
    ], output


def test_a_program_whose_outbox_rests_when_it_ends_delivers_the_end_of_its_run(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Nothing was logged for a while, and MLflow ends the run at the exit, where Python 3.12 starts no thread."""
    text = textwrap.dedent(f"""
        import threading, time
        from mlflow.tracking import _tracking_service
        start = threading.Thread.start
        def as_python_3_12_does(thread):
            if not threading.main_thread().is_alive():
                raise RuntimeError("can't create new thread at interpreter shutdown")
            start(thread)
        threading.Thread.start = as_python_3_12_does
        mlflow.set_experiment({experiment_name!r})
        mlflow.start_run(run_name="left open")
        mlflow.log_metric("m", 1.0)
        while not _tracking_service.utils._get_store().pulse.rests:
            time.sleep(0.1)
    """)
    wants = {"MLFLOW_OUTBOX_IDLE_TIMEOUT": "0", "MLFLOW_OUTBOX_EXIT_TIMEOUT": "60"}
    child = program(tmp_path, text, MLFLOW_TRACKING_URI=f"outbox+{mlflow_server.url}", **wants)
    output, _ = child.communicate(timeout=120)
    assert 0 == child.returncode, output
    assert "no worker could be started" not in output
    assert "events wait" not in output
    assert [("FINISHED", {"m": 1.0})] == [
        (run.info.status, run.data.metrics) for run in the_runs(mlflow_server.url, experiment_name)
    ], output


def test_the_last_traces_of_a_program_with_a_tracer_provider_of_its_own_are_delivered_too(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """MLflow joins it, and it ends after the outbox: it was there before. OpenTelemetry holds spans back until then."""
    text = textwrap.dedent(f"""
        from opentelemetry import trace
        from opentelemetry.sdk.trace import TracerProvider
        trace.set_tracer_provider(TracerProvider())
        mlflow.set_experiment({experiment_name!r})
        with mlflow.start_span("last"):
            pass
    """)
    wants = {"MLFLOW_USE_DEFAULT_TRACER_PROVIDER": "false", "MLFLOW_ASYNC_TRACE_LOGGING_MAX_INTERVAL_MILLIS": "60000"}
    child = program(tmp_path, text, MLFLOW_TRACKING_URI=f"outbox+{mlflow_server.url}", **PATIENT, **wants)
    output, _ = child.communicate(timeout=250)
    assert 0 == child.returncode, output
    assert 1 == len(picture(mlflow_server.url, experiment_name)["traces"]), output


def test_what_mlflow_raises_at_the_exit_is_counted_and_said_and_all_else_is_delivered(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Neither the traces nor the outbox's last delivery depend on whether MLflow could end its run."""
    text = left_open(experiment_name) + textwrap.dedent("""
        from mlflow.tracking import fluent, _tracking_service
        def fails():
            raise RuntimeError("no end today")
        fluent._safe_end_run = fails
        counters = _tracking_service.utils._get_store().outbox.counters
        add = counters.add
        def told(reason, number=1):
            add(reason, number)
            print(reason, "is", counters[reason], flush=True)
        counters.add = told
    """)
    child = program(tmp_path, text, MLFLOW_TRACKING_URI=f"outbox+{mlflow_server.url}", **PATIENT)
    output, _ = child.communicate(timeout=250)
    assert 0 == child.returncode, output
    assert "exit_errors is 1\n" in output
    assert "MLflow failed at the exit (RuntimeError: no end today); missing may be the end of its active run" in output
    shown = picture(mlflow_server.url, experiment_name)
    assert [("left open", {"m": [[0, "1.0"]]})] == [(run["name"], run["metrics"]) for run in shown["runs"]], output
    assert 1 == len(shown["traces"]), output


@pytest.mark.parametrize("prefix", ["", "outbox+"])
def test_a_program_that_is_interrupted_ends_by_the_signal(
    prefix: str, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Shells show that as 130, and loops of scripts end by it too; its run is delivered as failed all the same."""
    text = textwrap.dedent(f"""
        import os, signal
        mlflow.set_experiment({experiment_name!r})
        with mlflow.start_run(run_name="interrupted"):
            mlflow.log_metric("m", 1.0)
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()
    """)
    child = program(tmp_path, text, MLFLOW_TRACKING_URI=f"{prefix}{mlflow_server.url}", **PATIENT)
    output, _ = child.communicate(timeout=250)
    assert -signal.SIGINT == child.returncode, output
    assert [("FAILED", {"m": 1.0})] == [
        (run.info.status, run.data.metrics) for run in the_runs(mlflow_server.url, experiment_name)
    ]
