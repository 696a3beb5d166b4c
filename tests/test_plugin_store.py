"""The plugin's manners: waits that end, ids that stay good, errors at the call, answers as without an outbox."""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from contents import client
from mlflow_outbox.spool import provisional
from mlflow_outbox.testing.faults import accept_hang, delay, forward_then_drop_response
from mlflow_outbox.testing.proxy import FaultProxy
from plugin_world import NOWHERE, away, deliver, forget, picture, register, store, the_runs, tracking
from servers import MlflowServer, eventually

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
    with away(mlflow_server, tmp_path) as (mlflow, proxy, uri):
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


def test_a_create_that_takes_longer_than_it_is_waited_for_leaves_one_run(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """The worker makes the run at once, the server makes another later, and that one is gone while the run goes on."""

    def active() -> list[dict[str, float]]:
        held = the_runs(mlflow_server.url, experiment_name)
        return [run.data.metrics for run in held if run.info.lifecycle_stage == "active"]

    with FaultProxy(mlflow_server.url) as proxy:
        uri = f"outbox+{proxy.url}"
        with tracking(uri, tmp_path, create_timeout=4, request_timeout=8) as mlflow:
            mlflow.set_experiment(experiment_name)
            proxy.on("runs/create", delay(5), times=1)
            with mlflow.start_run() as run:
                assert provisional.is_provisional(run.info.run_id)
                mlflow.log_metric("m", 2.0)
                eventually(
                    lambda: 2 <= len([r for r in proxy.requests if "runs/create" in r.path and r.backend_status == 200])
                )
                eventually(lambda: [{"m": 2.0}] == active())


def test_a_model_whose_create_takes_longer_than_it_is_waited_for_is_there_once(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """The worker makes it at once, the server makes another later, and that one is gone when the run has ended.

    One that says the same of itself and is of another run, from somebody who replays the same files, is left alone.
    """

    def is_create(method: str, path: str) -> bool:
        return method == "POST" and path.endswith("/logged-models")

    with FaultProxy(mlflow_server.url) as proxy:
        uri = f"outbox+{proxy.url}"
        with tracking(uri, tmp_path, create_timeout=4, request_timeout=8) as mlflow:
            mlflow.set_experiment(experiment_name)
            with mlflow.start_run() as run:
                assert not provisional.is_provisional(run.info.run_id), "the server was too slow for the test"
                proxy.on(is_create, delay(5), times=1)
                model = mlflow.initialize_logged_model(name="m", source_run_id=run.info.run_id)
                assert provisional.is_provisional(model.model_id)
                eventually(
                    lambda: (
                        2 <= len([r for r in proxy.requests if is_create(r.method, r.path) and r.backend_status == 200])
                    )
                )
                mlflow.set_logged_model_tags(model.model_id, {"stage": "last"})
                with client(mlflow_server.url) as api:
                    number = api.get_experiment_by_name(experiment_name).experiment_id
                    other, mark = api.create_run(number).info.run_id, {provisional.MODEL_ID_TAG: model.model_id}
                    api.create_logged_model(number, name="theirs", source_run_id=other, tags=mark)
            deliver(uri)
            with client(mlflow_server.url) as api:  # one request: what is read model by model may be deleted meanwhile
                eventually(lambda: 2 == len(api.search_logged_models([number])))
            ours, theirs = picture(mlflow_server.url, experiment_name)["models"]
            assert ("m", "last", "theirs") == (ours["name"], ours["tags"]["stage"], theirs["name"])


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
            assert time.monotonic() - begin < 25.0, "a deadline for each call would be 50 s"


def test_a_server_that_is_slow_is_waited_for_by_what_only_it_can_answer(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """A busy server is no outage: a run is made without it, and a model is registered there all the same."""
    with client(mlflow_server.url) as api:
        number = api.create_experiment(experiment_name)
        theirs = api.create_run(number, run_name="theirs").info.run_id
        api.log_text(theirs, "x", "x.txt")
        model = api.create_logged_model(number, name="m").model_id
    with FaultProxy(mlflow_server.url) as proxy:
        uri = f"outbox+{proxy.url}"
        proxy.on("", delay(0.8), times=None)
        with tracking(uri, tmp_path, create_timeout=0.3) as mlflow:
            for call, expected in (
                (lambda api: api.create_registered_model(experiment_name).name, experiment_name),
                (lambda api: api.get_run(theirs).info.run_name, "theirs"),
                (lambda api: api.get_logged_model(model).name, "m"),
                (lambda api: [file.path for file in api.list_artifacts(theirs)], ["x.txt"]),
                (lambda api: theirs in [one.info.run_id for one in api.search_runs([number])], True),
                (lambda api: experiment_name in [one.name for one in api.search_experiments()], True),
            ):
                assert provisional.is_provisional(mlflow.MlflowClient().create_run(number).info.run_id)
                assert store(uri).server.is_away()
                assert expected == call(mlflow.MlflowClient())
            proxy.clear()
            deliver(uri)


def test_a_server_that_hangs_is_waited_for_once_by_what_only_it_can_answer(tmp_path: Path) -> None:
    """After that the pause is everybody's, and what comes of its end is a short question's again."""
    from mlflow.exceptions import MlflowException

    with FaultProxy(NOWHERE.removeprefix("outbox+")) as proxy:
        proxy.on("", accept_hang(), times=None)
        waits = {"create_timeout": 0.25, "read_timeout": 1.0, "exit_timeout": 0, "worker": "none"}
        with tracking(f"outbox+{proxy.url}", tmp_path, **waits) as mlflow:
            api = mlflow.MlflowClient()
            api.create_run("0")
            server = store(f"outbox+{proxy.url}").server
            server._pause = 30.0  # as after some more failures
            asked = len(proxy.requests)
            for _ in range(3):
                for call in (lambda: api.create_registered_model("m"), lambda: api.get_run(uuid.uuid4().hex)):
                    with pytest.raises(MlflowException, match="needs the tracking server"):
                        call()
            assert asked + 1 == len(proxy.requests)


def test_a_search_in_an_experiment_that_began_offline_waits_once_and_not_each_time(
    experiment_name: str, tmp_path: Path
) -> None:
    """Nothing of it can be asked for, but that the server is away is found out all the same, and remembered."""
    with tracking(NOWHERE, tmp_path, exit_timeout=0, create_timeout=4) as mlflow:
        number = mlflow.set_experiment(experiment_name).experiment_id
        with mlflow.start_run():
            mlflow.log_metric("m", 1.0)
        server = store(NOWHERE).server
        for _ in range(3):
            eventually(lambda: not server.is_away(), 60, "the pause after a failure is over")
            begin = time.monotonic()
            assert 1 == len(mlflow.search_runs([number]))
            assert [] == mlflow.MlflowClient().search_logged_models([number])
            assert time.monotonic() - begin < 4.0, "that is one wait"


@pytest.mark.parametrize("worker", ["thread", "process"])
def test_what_needs_the_server_is_asked_at_once_when_a_delivery_says_that_it_is_back(
    worker: str, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Whoever was told that all has arrived need not wait for the end of a pause; one more failure begins a new one."""
    from mlflow.exceptions import MlflowException

    with away(mlflow_server, tmp_path, worker=worker) as (mlflow, proxy, uri):
        number = mlflow.set_experiment(experiment_name).experiment_id
        server = store(uri).server
        eventually(lambda: not server.is_away(), message="the pause after the first failure is over")
        server._pause = 30.0  # as after some more of them
        with pytest.raises(MlflowException, match="needs the tracking server"):
            mlflow.search_experiments()
        mlflow.MlflowClient().create_run(number)
        proxy.up()
        deliver(uri)
        assert [experiment_name] == [
            one.name for one in mlflow.search_experiments(filter_string=f"name = '{experiment_name}'")
        ]
        proxy.down()
        with pytest.raises(MlflowException, match="needs the tracking server"):
            mlflow.search_experiments()
        assert server.is_away()


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


def test_a_run_from_elsewhere_is_shown_as_the_server_said_last_while_it_is_away(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """With what was logged since; a process that has not asked says that it needs the server, and takes writes."""
    from mlflow.exceptions import MlflowException

    with client(mlflow_server.url) as api:
        number = api.create_experiment(experiment_name)
        theirs = api.create_run(number, run_name="theirs", tags={"t": "x", "u": "y"})
        api.log_param(theirs.info.run_id, "lr", "0.1")
        api.log_metric(theirs.info.run_id, "m", 1.0, step=1)
    run_id = theirs.info.run_id
    with FaultProxy(mlflow_server.url) as proxy:
        uri = f"outbox+{proxy.url}"
        with tracking(uri, tmp_path) as mlflow:
            mlflow.MlflowClient().log_metric(run_id, "m", 2.0, step=2)
            proxy.down()
            for step in (3, 4):
                mlflow.MlflowClient().log_metric(run_id, "m", float(step), step=step)
                mlflow.MlflowClient().delete_tag(run_id, "t" if step == 3 else "set by others meanwhile")
                seen = mlflow.get_run(run_id)
                assert (number, "theirs") == (seen.info.experiment_id, seen.info.run_name)
                assert theirs.info.start_time == seen.info.start_time
                assert ({"lr": "0.1"}, {"m": float(step)}) == (seen.data.params, seen.data.metrics)
                assert {"u": "y", "mlflow.runName": "theirs"} == dict(seen.data.tags)
        with tracking(uri, tmp_path, poll_interval=0.03) as mlflow:  # with a store of its own
            mlflow.MlflowClient().delete_tag(run_id, "u")
            with pytest.raises(MlflowException, match="needs the tracking server"):
                mlflow.get_run(run_id)
            proxy.up()
            deliver(uri)
    (found,) = the_runs(mlflow_server.url, experiment_name)
    assert {"m": 4.0} == found.data.metrics
    assert {"mlflow.runName": "theirs"} == dict(found.data.tags)


@pytest.mark.parametrize(
    ("what", "call"),
    [
        ("model registry", lambda mlflow: mlflow.MlflowClient().create_registered_model("m")),
        ("search for runs", lambda mlflow: mlflow.search_runs(["0"])),
        ("search_experiments", lambda mlflow: mlflow.search_experiments()),
        ("the run", lambda mlflow: mlflow.get_run(uuid.uuid4().hex)),
        ("create_assessment", lambda mlflow: mlflow.log_feedback(trace_id="tr-1", name="good", value=True)),
        ("delete_traces", lambda mlflow: mlflow.MlflowClient().delete_traces("0", trace_ids=["tr-1"])),
    ],
)
def test_what_only_the_server_knows_fails_at_once_and_says_so(what: str, call: Any, tmp_path: Path) -> None:
    """Without trying again, with MLflow's code for "later", the address, and what becomes of the data."""
    from mlflow.exceptions import MlflowException

    with tracking(NOWHERE, tmp_path, exit_timeout=0) as mlflow:
        begin = time.monotonic()
        with pytest.raises(MlflowException, match=r"needs the tracking server, and http://127\.0\.0\.1:9") as raised:
            call(mlflow)
        assert time.monotonic() - begin < 30.0, "MLflow's own client tries for four minutes"
    assert "TEMPORARILY_UNAVAILABLE" == raised.value.error_code, what
    assert what in str(raised.value)
    is_write = what in {"model registry", "create_assessment", "delete_traces"}
    assert is_write == ("This call was not kept: make it again when the server is back." in str(raised.value))
    assert is_write == ("What was logged is kept and will be delivered; ask again" not in str(raised.value))


def test_a_write_that_the_server_may_have_carried_out_says_so(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    """Whoever made it again without a look would have it twice."""
    from mlflow.exceptions import MlflowException

    with FaultProxy(mlflow_server.url) as proxy, tracking(f"outbox+{proxy.url}", tmp_path, exit_timeout=0) as mlflow:
        proxy.on("/assessments", forward_then_drop_response())
        with pytest.raises(
            MlflowException, match="not kept: make it again when the server is back unless it was carried out"
        ):
            mlflow.log_feedback(trace_id="tr-1", name="good", value=True)


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
            (listed,) = mlflow.search_logged_models([run.info.experiment_id], output_format="list")
            assert model.model_id == listed.model_id
        shown = [run.data, found.data, mlflow.get_run(run.info.run_id).data, model, seen, listed]
        for tags in (one.tags for one in shown):
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


@pytest.mark.parametrize("kind", ["http", "sqlite"])
def test_a_disabled_outbox_leaves_what_the_uri_is_without_the_prefix(
    kind: str, mlflow_server: MlflowServer, sqlite_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """Runs, files, models and the registry are MLflow's own, at once, and nothing is kept on disk."""
    import mlflow.pyfunc

    class Same(mlflow.pyfunc.PythonModel):  # type: ignore[misc]  # mlflow is not followed by mypy
        def predict(self, context: Any, model_input: list[str]) -> list[str]:
            return model_input

    plain = {"http": mlflow_server.url, "sqlite": sqlite_uri}[kind]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_OUTBOX_DISABLED", "1")
        patch.setenv("MLFLOW_OUTBOX_DIR", str(tmp_path / "outbox"))
        patch.setenv("MLFLOW_TRACKING_URI", f"outbox+{plain}")
        register()
        forget()
        mlflow.set_experiment(experiment_name)
        with mlflow.start_run() as run:
            mlflow.log_metric("m", 1.0)
            mlflow.log_text("x", "x.txt")
            model = mlflow.pyfunc.log_model(name="same", python_model=Same(), pip_requirements=[])
        mlflow.register_model(model.model_uri, experiment_name)
        assert "x" == mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/x.txt")
        assert ["a"] == mlflow.pyfunc.load_model(f"models:/{experiment_name}/1").predict(["a"])
    forget()
    (found,) = the_runs(plain, experiment_name)
    assert {"m": 1.0} == found.data.metrics
    assert [] == [key for key in found.data.tags if key.startswith("mlflow_outbox")]
    assert not (tmp_path / "outbox").exists()


@pytest.mark.parametrize("begun", ["up", "away"])
def test_pages_hold_all_runs_each_once_whether_or_not_they_have_arrived(
    begun: str, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Of an experiment that began offline, of one at the server with runs on their way, and after delivery."""
    with FaultProxy(mlflow_server.url) as proxy:
        if begun == "away":
            proxy.down()
        uri = f"outbox+{proxy.url}"
        with tracking(uri, tmp_path, worker="none") as mlflow:
            api = mlflow.MlflowClient()
            number = api.create_experiment(experiment_name)
            for name in range(7):
                if name == 3:
                    proxy.down()
                api.create_run(number, run_name=str(name), start_time=(name * 3) % 7 + 1)

            check_pages(mlflow, number)
            proxy.up()
            eventually(lambda: not store(uri).server.is_away(), message="the pause after the outage is over")
            check_pages(mlflow, number)
        with tracking(uri, tmp_path) as mlflow:
            deliver(uri)
            check_pages(mlflow, number)


def check_pages(mlflow: Any, number: str) -> None:
    """Seven runs come in the order that was asked for, cut into pages of the size that was asked for."""

    def pages(size: int, **options: Any) -> list[list[str]]:
        found: list[list[str]] = []
        token = None
        while token is not None or not found:
            page = mlflow.MlflowClient().search_runs([number], max_results=size, page_token=token, **options)
            found.append([run.info.run_name for run in page])
            token = page.token
        return found

    assert [["2", "4"], ["6", "1"], ["3", "5"], ["0"]] == pages(2)
    assert [["0", "5", "3"], ["1", "6", "4"], ["2"]] == pages(3, order_by=["attributes.start_time ASC"])
    some = "attributes.start_time > 1 and attributes.run_name != '2' and attributes.run_name != '1'"
    assert [["4", "6"], ["3", "5"]] == pages(2, filter_string=some)
