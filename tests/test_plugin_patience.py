"""How long a call through the plugin waits for a server that is slow or silent, and what it says then."""

from __future__ import annotations

import socket
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from contents import client
from mlflow_outbox.spool import provisional
from mlflow_outbox.testing.faults import accept_hang, delay, status
from mlflow_outbox.testing.proxy import FaultProxy
from plugin_world import away, deliver, store, tracking
from servers import MlflowServer, unused_port
from wires import silent_host

_WORKSPACE = "outbox+databricks://work"


@contextmanager
def workspace(server: MlflowServer, tmp_path: Path, **settings: object) -> Iterator[tuple[Any, FaultProxy, str]]:
    """Point MLflow at an outbox of a workspace; yield mlflow, the proxy before it, and the id of somebody's run."""
    with client(server.url) as api:
        number = api.create_experiment(uuid.uuid4().hex, artifact_location=(tmp_path / "files").as_uri())
        theirs = api.create_run(number, run_name="theirs").info.run_id
    with FaultProxy(server.url) as proxy, pytest.MonkeyPatch.context() as patch:
        (tmp_path / "databrickscfg").write_text(f"[work]\nhost = {proxy.url}\ntoken = dapi-5ecret-t0ken\n")
        patch.setenv("DATABRICKS_CONFIG_FILE", str(tmp_path / "databrickscfg"))
        with tracking(_WORKSPACE, tmp_path / "outbox", **settings) as mlflow:
            assert "theirs" == mlflow.get_run(theirs).info.run_name
            yield mlflow, proxy, theirs
            proxy.clear()


def seconds(call: Callable[[], object]) -> float:
    """Return how long a call takes."""
    begin = time.monotonic()
    call()
    return time.monotonic() - begin


def test_a_database_that_is_silent_is_waited_for_no_longer_than_any_server(tmp_path: Path) -> None:
    """Its driver waits for as long as the connection lasts: for ever, when nobody closes it."""
    pytest.importorskip("psycopg2")
    waits = {"create_timeout": 0.5, "read_timeout": 1.0, "exit_timeout": 0, "worker": "none"}
    with silent_host() as port, tracking(f"outbox+postgresql://u@127.0.0.1:{port}/db", tmp_path, **waits) as mlflow:
        ended = threading.Event()
        runs: list[Any] = []

        def program() -> None:
            api = mlflow.MlflowClient()
            runs.append(api.create_run("0"))
            api.log_metric(runs[0].info.run_id, "m", 1.0)
            runs.append(api.get_run(runs[0].info.run_id))
            ended.set()

        threading.Thread(target=program, daemon=True).start()
        assert ended.wait(20.0), "the program stands still"
        assert provisional.is_provisional(runs[0].info.run_id)
        assert {"m": 1.0} == runs[1].data.metrics


@pytest.mark.parametrize("how", ["silent", "away"])
def test_the_registry_of_a_database_is_waited_for_no_longer_than_that_of_any_server(how: str, tmp_path: Path) -> None:
    """MLflow's own store for it connects when it is made, in ten attempts with pauses of up to fifty seconds."""
    from mlflow.exceptions import MlflowException

    pytest.importorskip("psycopg2")
    waits = {"create_timeout": 0.5, "read_timeout": 1.0, "exit_timeout": 0, "worker": "none"}
    with silent_host() as silent:
        port = silent if how == "silent" else unused_port()
        with tracking(f"outbox+postgresql://u@127.0.0.1:{port}/db", tmp_path, **waits) as mlflow:
            errors: list[str] = []
            ended = threading.Event()

            def program() -> None:
                try:
                    mlflow.MlflowClient().search_registered_models()
                except MlflowException as error:
                    errors.append(str(error))
                ended.set()

            threading.Thread(target=program, daemon=True).start()
            assert ended.wait(20.0), "the program stands still"
            assert "the model registry (search_registered_models) needs the tracking server" in errors[0]


