"""No thread of the outbox looks for a module: MLflow's import hooks and CPython's lock could hold it for ever."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from contents import client
from mlflow_outbox_worker.mlflow_sink.rebound import http_request_over
from plugin_world import the_runs
from servers import MlflowServer

_BEGIN = """
    import os, sys, threading
    sys.path[:0] = {paths!r}
    from plugin_world import register
    import plugin_scenarios
    import mlflow
    register()
    uri, experiment = sys.argv[1:]

    looked_for = []
    class Finder:
        def find_spec(self, name, path=None, target=None):
            if threading.current_thread().name.startswith("mlflow-outbox"):
                looked_for.append((threading.current_thread().name, name))
    store = mlflow.tracking._tracking_service.utils._get_store(uri)
    sys.meta_path.insert(0, Finder())
"""


def said_by(program: str, uri: str, experiment: str, outbox: Path, **environment: str) -> list[str]:
    """Run a program that logs through the plugin in a process of its own; return the lines that it prints."""
    here = [str(Path(__file__).parent), *[path for path in sys.path if path.endswith(("tracker", "worker"))]]
    code = textwrap.dedent(_BEGIN).format(paths=here) + textwrap.dedent(program)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"DIR": str(outbox), "EXIT_TIMEOUT": "0", **environment}.items():
            patch.setenv(f"MLFLOW_OUTBOX_{name}", value)
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        done = subprocess.run(  # the time-out is the watchdog: what waits for a lock of its own making, never ends
            [sys.executable, "-c", code, uri, experiment], capture_output=True, check=False, timeout=280, text=True
        )
    assert 0 == done.returncode, done.stderr
    return [line for line in done.stdout.splitlines() if line.startswith(": ")]


def test_autologging_begins_while_the_outbox_delivers(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """It imports with MLflow's lock of import hooks held, which a thread that looks for a module wants: both go on."""
    program = """
        import sklearn.linear_model
        mlflow.set_experiment(experiment)
        with mlflow.start_run(run_name="r"):
            for i in range(200):
                mlflow.log_text("x", f"{i}.txt")
            mlflow.autolog(silent=True)
            from mlflow.utils import import_hooks
            with import_hooks._post_import_hooks_lock, import_hooks._import_error_hooks_lock:
                mlflow.log_metric("m", 1.0)
                delivered = store.outbox.flush(120)
        print(": delivered", bool(delivered), flush=True)
        os._exit(0)
    """
    uri = f"outbox+{mlflow_server.url}"
    assert [": delivered True"] == said_by(program, uri, experiment_name, tmp_path)
    (run,) = the_runs(mlflow_server.url, experiment_name)
    with client(mlflow_server.url) as api:
        assert 200 == len(api.list_artifacts(run.info.run_id))


_LOOKED_FOR = """
    print(":", looked_for, store.outbox.counters["worker_not_prepared"], flush=True)
    os._exit(0)
"""
_EVERYTHING = """
    import warnings; warnings.simplefilter("ignore")
    for name, scenario in plugin_scenarios.ALL.items():
        if name != "traces" or not uri.startswith("outbox+file"):
            scenario(mlflow, f"{experiment}-{name}", plugin_scenarios.nothing)
    print(": delivered", bool(store.outbox.flush(60)))
"""
_LITTLE = """
    mlflow.set_experiment(experiment)
    with mlflow.start_run():
        mlflow.log_metric("m", 1.0)
        mlflow.log_text("hello", "a.txt")
    print(": delivered", bool(store.outbox.flush(float(os.environ["MLFLOW_OUTBOX_CLOSE_TIMEOUT"]))))
"""


@pytest.mark.parametrize("kind", ["http", "sqlite", "file"])
def test_no_thread_of_the_outbox_looks_for_a_module_once_the_store_is_open(
    kind: str, mlflow_server: MlflowServer, sqlite_uri: str, file_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """Whatever is delivered."""
    plain = {"http": mlflow_server.url, "sqlite": sqlite_uri, "file": file_uri}[kind]
    said = said_by(_EVERYTHING + _LOOKED_FOR, f"outbox+{plain}", experiment_name, tmp_path)
    assert [": delivered True", ": [] 0"] == said


@pytest.mark.parametrize("kind", ["http", "sqlite", "file"])
def test_the_first_requests_of_a_worker_look_for_no_module(
    kind: str, mlflow_server: MlflowServer, sqlite_uri: str, file_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """Where the program itself has asked the server nothing before."""
    plain = {"http": mlflow_server.url, "sqlite": sqlite_uri, "file": file_uri}[kind]
    options = {"CREATE_TIMEOUT": "0", "CLOSE_TIMEOUT": "60"}
    said = said_by(_LITTLE + _LOOKED_FOR, f"outbox+{plain}", experiment_name, tmp_path, **options)
    assert [": delivered True", ": [] 0"] == said


def test_an_outage_has_no_thread_look_for_a_module(experiment_name: str, tmp_path: Path) -> None:
    """A server that is not there from the start: requests that fail import no more than others."""
    said = said_by(_LITTLE + _LOOKED_FOR, "outbox+http://127.0.0.1:9", experiment_name, tmp_path, CLOSE_TIMEOUT="1")
    assert [": delivered False", ": [] 0"] == said


def test_a_program_with_mlflow_prepares_a_tracker_where_it_is_made(tmp_path: Path) -> None:
    """A tracker's thread shares the program's MLflow as well, and its import hooks."""
    program = """
        from mlflow_outbox import MLflowTracker
        tracker = MLflowTracker(experiment, f"sqlite:///{os.environ['MLFLOW_OUTBOX_DIR']}/m.db")
        tracker.start_run("r").log_metric("m", 1.0)
        print(": delivered", bool(tracker.flush(60)))
        print(":", looked_for, flush=True)
        os._exit(0)
    """
    said = said_by(program, "outbox+http://127.0.0.1:9", "e", tmp_path)
    assert [": delivered True", ": []"] == said


def test_header_plugins_are_asked_at_each_request_and_databricks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens expire; a notebook does not change. MLflow's own client is what it was."""
    from mlflow.tracking.request_header import registry
    from mlflow.utils import databricks_utils
    from mlflow.utils.rest_utils import MlflowHostCreds

    asked: list[int] = []

    class Plugin:
        def in_context(self) -> bool:
            return True

        def request_headers(self) -> dict[str, str]:
            asked.append(1)
            return {"X-Token": f"token {len(asked)}"}

    def perform(*_arguments: object, headers: dict[str, str], **_more: object) -> dict[str, str]:
        return headers

    request = http_request_over(perform)
    creds = MlflowHostCreds("http://127.0.0.1:9", token="secret")
    request(creds, "/a", "GET")
    monkeypatch.setattr(databricks_utils, "is_in_cluster", pytest.fail)
    monkeypatch.setattr(
        registry._request_header_provider_registry,
        "_registry",
        [*list(registry._request_header_provider_registry), Plugin()],
    )
    sent = [request(creds, "/a", "GET") for _ in range(2)]
    assert ["token 1", "token 2"] == [headers["X-Token"] for headers in sent]
    assert {"Bearer secret"} == {headers["Authorization"] for headers in sent}
    assert all(headers["User-Agent"].startswith("mlflow-python-client/") for headers in sent)
