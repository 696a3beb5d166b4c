"""What unchanged MLflow code logged through an outbox, replayed to a server that it was not logged for."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

import plugin_scenarios
from contents import client
from mlflow_outbox.destination import resolve
from mlflow_outbox.testing.proxy import FaultProxy
from mlflow_outbox_worker.packing import write_bundle
from mlflow_outbox_worker.sources import find_runs
from plugin_world import NOWHERE, deliver, differences, picture, store, the_runs, tracking
from replays import command, the_outbox
from servers import MlflowServer, eventually

#: What differs most in what it leaves behind: nested runs, deleted ones, tables; files; datasets; models; traces.
_SCENARIOS = ("fluent", "client", "datasets", "model", "traces")


@pytest.mark.parametrize("mode", ["server's ids", "provisional ids"])
def test_another_server_gets_what_the_first_one_has(
    mode: str,
    mlflow_server: MlflowServer,
    own_mlflow_server: Callable[..., MlflowServer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Field by field: ids of the first server's runs, models and experiments stand for those of the second."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    experiments = {name: f"replayed-{name}-{uuid.uuid4().hex[:8]}" for name in _SCENARIOS}
    other = own_mlflow_server()
    with FaultProxy(mlflow_server.url) as proxy:
        if mode == "provisional ids":
            proxy.down()
        uri = f"outbox+{proxy.url}"
        with tracking(uri, tmp_path / "outbox") as mlflow:
            for name, experiment in experiments.items():
                plugin_scenarios.ALL[name](mlflow, experiment, plugin_scenarios.nothing)
            mlflow.flush_trace_async_logging()
            proxy.up()
            deliver(uri)
    expected = {experiment: picture(mlflow_server.url, experiment) for experiment in experiments.values()}
    for _ in range(2):  # the second time there is nothing to send
        assert 0 == command("replay", the_outbox(tmp_path / "outbox"), "--to", other.url)
        for experiment, first in expected.items():
            assert [] == differences(first, picture(other.url, experiment))


def test_into_another_experiment_go_runs_models_and_traces_and_nothing_of_the_first_one(
    sqlite_uri: str, empty_database: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two outboxes mean different experiments by the same id; what was done to those leaves the chosen one alone."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("MLFLOW_ENABLE_ASYNC_TRACE_LOGGING", "false")
    places = []
    for plain in (sqlite_uri, f"sqlite:///{empty_database(tmp_path / 'second.db')}"):
        with tracking(f"outbox+{plain}", tmp_path / "outbox") as mlflow:
            number = mlflow.create_experiment(f"first of {plain}", tags={"its": "own"})
            with mlflow.start_run(experiment_id=number, run_name="r"), mlflow.start_span("s"):
                mlflow.initialize_logged_model(name="m")
            deliver(f"outbox+{plain}")
            mlflow.MlflowClient().rename_experiment(number, f"renamed {plain}")
            mlflow.delete_experiment(number)
            deliver(f"outbox+{plain}")
            places.append(store(f"outbox+{plain}").outbox.directory.path)
    target = f"sqlite:///{empty_database(tmp_path / 'target.db')}"
    assert 0 == command("replay", *places, "--to", target, "--experiment", "all")
    found = picture(target, "all")
    assert ({}, "active") == (found["tags"], found["stage"])
    assert ["r", "r"] == [run["name"] for run in found["runs"]]
    assert [("m", "<r>")] * 2 == [(model["name"], model["source"]) for model in found["models"]]
    assert 2 == len(found["traces"])


def test_a_database_that_was_lost_is_filled_again(
    sqlite_uri: str, empty_database: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the runs that are kept after delivery; at a database that has lost nothing, nothing is made twice."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    uri, file = f"outbox+{sqlite_uri}", Path(sqlite_uri.removeprefix("sqlite:///"))
    with tracking(uri, tmp_path / "outbox") as mlflow:
        for name in ("fluent", "model", "traces"):
            plugin_scenarios.ALL[name](mlflow, name, plugin_scenarios.nothing)
        mlflow.flush_trace_async_logging()
        deliver(uri)
        expected = {name: picture(sqlite_uri, name) for name in ("fluent", "model", "traces")}
    for state in ("whole", "lost"):
        if state == "lost":
            file.unlink()
            empty_database(file)
            forget_engines()
        assert 0 == command("replay", the_outbox(tmp_path / "outbox"), "--again")
        for name, before in expected.items():
            assert [] == differences(before, picture(sqlite_uri, name)), state


@pytest.mark.parametrize("command_line", [("replay",), ("flush", "-d")], ids=lambda words: words[0])
def test_what_was_begun_to_be_sent_once_more_is_sent_so_to_its_end_whoever_goes_on_with_it(
    command_line: tuple[str, ...],
    own_mlflow_server: Callable[..., MlflowServer],
    experiment_name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A server that was wiped knows neither run nor model, and what it has by the experiment's id is another one."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    server = own_mlflow_server()
    with tracking(f"outbox+{server.url}", tmp_path / "outbox", worker="none") as mlflow:
        mlflow.set_experiment(experiment_name)
        with mlflow.start_run(run_name="r"):
            mlflow.log_metric("m", 1.0)
            mlflow.initialize_logged_model(name="m")
    outbox = the_outbox(tmp_path / "outbox")
    assert 0 == command("replay", outbox)
    before = picture(server.url, experiment_name)
    server.wipe()
    server.start()
    with client(server.url) as api:
        api.create_experiment(f"{experiment_name} of somebody else")
    assert 3 == command("replay", outbox, "--again", "--timeout", 0)
    assert 0 == command(*command_line, outbox, "--timeout", 60)
    assert [] == differences(before, picture(server.url, experiment_name))
    assert [] == the_runs(server.url, f"{experiment_name} of somebody else")


def test_a_model_that_was_sent_once_more_before_an_interruption_is_named_by_its_new_id_after_it(
    own_mlflow_server: Callable[..., MlflowServer],
    experiment_name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its run is filed by then, and not among those that are still to be sent."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    server = own_mlflow_server()
    with tracking(f"outbox+{server.url}", tmp_path / "outbox", worker="none", create_timeout=20) as mlflow:
        mlflow.set_experiment(experiment_name)
        with mlflow.start_run(run_name="trained") as run:
            model = mlflow.initialize_logged_model(name="m")
        with mlflow.start_run(run_name="judged"):
            mlflow.set_tag("best", model.model_id)
    outbox = the_outbox(tmp_path / "outbox")
    assert 0 == command("replay", outbox)
    server.wipe()
    server.start()
    assert 3 == command("replay", outbox, "--again", "--timeout", 0)
    assert 0 == command("replay", outbox / "runs" / run.info.run_id, "--timeout", 60)
    assert 0 == command("flush", "-d", outbox, "--timeout", 60)
    with client(server.url) as api:
        (made,) = api.search_logged_models([api.get_experiment_by_name(experiment_name).experiment_id])
    found = {run.info.run_name: run.data.tags.get("best") for run in the_runs(server.url, experiment_name)}
    assert {"trained": None, "judged": made.model_id} == found


def test_what_is_logged_to_the_new_server_meanwhile_is_no_copy(
    own_mlflow_server: Callable[..., MlflowServer],
    experiment_name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its experiment has the number that another one had at the wiped server: a second model went into that one."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    server, other = own_mlflow_server(), f"{experiment_name}-new"
    uri = f"outbox+{server.url}"
    with tracking(uri, tmp_path / "outbox", worker="none") as mlflow:
        mlflow.set_experiment(experiment_name)
        with mlflow.start_run(run_name="old"):
            mlflow.initialize_logged_model(name="old")
    outbox = the_outbox(tmp_path / "outbox")
    assert 0 == command("replay", outbox)
    server.wipe()
    server.start()
    with client(server.url) as api:
        api.create_experiment(other)
    assert 3 == command("replay", outbox, "--again", "--timeout", 0)
    with tracking(uri, tmp_path / "outbox", worker="none", create_timeout=20) as mlflow:
        mlflow.set_experiment(other)
        with mlflow.start_run(run_name="new"):
            mlflow.initialize_logged_model(name="new")
    assert 0 == command("flush", "-d", outbox, "--timeout", 60)
    found: dict[str, list[str]] = {}
    with client(server.url) as api:
        for name in (experiment_name, other):
            number = api.get_experiment_by_name(name).experiment_id
            found[name] = [model.name for model in api.search_logged_models([number])]
    assert {experiment_name: ["old"], other: ["new"]} == found


@pytest.mark.parametrize("how", ["imported", "as a bundle", "elsewhere", "from a directory"])
def test_a_run_that_is_taken_alone_from_what_began_offline_arrives_in_the_experiment_of_its_name(
    how: str,
    mlflow_server: MlflowServer,
    sqlite_uri: str,
    experiment_name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What says how the experiment is called is not taken along, and its provisional id is nobody's."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with FaultProxy(mlflow_server.url) as proxy:
        proxy.down()
        with tracking(f"outbox+{proxy.url}", tmp_path / "outbox", worker="none", create_timeout=0) as mlflow:
            mlflow.set_experiment(experiment_name)
            with mlflow.start_run(run_name="alone") as run:
                mlflow.log_metric("m", 1.0)
                mlflow.initialize_logged_model(name="m")
            with mlflow.start_run(run_name="another"):
                mlflow.log_metric("m", 2.0)
        proxy.up()
        outbox, bundle = the_outbox(tmp_path / "outbox"), tmp_path / "run.tar"
        assert 0 == command("export", run.info.run_id, "-d", outbox, "-o", bundle)
        if how == "imported":
            assert 0 == command("import", bundle, "-d", tmp_path / "here")
            assert 0 == command("flush", "-d", tmp_path / "here", "--timeout", 60)
        elif how == "from a directory":
            outbox.chmod(0o755)  # somebody else's is only read, too
            assert 0 == command("replay", outbox / "runs" / run.info.run_id, "--timeout", 60)
        else:
            to = ("--to", sqlite_uri) if how == "elsewhere" else ()
            assert 0 == command("replay", bundle, *to, "--timeout", 60)
    found = picture(sqlite_uri if how == "elsewhere" else mlflow_server.url, experiment_name)
    assert ["alone"] == [one["name"] for one in found["runs"]]
    assert ["m"] == [one["name"] for one in found["models"]]


@pytest.mark.parametrize("same_process", [True, False])
def test_a_run_that_was_sent_again_goes_on_under_the_id_that_its_program_knows(
    same_process: bool,
    own_mlflow_server: Callable[..., MlflowServer],
    experiment_name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A wiped server gave it another one: reads, writes and files of run and model take the first one as before."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    server = own_mlflow_server()
    uri = f"outbox+{server.url}"
    with contextlib.ExitStack() as program:
        mlflow = program.enter_context(tracking(uri, tmp_path / "outbox", worker="none"))
        mlflow.set_experiment(experiment_name)
        with mlflow.start_run() as run:
            mlflow.log_metric("m", 1.0)
            mlflow.log_text("hello", "a.txt")
            model = mlflow.initialize_logged_model(name="m", source_run_id=run.info.run_id)
        assert 0 == command("replay", the_outbox(tmp_path / "outbox"))
        server.wipe()
        server.start()
        assert 0 == command("replay", the_outbox(tmp_path / "outbox"), "--again")
        if not same_process:
            program.close()
            program.enter_context(tracking(uri, tmp_path / "outbox", worker="none"))
        eventually(lambda: not store(uri).server.is_away(), message="the pause after the outage is over")
        assert {"m": 1.0} == mlflow.get_run(run.info.run_id).data.metrics
        assert [1.0] == [point.value for point in mlflow.MlflowClient().get_metric_history(run.info.run_id, "m")]
        assert "hello" == mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/a.txt")
        assert model.model_id == mlflow.get_logged_model(model.model_id).model_id
        with mlflow.start_run(run_id=run.info.run_id):
            mlflow.log_metric("m", 2.0, step=1)
        mlflow.set_logged_model_tags(model.model_id, {"late": "yes"})
        assert 0 == command("replay", the_outbox(tmp_path / "outbox"))
    found = picture(server.url, experiment_name)
    assert [[[0, "1.0"], [1, "2.0"]]] == [one["metrics"]["m"] for one in found["runs"]]
    assert ["yes"] == [one["tags"].get("late") for one in found["models"]]


@pytest.mark.parametrize("how", ["the same bundle", "one without an outbox's id", "another one", "the outbox"])
def test_what_was_done_to_an_experiment_is_done_once_however_often_its_bundle_is_replayed(
    how: str, sqlite_uri: str, experiment_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a person changed there since then stays."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with tracking("outbox+http://127.0.0.1:9", tmp_path / "outbox", worker="none", create_timeout=0) as mlflow:
        mlflow.set_experiment(experiment_name)
        mlflow.set_experiment_tag("stage", "first")
        with mlflow.start_run():
            mlflow.log_param("a", 1)
    outbox, bundle, second = the_outbox(tmp_path / "outbox"), tmp_path / "runs.tar", tmp_path / "second.tar"
    if how == "one without an outbox's id":
        write_bundle(bundle, find_runs(outbox).runs, resolve("http://127.0.0.1:9"), now_ms=1)
    else:
        for target in (bundle, second):
            assert 0 == command("export", "--all", "-d", outbox, "-o", target)
    assert 0 == command("replay", bundle, "--to", sqlite_uri)
    with client(sqlite_uri) as there:
        number = there.get_experiment_by_name(experiment_name).experiment_id
        assert "first" == there.get_experiment(number).tags["stage"]
        there.set_experiment_tag(number, "stage", "a person's")
        again = {"another one": second, "the outbox": outbox}.get(how, bundle)
        assert 0 == command("replay", again, "--to", sqlite_uri)
        assert "a person's" == there.get_experiment(number).tags["stage"]


def forget_engines() -> None:
    """Let MLflow forget its connections to databases, which it keeps by their URIs for ever."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    for engine in SqlAlchemyStore._engine_map.values():
        engine.dispose()


def test_a_name_that_was_given_again_leads_each_run_to_its_own_experiment(
    sqlite_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """Offline, the first one was renamed. A replay found both by their name: it never ended, and one got all runs."""
    with tracking(NOWHERE, tmp_path / "outbox", create_timeout=0) as mlflow:
        api = mlflow.MlflowClient()
        first = api.create_experiment(experiment_name, tags={"a": "b"})
        api.create_run(first, run_name="first")
        api.rename_experiment(first, f"{experiment_name} renamed")
        api.create_run(api.create_experiment(experiment_name), run_name="second")
    assert 0 == command("replay", tmp_path / "outbox", "--to", sqlite_uri, "--timeout", 30)
    for name, run, tags in ((f"{experiment_name} renamed", "first", {"a": "b"}), (experiment_name, "second", {})):
        with client(sqlite_uri) as api:
            assert tags == {k: v for k, v in api.get_experiment_by_name(name).tags.items() if "mlflow" not in k}
        assert [run] == [found.info.run_name for found in the_runs(sqlite_uri, name)]
