"""The plugin's manners: waits that end, ids that stay good, errors at the call, processes, other places."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from contents import client
from mlflow_outbox.spool import provisional
from mlflow_outbox.testing.faults import accept_hang, forward_then_drop_response
from mlflow_outbox.testing.proxy import FaultProxy
from plugin_world import deliver, entry_points, picture, register, store, tracking
from servers import MlflowServer, eventually

#: A server that refuses connections: nothing listens on the discard port.
NOWHERE = "outbox+http://127.0.0.1:9"


def the_runs(uri: str, experiment: str) -> list[Any]:
    """Return all runs of an experiment, deleted ones too."""
    from mlflow.entities import ViewType

    with client(uri) as api:
        found = api.get_experiment_by_name(experiment)
        return list(api.search_runs([found.experiment_id], run_view_type=ViewType.ALL)) if found else []


# -- ids


def test_with_the_server_there_user_code_sees_its_ids(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Experiment, run and model have the server's own ids and artifact URI from the first moment."""
    with tracking(f"outbox+{mlflow_server.url}", tmp_path) as mlflow:
        number = mlflow.set_experiment(experiment_name).experiment_id
        with mlflow.start_run() as run:
            model = mlflow.initialize_logged_model(name="m")
        deliver(f"outbox+{mlflow_server.url}")
    with client(mlflow_server.url) as api:
        assert number == api.get_experiment_by_name(experiment_name).experiment_id
        assert run.info.artifact_uri == api.get_run(run.info.run_id).info.artifact_uri
        assert experiment_name == api.get_experiment(api.get_logged_model(model.model_id).experiment_id).name