def test_a_resolver_of_names_that_is_silent_is_waited_for_no_longer_than_any_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has times of its own, of ten seconds to a minute, as where a network is gone that has the servers of names."""
    over, resolve = threading.Event(), socket.getaddrinfo

    def silent(host: Any, *rest: Any, **more: Any) -> Any:
        if host != "tracking.example":
            return resolve(host, *rest, **more)
        over.wait(40)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", silent)
    monkeypatch.setenv("NO_PROXY", "*")
    waits = {"create_timeout": 0.5, "read_timeout": 1.0, "exit_timeout": 0, "worker": "none"}
    with tracking("outbox+http://tracking.example:5000", tmp_path, **waits) as mlflow:
        try:
            begin = time.monotonic()
            assert provisional.is_provisional(mlflow.MlflowClient().create_run("0").info.run_id)
            assert time.monotonic() - begin < 20.0
        finally:
            over.set()


def test_a_database_file_that_is_locked_is_waited_for_no_longer_than_any_server(
    empty_database: Callable[[Path], Path], tmp_path: Path
) -> None:
    """MLflow gives SQLite twenty seconds for a lock that another process holds, each time."""
    from mlflow.exceptions import MlflowException

    database = empty_database(tmp_path / "mlflow.db")
    waits = {"create_timeout": 0.3, "read_timeout": 0.8, "exit_timeout": 0, "worker": "none"}
    with tracking(f"outbox+sqlite:///{database}", tmp_path / "outbox", **waits) as mlflow:
        api = mlflow.MlflowClient()
        assert 1 == len(api.search_experiments())
        other = sqlite3.connect(database, isolation_level=None)
        try:
            other.execute("BEGIN EXCLUSIVE")
            begin = time.monotonic()
            assert provisional.is_provisional(api.create_run("0").info.run_id)
            with pytest.raises(MlflowException, match="needs the tracking server"):
                api.search_experiments()
            assert time.monotonic() - begin < 20.0
        finally:
            other.close()


def test_threads_put_their_questions_to_a_workspace_side_by_side(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    """One that is asked something is not away for the others, who would begin runs offline and could read nothing."""
    with workspace(mlflow_server, tmp_path, create_timeout=20, read_timeout=20) as (mlflow, proxy, theirs):
        proxy.on("", delay(0.2), times=None)
        api, found, errors = mlflow.MlflowClient(), [], []

        def ask() -> None:
            try:
                found.append(api.get_run(theirs).info.run_name)
                found.append(provisional.is_provisional(api.create_run("0").info.run_id))
            except Exception as error:  # noqa: BLE001 - for the test
                errors.append(error)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert [] == errors
        assert 4 * [False] + 4 * ["theirs"] == sorted(found, key=str)


def test_a_workspace_that_is_slow_is_waited_for_by_what_only_it_can_answer(
    mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    """As any server is, although the short question that had no answer is still under way."""
    with workspace(mlflow_server, tmp_path, create_timeout=0.3) as (mlflow, proxy, _):
        proxy.on("", delay(0.8), times=None)
        assert provisional.is_provisional(mlflow.MlflowClient().create_run("0").info.run_id)
        assert store(_WORKSPACE).server.is_away()
        assert 1 <= len(mlflow.search_experiments(max_results=1))


def test_a_model_from_elsewhere_is_not_said_to_be_nowhere_while_the_server_is_away(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Whether this process has met it, or written to it, or not: only the server can show it."""
    from mlflow.exceptions import MlflowException

    with client(mlflow_server.url) as api:
        number = api.create_experiment(experiment_name)
        run = api.create_run(number).info.run_id
        models = [api.create_logged_model(number, name=f"m{i}", source_run_id=run).model_id for i in range(2)]
    with FaultProxy(mlflow_server.url) as proxy:
        uri = f"outbox+{proxy.url}"
        with tracking(uri, tmp_path, create_timeout=0.5) as mlflow:
            api = mlflow.MlflowClient()
            assert "m0" == api.get_logged_model(models[0]).name
            proxy.down()
            store(uri).set_logged_model_tags(models[1], [])  # MLflow's client reads the model before
            for model in models:
                with pytest.raises(MlflowException, match="needs the tracking server") as caught:
                    api.get_logged_model(model)
                assert "TEMPORARILY_UNAVAILABLE" == caught.value.error_code
            proxy.up()
            deliver(uri)