def test_a_provisional_id_stays_good_after_delivery(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Reads, writes, files and a resumed run take the id that was given offline, and lead to the server's run."""
    with FaultProxy(mlflow_server.url) as proxy:
        proxy.down()
        uri = f"outbox+{proxy.url}"
        with tracking(uri, tmp_path) as mlflow:
            mlflow.set_experiment(experiment_name)
            with mlflow.start_run() as run:
                mlflow.log_metric("m", 1.0)
            local = run.info.run_id
            assert provisional.is_provisional(local)
            proxy.up()
            deliver(uri)
            eventually(lambda: not store(uri).server.is_away(), message="the pause after the outage is over")
            with mlflow.start_run(run_id=local):
                mlflow.log_metric("m", 2.0, step=1)
                mlflow.log_text("late", "late.txt")
            deliver(uri)
            assert [1.0, 2.0] == [point.value for point in mlflow.MlflowClient().get_metric_history(local, "m")]
            assert "late" == mlflow.artifacts.load_text(f"runs:/{local}/late.txt")
            assert ["m"] == list(mlflow.get_run(local).data.metrics)
    (found,) = the_runs(mlflow_server.url, experiment_name)
    assert {"m": 2.0} == found.data.metrics
    assert local == found.data.tags["mlflow_outbox.run_id"]


def test_a_create_whose_answer_was_lost_leaves_one_run_and_one_model(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """The server made both; user code goes on with provisional ids; the worker finds and adopts what was made."""
    with FaultProxy(mlflow_server.url) as proxy:
        uri = f"outbox+{proxy.url}"
        with tracking(uri, tmp_path) as mlflow:
            mlflow.set_experiment(experiment_name)
            proxy.on("runs/create", forward_then_drop_response())
            with mlflow.start_run() as run:
                eventually(lambda: not store(uri).server.is_away(), message="the pause after the failure is over")
                deliver(uri)
                proxy.on(
                    lambda method, path: method == "POST" and path.endswith("/logged-models"),
                    forward_then_drop_response(),
                )
                model = mlflow.initialize_logged_model(name="m", source_run_id=run.info.run_id)
            assert provisional.is_provisional(run.info.run_id)
            assert provisional.is_provisional(model.model_id)
            deliver(uri)
    assert 1 == len(the_runs(mlflow_server.url, experiment_name))
    assert ["m"] == [model["name"] for model in picture(mlflow_server.url, experiment_name)["models"]]


# -- waits


def test_a_server_that_hangs_costs_one_deadline(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """The first call waits for create_timeout, and those after it go on at once."""
    with FaultProxy(mlflow_server.url) as proxy:
        proxy.on("", accept_hang(), times=None)
        waits = {"create_timeout": 0.5, "exit_timeout": 0, "request_timeout": 0.5}
        with tracking(f"outbox+{proxy.url}", tmp_path, **waits) as mlflow:
            begin = time.monotonic()
            mlflow.set_experiment(experiment_name)
            with mlflow.start_run():
                for step in range(100):
                    mlflow.log_metric("m", 1.0, step=step)
                mlflow.log_text("x", "x.txt")
            assert time.monotonic() - begin < 3.0


def test_the_system_metrics_monitor_survives_an_outage(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """It asks for its run at every sample, and ends for ever at the first error or a status that is not RUNNING."""
    with FaultProxy(mlflow_server.url) as proxy:
        uri = f"outbox+{proxy.url}"
        with tracking(uri, tmp_path) as mlflow:
            mlflow.set_experiment(experiment_name)
            with mlflow.start_run() as run:
                proxy.down()
                for _ in range(3):
                    assert "RUNNING" == mlflow.get_run(run.info.run_id).info.status
            assert "FINISHED" == mlflow.get_run(run.info.run_id).info.status
            proxy.up()
            deliver(uri)


@pytest.mark.parametrize(
    ("what", "call"),
    [
        ("model registry", lambda mlflow: mlflow.MlflowClient().create_registered_model("m")),
        ("search for runs", lambda mlflow: mlflow.search_runs(["0"])),
        ("search_experiments", lambda mlflow: mlflow.search_experiments()),
        ("the run", lambda mlflow: mlflow.get_run(uuid.uuid4().hex)),
        ("log_feedback", lambda mlflow: mlflow.log_feedback(trace_id="tr-1", name="good", value=True)),
    ],
)
def test_what_only_the_server_knows_fails_at_once_and_says_so(what: str, call: Any, tmp_path: Path) -> None:
    """Within a second, with MLflow's code for "later", the address, and what becomes of the data."""
    from mlflow.exceptions import MlflowException

    with tracking(NOWHERE, tmp_path, exit_timeout=0) as mlflow:
        begin = time.monotonic()
        with pytest.raises(MlflowException, match=r"needs the tracking server, and http://127\.0\.0\.1:9") as raised:
            call(mlflow)
        assert time.monotonic() - begin < 2.0
    assert "TEMPORARILY_UNAVAILABLE" == raised.value.error_code, what


# -- errors at the call


@pytest.mark.parametrize(
    "call",
    [
        lambda mlflow: mlflow.log_metric("a$b", 1.0),
        lambda mlflow: mlflow.log_metric("m", "no number"),
        lambda mlflow: mlflow.log_param("x" * 300, 1),
        lambda mlflow: mlflow.set_tag("../up", 1),
        lambda mlflow: (mlflow.log_param("p", 1), mlflow.log_param("p", 2)),
        lambda mlflow: mlflow.log_text("x", "../../up.txt"),
        lambda mlflow: mlflow.delete_tag("never set"),
        lambda mlflow: mlflow.MlflowClient().log_metric("not-there", "m", 1.0),
        lambda mlflow: mlflow.MlflowClient().log_metric(uuid.uuid4().hex, "m", 1.0),
        lambda mlflow: mlflow.MlflowClient().create_experiment("Default"),
        lambda mlflow: mlflow.get_experiment("123456789"),
    ],
)
def test_what_mlflow_refuses_at_the_call_is_refused_at_the_call(
    call: Any, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """The same calls raise MlflowException with a plain tracking URI and with an outbox."""
    from mlflow.exceptions import MlflowException

    for uri in (mlflow_server.url, f"outbox+{mlflow_server.url}"):
        with tracking(uri, tmp_path) as mlflow:
            mlflow.set_experiment(experiment_name)
            refusals = (MlflowException, TypeError)  # protobuf refuses a text as a number
            with mlflow.start_run(), pytest.raises(refusals):
                call(mlflow)


# -- processes


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
                    child.join(30)
                assert [0, 0] == [child.exitcode for child in children]
            else:
                program(tmp_path, f"_log({run.info.run_id!r}, 0)\n_log({run.info.run_id!r}, 1)").wait(60)
        deliver(uri)
    (found,) = the_runs(mlflow_server.url, experiment_name)
    assert {"parent": 1.0, "child-0": 0.0, "child-1": 1.0} == found.data.metrics


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
        with held.server._lock, held.journals._lock, held._recent_lock, stores._building:
            child = multiprocessing.get_context("fork").Process(target=_begin_in_child, args=(experiment_name,))
            child.start()
            child.join(30)
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
    child.wait(10)
    with tracking(uri, tmp_path):
        deliver(uri)
    (found,) = picture(mlflow_server.url, experiment_name)["runs"]
    assert 300 == len(found["metrics"]["m"])
    assert [["a.txt", 5]] == found["files"]


def test_a_program_that_ends_without_ending_its_run_delivers_the_end_too(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """MLflow ends an active run and sends its last traces at the exit; both are delivered before that."""
    text = textwrap.dedent(f"""
        mlflow.set_experiment({experiment_name!r})
        mlflow.start_run(run_name="left open")
        mlflow.log_metric("m", 1.0)
        @mlflow.trace
        def traced(x):
            return x
        traced(1)
    """)
    child = program(tmp_path, text, MLFLOW_TRACKING_URI=f"outbox+{mlflow_server.url}")
    output, _ = child.communicate(timeout=60)
    assert 0 == child.returncode, output
    shown = picture(mlflow_server.url, experiment_name)
    assert [("left open", "FINISHED")] == [(run["name"], run["status"]) for run in shown["runs"]], output
    assert 1 == len(shown["traces"]), output


# -- places


def test_several_uris_in_one_process_do_not_meet(
    mlflow_server: MlflowServer, sqlite_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """Two outboxes and a plain client side by side, in threads: each store holds its own."""
    first, second = f"outbox+{mlflow_server.url}", f"outbox+{sqlite_uri}"
    with tracking(first, tmp_path) as mlflow:

        def log(uri: str) -> None:
            api = mlflow.MlflowClient(tracking_uri=uri)
            number = api.create_experiment(f"{experiment_name}-{uri.partition(':')[0]}")
            run = api.create_run(number, run_name="r")
            api.log_metric(run.info.run_id, "m", 1.0)
            api.log_text(run.info.run_id, uri, "uri.txt")
            api.set_terminated(run.info.run_id)

        uris = [first, second, mlflow_server.url]
        threads = [threading.Thread(target=log, args=(uri,)) for uri in uris]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        deliver(first)
        deliver(second)
        store(second).outbox.close(0)
    for uri in uris:
        (run,) = the_runs(uri.removeprefix("outbox+"), f"{experiment_name}-{uri.partition(':')[0]}")
        assert {"m": 1.0} == run.data.metrics


@pytest.mark.compatibility
@pytest.mark.parametrize("kind", ["sqlite", "file"])
def test_embedded_stores_work_too(
    kind: str, sqlite_uri: str, file_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """outbox+sqlite and outbox+file: runs, points, files, and what was logged is read back."""
    plain = {"sqlite": sqlite_uri, "file": file_uri}[kind]
    uri = f"outbox+{plain}"
    with tracking(uri, tmp_path) as mlflow:
        mlflow.set_experiment(experiment_name)
        with mlflow.start_run(run_name="r") as run:
            mlflow.log_metric("m", 1.0)
            mlflow.log_params({"a": 1})
            mlflow.log_text("hello", "notes/a.txt")
            assert "hello" == mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/notes/a.txt")
        deliver(uri)
    with tracking(plain, tmp_path) as mlflow:
        (found,) = mlflow.search_runs(experiment_names=[experiment_name], output_format="list")
        assert ({"m": 1.0}, {"a": "1"}, "FINISHED") == (found.data.metrics, found.data.params, found.info.status)
        assert "hello" == mlflow.artifacts.load_text(f"runs:/{found.info.run_id}/notes/a.txt")


@pytest.mark.compatibility
def test_every_entry_point_leads_somewhere() -> None:
    """Three groups of MLflow's; the schemes are those that the documentation names."""
    found = entry_points()
    assert {"mlflow.tracking_store", "mlflow.model_registry_store", "mlflow.artifact_repository"} == set(found)
    assert {
        "outbox+http",
        "outbox+https",
        "outbox+sqlite",
        "outbox+postgresql",
        "outbox+file",
        "outbox+databricks",
    } <= set(found["mlflow.tracking_store"])
    register()


def test_the_tracking_uri_alone_makes_a_program_durable(sqlite_uri: str, tmp_path: Path) -> None:
    """MLflow finds the plugin by its entry points: no import, no registration, one variable of the environment."""
    code = "import mlflow; run = mlflow.start_run(run_name='r'); mlflow.log_metric('m', 1.0); mlflow.end_run()"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    installed = {point.name for point in metadata.entry_points(group="mlflow.tracking_store")}
    if "outbox+sqlite" not in installed:  # a checkout on the path: what an installation of it would write
        written = tmp_path / "site" / "mlflow_outbox-0.dist-info"
        written.mkdir(parents=True)
        (written / "METADATA").write_text("Metadata-Version: 2.1\nName: mlflow-outbox\nVersion: 0\n")
        groups = [
            f"[{group}]\n" + "".join(f"{name} = {target}\n" for name, target in names.items())
            for group, names in entry_points().items()
        ]
        (written / "entry_points.txt").write_text("\n".join(groups))
        here = [path for path in sys.path if path.endswith(("tracker", "worker"))]
        environment["PYTHONPATH"] = os.pathsep.join([str(written.parent), *here])
    environment["MLFLOW_TRACKING_URI"] = f"outbox+{sqlite_uri}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert 0 == done.returncode, done.stderr
    assert [] != list((tmp_path / ".mlflow-outbox").iterdir())
    (run,) = the_runs(sqlite_uri, "Default")
    assert ("r", {"m": 1.0}, "FINISHED") == (run.info.run_name, run.data.metrics, run.info.status)


def test_parties_that_meet_at_a_new_database_leave_it_whole(tmp_path: Path) -> None:
    """The tables are made with the store, before a worker is there: MLflow's own store beside it finds them."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    plain = f"sqlite:///{tmp_path / 'new.db'}"
    uri = f"outbox+{plain}"
    with tracking(uri, tmp_path / "outbox") as mlflow:
        mlflow.MlflowClient()
        assert ["0"] == [found.experiment_id for found in SqlAlchemyStore(plain, str(tmp_path)).search_experiments()]
        with mlflow.start_run() as run:
            mlflow.log_metric("m", 1.0)
        deliver(uri)
        assert {"m": 1.0} == SqlAlchemyStore(plain, str(tmp_path)).get_run(run.info.run_id).data.metrics


def flushed_in_vain(uri: str) -> bool:
    """Return whether the worker tried to deliver and counts the destination as away."""
    outbox = store(uri).outbox
    left = not outbox.flush(0.1)
    loop = outbox._worker.delivery
    return left and loop is not None and loop.condition()[0] == "away"


def test_a_database_that_was_taken_away_is_not_made_anew(sqlite_uri: str, tmp_path: Path) -> None:
    """An empty one in its place would take what belongs into the other; events wait until the file is back."""
    uri = f"outbox+{sqlite_uri}"
    file = Path(sqlite_uri.removeprefix("sqlite:///"))
    with tracking(uri, tmp_path / "outbox", worker="none") as mlflow:
        with mlflow.start_run() as run:
            mlflow.log_metric("m", 1.0)
        aside = file.rename(file.with_suffix(".aside"))
        with tracking(uri, tmp_path / "outbox", worker="thread"):
            eventually(lambda: flushed_in_vain(uri), message="the worker has found no database")
            assert not file.exists()
            aside.rename(file)
            deliver(uri)
    with client(sqlite_uri) as api:
        assert {"m": 1.0} == api.get_run(run.info.run_id).data.metrics


@pytest.mark.compatibility
def test_nothing_of_mlflows_store_is_left_out(tmp_path: Path) -> None:
    """Every method of AbstractStore is the plugin's own or delegated; none is the base class's."""
    from mlflow.store.tracking.abstract_store import AbstractStore

    with tracking(NOWHERE, tmp_path, exit_timeout=0):
        kind = type(store(NOWHERE))
        bases = {part for part in AbstractStore.__mro__ if part is not object}
        left = [
            name
            for name in dir(AbstractStore)
            if not name.startswith("__")
            and callable(getattr(AbstractStore, name))
            and next(part for part in kind.__mro__ if name in part.__dict__) in bases
        ]
    assert [] == [name for name in left if not name.startswith("_abc")]


# -- as without an outbox


def test_what_was_logged_a_moment_ago_is_found_and_the_outboxs_own_tags_are_not(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """A search filters by points that are on their way; run and model show the tags that a plain client would see."""
    with tracking(f"outbox+{mlflow_server.url}", tmp_path) as mlflow:
        mlflow.set_experiment(experiment_name)
        with mlflow.start_run() as run:
            mlflow.log_metric("m", 3.0)
            (found,) = mlflow.search_runs(
                experiment_names=[experiment_name], filter_string="metrics.m > 2", output_format="list"
            )
            model = mlflow.initialize_logged_model(name="m", source_run_id=run.info.run_id)
            mlflow.log_metric("of the model", 1.0, model_id=model.model_id)
            seen = mlflow.get_logged_model(model.model_id)
            assert ["of the model"] == [point.key for point in seen.metrics]
        for tags in (run.data.tags, found.data.tags, mlflow.get_run(run.info.run_id).data.tags, model.tags, seen.tags):
            assert [] == [key for key in tags if key.startswith("mlflow_outbox")]


def test_files_in_a_directory_are_in_their_place_at_once_and_in_the_outbox_too(
    sqlite_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """Programs open what the artifact URI names; a rewritten file ends as the last one, and replays have it."""
    uri = f"outbox+{sqlite_uri}"
    (tmp_path / "files" / "empty").mkdir(parents=True)
    (tmp_path / "files" / "a.txt").write_text("one")
    with tracking(uri, tmp_path / "outbox") as mlflow:
        mlflow.set_experiment(experiment_name)
        with mlflow.start_run() as run:
            mlflow.log_artifacts(str(tmp_path / "files"), "sub")
            place = Path(mlflow.get_artifact_uri("sub").removeprefix("file://"))
            assert ["a.txt", "empty"] == sorted(os.listdir(place))
            mlflow.log_text("two", "sub/a.txt")
            assert "two" == (place / "a.txt").read_text()
            assert "two" == mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/sub/a.txt")
        deliver(uri)
        assert "two" == (place / "a.txt").read_text()
        known, _ = store(uri).files(run.info.run_id, "")
        assert ["sub/a.txt"] == list(known)


def test_the_end_of_a_run_says_where_it_can_be_looked_at(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same two lines as without an outbox; nothing for a run that the server does not have yet."""
    said = []
    for prefix in ("", "outbox+"):
        with tracking(f"{prefix}{mlflow_server.url}", tmp_path) as mlflow:
            mlflow.set_experiment(experiment_name)
            capsys.readouterr()
            with mlflow.start_run(run_name="seen") as run:
                mlflow.log_metric("m", 1.0)
            said.append(capsys.readouterr().out.replace(run.info.run_id, "<run>"))
    assert said[0] == said[1]
    assert f"{mlflow_server.url}/#/experiments/" in said[1]
    with tracking(NOWHERE, tmp_path, exit_timeout=0) as mlflow:
        with mlflow.start_run():
            pass
        assert "View run" not in capsys.readouterr().out