def test_a_slow_server_is_waited_for_to_show_a_model_that_this_process_has_met(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Most models are those of a run."""
    with client(mlflow_server.url) as api:
        number = api.create_experiment(experiment_name)
        run = api.create_run(number).info.run_id
        model = api.create_logged_model(number, name="m", source_run_id=run).model_id
    with FaultProxy(mlflow_server.url) as proxy:
        uri = f"outbox+{proxy.url}"
        with tracking(uri, tmp_path, create_timeout=0.3) as mlflow:
            assert "m" == mlflow.get_logged_model(model).name
            proxy.on("", delay(0.8), times=None)
            assert "m" == mlflow.get_logged_model(model).name
            proxy.clear()


def test_what_writes_to_somebody_elses_run_or_model_waits_for_no_more_than_a_short_question(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """The removal of a tag looks whether there is one, and is taken when that cannot be known."""
    with client(mlflow_server.url) as api:
        number = api.create_experiment(experiment_name)
        theirs = api.create_run(number, tags={"gone": "soon", "stays": "yes"}).info.run_id
        model = api.create_logged_model(number, name="m", source_run_id=theirs, tags={"gone": "soon"}).model_id
    waits = {"create_timeout": 0.5, "read_timeout": 30.0, "exit_timeout": 0, "request_timeout": 1.0}
    with FaultProxy(mlflow_server.url) as proxy:
        uri = f"outbox+{proxy.url}"
        with tracking(uri, tmp_path, **waits) as mlflow:
            proxy.on("", accept_hang(), times=None)
            api = mlflow.MlflowClient()
            assert seconds(lambda: api.delete_tag(theirs, "gone")) < 15.0
            assert seconds(lambda: api.delete_logged_model_tag(model, "gone")) < 15.0
            proxy.clear()
            deliver(uri)
    with client(mlflow_server.url) as api:
        assert {"stays"} == {"gone", "stays"} & api.get_run(theirs).data.tags.keys()
        assert "gone" not in api.get_logged_model(model).tags


def test_a_run_from_elsewhere_is_written_to_after_an_experiment_was_deleted_offline(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """It might be one of that; whether it is only the server knows, which is no reason to refuse what is logged."""
    from mlflow.exceptions import MlflowException

    with client(mlflow_server.url) as api:
        theirs, other = (api.create_run(api.create_experiment(f"{experiment_name}-{i}")).info.run_id for i in range(2))
    with away(mlflow_server, tmp_path, create_timeout=0.5) as (mlflow, proxy, uri):
        api = mlflow.MlflowClient()
        for run in (theirs, other):
            api.log_metric(run, "m", 1.0, step=1)
        api.delete_experiment(api.create_experiment(experiment_name))
        api.log_metric(theirs, "m", 2.0, step=2)
        api.delete_run(other)
        with pytest.raises(MlflowException, match="must be in the 'active' state"):
            api.log_metric(other, "m", 2.0, step=2)
        proxy.up()
        deliver(uri)
    with client(mlflow_server.url) as api:
        assert {"m": 2.0} == api.get_run(theirs).data.metrics


@pytest.mark.parametrize("how", ["it fails at this question", "it is never asked"])
def test_an_experiment_that_is_named_by_its_id_is_not_said_to_be_nowhere_when_the_server_has_no_answer(
    how: str, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """A program that begins with it goes on."""
    with client(mlflow_server.url) as api:
        number = api.create_experiment(experiment_name)
    failure = status(500, {"Content-Type": "application/json"}, b'{"error_code": "INTERNAL_ERROR", "message": "no"}')
    with FaultProxy(mlflow_server.url) as proxy:
        uri = f"outbox+{proxy.url}"
        if "fails" in how:
            proxy.on("experiments/get?", failure, times=None)
        with tracking(uri, tmp_path, create_timeout=0 if "never" in how else 2) as mlflow:
            mlflow.set_experiment(experiment_id=number)
            with mlflow.start_run():
                mlflow.log_metric("m", 1.0)
            proxy.clear()
            deliver(uri)
    with client(mlflow_server.url) as api:
        assert [{"m": 1.0}] == [run.data.metrics for run in api.search_runs([number])]


@pytest.mark.parametrize("times", [1, 2, None])
def test_an_experiment_that_is_named_is_the_one_of_the_runs_although_the_server_fails_when_it_is_looked_for(
    times: int | None, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """MLflow makes one then, and takes the refusal for somebody else's being faster, without beginning to use it."""
    with client(mlflow_server.url) as api:
        number = api.create_experiment(experiment_name)
    failure = status(500, {"Content-Type": "application/json"}, b'{"error_code": "INTERNAL_ERROR", "message": "no"}')
    with FaultProxy(mlflow_server.url) as proxy:
        uri = f"outbox+{proxy.url}"
        proxy.on("experiments/get-by-name", failure, times=times)
        with tracking(uri, tmp_path) as mlflow:
            found = mlflow.set_experiment(experiment_name)
            with mlflow.start_run() as run:
                mlflow.log_metric("m", 1.0)
            assert found.experiment_id == run.info.experiment_id
            proxy.clear()
            deliver(uri)
    with client(mlflow_server.url) as api:
        assert [{"m": 1.0}] == [run.data.metrics for run in api.search_runs([number])]


def test_a_question_at_which_the_server_fails_says_nothing_of_others_however_it_says_so(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """A search for models with a token that is none fails in the framework of the server, which answers with a page."""
    from mlflow.exceptions import MlflowException

    uri = f"outbox+{mlflow_server.url}"
    with tracking(uri, tmp_path) as mlflow:
        api = mlflow.MlflowClient()
        number = api.create_experiment(experiment_name)
        for _ in range(3):
            with pytest.raises(MlflowException):
                api.search_logged_models([number], page_token="x")
            assert not provisional.is_provisional(api.create_run(number).info.run_id)
        deliver(uri)


@pytest.mark.parametrize("name", ["search_registered_models", "search_experiments", "search_logged_models"])
def test_a_silent_server_costs_a_call_that_needs_it_one_short_wait_and_one_long_one(
    name: str, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The short one is for what was logged to arrive; no short question stands between that and the long one."""
    from mlflow.exceptions import MlflowException

    with client(mlflow_server.url) as api:
        number = api.create_experiment(experiment_name)
    waits = {"create_timeout": 1.0, "read_timeout": 2.0, "exit_timeout": 0}
    with FaultProxy(mlflow_server.url) as proxy:
        uri = f"outbox+{proxy.url}"
        with tracking(uri, tmp_path, **waits) as mlflow:
            api, server = mlflow.MlflowClient(), store(uri).server
            run = api.create_run(number)
            deliver(uri)
            proxy.on("", accept_hang(), times=None)
            api.log_metric(run.info.run_id, "m", 1.0)
            asked: list[float] = []
            theirs = server._asked

            def spy(question: Any, timeout: float) -> Any:
                asked.append(timeout)
                return theirs(question, timeout)

            monkeypatch.setattr(server, "_asked", spy)
            ask = {"search_logged_models": [[number]]}.get(name, [])
            for _ in range(2):
                with pytest.raises(MlflowException, match="needs the tracking server"):
                    getattr(api, name)(*ask)
            assert [2.0] == asked
            proxy.clear()
