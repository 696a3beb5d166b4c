"""Params and outputs of logged models through the plugin: what is there already is not changed without a word."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from contents import client
from mlflow_outbox.testing.faults import drop
from mlflow_outbox.testing.proxy import FaultProxy
from plugin_world import WAYS, away, deliver, store, the_runs, tracking, world
from servers import MlflowServer, eventually


def log_model(mlflow: Any, name: str) -> Any:
    """Log a model as users do, to the run that goes on."""

    class Same(mlflow.pyfunc.PythonModel):  # type: ignore[misc, name-defined]
        def predict(self, context: Any, model_input: list[str]) -> list[str]:
            return model_input

    return mlflow.pyfunc.log_model(name=name, python_model=Same(), pip_requirements=["mlflow"])


@pytest.mark.parametrize("way", WAYS)
def test_a_changed_param_of_a_model_is_refused_at_the_call(
    way: str, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Whether it was given at the creation or later; the first value stays, and further params are taken."""
    from mlflow.exceptions import MlflowException

    with world(way, mlflow_server, tmp_path) as here:
        mlflow = here.mlflow
        mlflow.set_experiment(experiment_name)
        model = mlflow.initialize_logged_model(name="m", params={"a": "1"})
        here.kill()
        mlflow.log_model_params({"b": "1"}, model_id=model.model_id)
        for changed in ({"a": "2"}, {"b": "2"}, {"c": "1", "a": "2"}):
            with pytest.raises(MlflowException) as raised:
                mlflow.log_model_params(changed, model_id=model.model_id)
            assert "BAD_REQUEST" == raised.value.error_code
        mlflow.log_model_params({"d": "1"}, model_id=model.model_id)
    with client(mlflow_server.url) as api:
        number = api.get_experiment_by_name(experiment_name).experiment_id
        (found,) = api.search_logged_models([number])
        assert {"a": "1", "b": "1", "d": "1"} == found.params


@pytest.mark.parametrize("way", WAYS)
def test_a_model_without_a_name_gets_one(
    way: str, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Also where the name is an empty text, as of a variable that is not set, which a server takes for none."""
    with world(way, mlflow_server, tmp_path) as here:
        api = here.mlflow.MlflowClient()
        number = api.create_experiment(experiment_name)
        here.kill()
        made = {api.create_logged_model(number, name="").name}
    with client(mlflow_server.url) as api:
        number = api.get_experiment_by_name(experiment_name).experiment_id
        assert made == {model.name for model in api.search_logged_models([number])} != {""}


def test_another_process_knows_the_params_of_a_model_from_the_outbox(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Also when they were delivered in the meantime."""
    from mlflow.exceptions import MlflowException

    uri = f"outbox+{mlflow_server.url}"
    with tracking(uri, tmp_path) as mlflow:
        mlflow.set_experiment(experiment_name)
        with mlflow.start_run() as run:
            model = mlflow.initialize_logged_model(name="m", params={"a": "1"}, source_run_id=run.info.run_id)
            deliver(uri)
            changed = pytest.raises(MlflowException, match="Changing param values")
            with tracking(uri, tmp_path, poll_interval=0.03) as other, changed:  # with a store and journals of its own
                other.MlflowClient().log_model_params(model.model_id, {"a": "2"})


def test_a_param_that_somebody_else_gave_another_value_is_a_dead_letter(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """The call cannot know it. The same value is no trouble, and the params beside it arrive."""
    with FaultProxy(mlflow_server.url) as proxy:
        uri = f"outbox+{proxy.url}"
        with tracking(uri, tmp_path) as mlflow:
            mlflow.set_experiment(experiment_name)
            model = mlflow.initialize_logged_model(name="m")
            deliver(uri)
            with client(mlflow_server.url) as api:
                api.log_model_params(model.model_id, {"theirs": "1", "same": "1"})
            mlflow.log_model_params({"mine": "1", "theirs": "2", "same": "1"}, model_id=model.model_id)
            result = store(uri).outbox.flush(60)
            assert (0, 0, 1) == (result.pending, result.parked, result.dead)
    with client(mlflow_server.url) as api:
        assert {"mine": "1", "theirs": "1", "same": "1"} == api.get_logged_model(model.model_id).params


def test_a_file_store_overwrites_the_param_of_a_model(file_uri: str, experiment_name: str, tmp_path: Path) -> None:
    """As it does without an outbox."""
    uri = f"outbox+{file_uri}"
    with tracking(uri, tmp_path / "outbox") as mlflow:
        mlflow.set_experiment(experiment_name)
        model = mlflow.initialize_logged_model(name="m", params={"a": "1"})
        mlflow.log_model_params({"a": "2"}, model_id=model.model_id)
        deliver(uri)
        assert {"a": "2"} == mlflow.get_logged_model(model.model_id).params


@pytest.mark.parametrize("way", WAYS)
def test_a_model_is_an_output_of_a_run_once(
    way: str, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """A second time is refused at the call, with all that came with it."""
    from mlflow.entities import LoggedModelOutput
    from mlflow.exceptions import MlflowException

    with world(way, mlflow_server, tmp_path) as here:
        mlflow = here.mlflow
        mlflow.set_experiment(experiment_name)
        api = mlflow.MlflowClient()
        with mlflow.start_run() as run:
            names = ["a", "b", "c"]
            one, two, three = (
                LoggedModelOutput(mlflow.initialize_logged_model(name=name).model_id, 1) for name in names
            )
            api.log_outputs(run.info.run_id, [one])
            here.kill()
            for again in ([one], [one, two], [two, two]):
                with pytest.raises(MlflowException) as raised:
                    api.log_outputs(run.info.run_id, again)
                assert "BAD_REQUEST" == raised.value.error_code
            api.log_outputs(run.info.run_id, [three])
    (found,) = the_runs(mlflow_server.url, experiment_name)
    with client(mlflow_server.url) as plain:
        made = sorted(plain.get_logged_model(model.model_id).name for model in found.outputs.model_outputs)
    assert ["a", "c"] == made


@pytest.mark.parametrize("way", WAYS)
def test_each_model_of_a_run_has_the_metrics_that_were_logged_before_it(
    way: str, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """MLflow copies those that are linked to no model yet, and so says a history of all, also on their way."""
    with world(way, mlflow_server, tmp_path) as here:
        mlflow = here.mlflow
        mlflow.set_experiment(experiment_name)
        here.kill()
        with mlflow.start_run() as run:
            for number, name in enumerate(("first", "second", "third")):
                mlflow.log_metric(f"before {name}", number / 4)
                log_model(mlflow, name)
            history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "before second")
            assert [(0.25, None)] == [(point.value, point.model_id) for point in history]
    with client(mlflow_server.url) as api:
        found = api.search_logged_models([api.get_experiment_by_name(experiment_name).experiment_id])
        assert {
            "first": ["before first", "before second", "before third"],  # MLflow links later ones to the first model
            "second": ["before first", "before second"],
            "third": ["before first", "before second", "before third"],
        } == {model.name: sorted(metric.key for metric in model.metrics) for model in found}


@pytest.mark.parametrize("begun", ["away", "killed"])
def test_either_id_of_a_run_that_began_offline_finds_its_models_after_delivery(
    begun: str, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """MLflow looks for the model of ``runs:/<id>/<name>`` by the id that it was given, in a later process too."""
    with FaultProxy(mlflow_server.url) as proxy:
        uri = f"outbox+{proxy.url}"
        with tracking(uri, tmp_path) as mlflow:
            if begun == "away":
                proxy.down()
            number = mlflow.set_experiment(experiment_name).experiment_id
            proxy.down()
            with mlflow.start_run() as run:
                made = log_model(mlflow, "net").model_id
            proxy.up()
            deliver(uri)
            eventually(lambda: not store(uri).server.is_away(), message="the pause after the outage is over")
            (there,) = the_runs(mlflow_server.url, experiment_name)
            (model,) = there.outputs.model_outputs
            assert made != model.model_id
            assert_found(mlflow, number, run.info.run_id, made)
            assert_found(mlflow, number, there.info.run_id, made)
            assert model.model_id == mlflow.get_logged_model(model.model_id).model_id
            assert_found(mlflow, number, run.info.run_id, model.model_id)
        with tracking(uri, tmp_path) as mlflow:
            assert_found(mlflow, number, there.info.run_id, model.model_id)
            assert made == mlflow.get_logged_model(made).model_id
            assert_found(mlflow, number, run.info.run_id, made)


def assert_found(mlflow: Any, experiment: str, run_id: str, model_id: str) -> None:
    """All answers call a run and its model by these ids once the run was asked for by its own."""
    api = mlflow.MlflowClient()
    assert "net/MLmodel" in [file.path for file in api.list_artifacts(run_id, "net")]
    assert ["x"] == mlflow.pyfunc.load_model(f"runs:/{run_id}/net").predict(["x"])
    assert mlflow.register_model(f"runs:/{run_id}/net", f"net of {run_id}").version
    filters = {"filter_string": f"source_run_id = '{run_id}'", "output_format": "list"}
    (found,) = mlflow.search_logged_models(experiment_ids=[experiment], **filters)
    expected = (model_id, f"models:/{model_id}", run_id, experiment)
    assert expected == (found.model_id, found.model_uri, found.source_run_id, found.experiment_id)
    run = api.get_run(run_id)
    assert [model_id] == [output.model_id for output in run.outputs.model_outputs]
    (searched,) = api.search_runs([experiment])
    assert (run_id, experiment) == (searched.info.run_id, searched.info.experiment_id)
    assert [model_id] == [output.model_id for output in searched.outputs.model_outputs]
    held = mlflow.get_logged_model(model_id)
    assert expected[:3] == (held.model_id, held.model_uri, held.source_run_id)


def test_models_are_searched_by_their_metrics_at_the_server_alone(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """An answer without points that other runs or programs logged would be wrong; the call says what it needs."""
    from mlflow.exceptions import MlflowException

    with away(mlflow_server, tmp_path) as (mlflow, proxy, uri):
        number = mlflow.set_experiment(experiment_name).experiment_id
        with mlflow.start_run():
            for name, value in (("good", 0.9), ("bad", 0.5)):
                made = mlflow.initialize_logged_model(name=name, params={"metrics.acc": name})
                mlflow.log_metric("acc", value, model_id=made.model_id)

        def found(**options: Any) -> list[str]:
            return [model.name for model in mlflow.search_logged_models([number], output_format="list", **options)]

        by_filter: dict[str, Any] = {"filter_string": "name != 'x' AND metrics.acc > 0.7"}
        by_order: dict[str, Any] = {"order_by": [{"field_name": "metrics.acc", "ascending": False}]}
        by_dataset: dict[str, Any] = {"datasets": [{"dataset_name": "table"}]}
        for by in (by_filter, by_order, by_dataset):
            with pytest.raises(MlflowException, match="models by their metrics needs the tracking server"):
                found(**by)
        assert ["good"] == found(filter_string="params.`metrics.acc` = 'good'")
        proxy.up()
        deliver(uri)
        eventually(lambda: not store(uri).server.is_away(), message="the pause after the outage is over")
        assert (["good"], ["good", "bad"]) == (found(**by_filter), found(**by_order))


def test_a_model_shows_the_metrics_of_its_run_while_the_server_is_away(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Those of other runs only the server puts together, and shows when it is back."""
    with away(mlflow_server, tmp_path) as (mlflow, proxy, uri):
        mlflow.set_experiment(experiment_name)
        with mlflow.start_run() as run:
            one, other = (mlflow.initialize_logged_model(name=name) for name in ("one", "other"))
            for step in range(2):
                mlflow.log_metric("acc", step / 2, step=step, model_id=one.model_id)
            mlflow.log_metrics({"acc": 0.9, "loss": 0.1}, model_id=other.model_id)
        with mlflow.start_run():
            mlflow.log_metric("later", 1.0, model_id=one.model_id)

        def shown(model_id: str) -> list[tuple[str, float, int]]:
            return sorted((m.key, m.value, m.step) for m in mlflow.get_logged_model(model_id).metrics or ())

        assert [("acc", 0.0, 0), ("acc", 0.5, 1)] == shown(one.model_id)
        assert [("acc", 0.9, 0), ("loss", 0.1, 0)] == shown(other.model_id)
        assert {run.info.run_id} == {m.run_id for m in mlflow.get_logged_model(one.model_id).metrics}
        (listed, _) = mlflow.search_logged_models(output_format="list", order_by=[{"field_name": "name"}])
        assert 2 == len(listed.metrics)
        proxy.up()
        deliver(uri)
        eventually(lambda: not store(uri).server.is_away(), message="the pause after the outage is over")
        assert [("acc", 0.0, 0), ("acc", 0.5, 1), ("later", 1.0, 0)] == shown(one.model_id)


def test_what_is_logged_with_a_dataset_shows_the_dataset_once(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """MLflow sends it once for each metric of a call, in one request; the server keeps it once."""
    import pandas as pd

    with away(mlflow_server, tmp_path) as (mlflow, proxy, uri):
        mlflow.set_experiment(experiment_name)
        table = mlflow.data.from_pandas(pd.DataFrame({"x": [1.0]}), name="table")
        with mlflow.start_run() as run:
            mlflow.log_metrics({"a": 1.0, "b": 2.0, "c": 3.0}, dataset=table)

        def datasets() -> list[str]:
            return [one.dataset.name for one in mlflow.get_run(run.info.run_id).inputs.dataset_inputs]

        assert ["table"] == datasets()
        proxy.up()
        deliver(uri)
        assert ["table"] == datasets()


@pytest.mark.parametrize("way", WAYS)
def test_points_of_a_model_that_are_logged_within_a_millisecond_are_all_kept(
    way: str, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """A database has one of them for each run, step and millisecond; calls that wait for a server are further apart."""
    with world(way, mlflow_server, tmp_path) as here:
        mlflow = here.mlflow
        mlflow.set_experiment(experiment_name)
        with mlflow.start_run() as run:
            model = mlflow.initialize_logged_model(name="m", source_run_id=run.info.run_id)
            here.kill()
            for number in range(30):
                mlflow.log_metric("loss", number / 2, model_id=model.model_id)
            for number in range(5):
                mlflow.log_metrics({"a": number, "b": -number}, step=7, model_id=model.model_id)
    with client(mlflow_server.url) as api:
        (found,) = api.search_logged_models([api.get_experiment_by_name(experiment_name).experiment_id])
        held = Counter((point.key, point.step, point.value) for point in found.metrics)
        (run,) = the_runs(mlflow_server.url, experiment_name)
        history = [point.value for point in api.get_metric_history(run.info.run_id, "loss")]
    expected = [("loss", 0, number / 2) for number in range(30)]
    expected += [(key, 7, sign * number) for number in range(5) for key, sign in (("a", 1), ("b", -1))]
    assert Counter(expected) == held
    assert [number / 2 for number in range(30)] == sorted(history)


@pytest.mark.parametrize("kind", ["server", "sqlite"])
def test_a_point_of_a_model_that_mlflow_takes_only_once_is_a_dead_letter(
    kind: str, mlflow_server: MlflowServer, experiment_name: str, sqlite_uri: str, tmp_path: Path
) -> None:
    """Another value at a step and a time of the program's choice; what is beside it and what follows arrives."""
    from mlflow.entities import Metric

    plain = {"server": mlflow_server.url, "sqlite": sqlite_uri}[kind]
    uri = f"outbox+{plain}"
    with tracking(uri, tmp_path) as mlflow:
        mlflow.set_experiment(experiment_name)
        api = mlflow.MlflowClient()
        with mlflow.start_run() as run:
            model = mlflow.initialize_logged_model(name="m").model_id
            for value in (1.0, 2.0, 1.0):
                api.log_metric(run.info.run_id, "alone", value, timestamp=1000, step=1, model_id=model)
            for values in ({"a": 1.0, "b": 1.0}, {"a": 2.0, "b": 1.0, "c": 1.0}):
                points = [Metric(key, value, 1000, 1, model) for key, value in values.items()]
                api.log_batch(run.info.run_id, metrics=points)
            mlflow.log_metric("after", 1.0)
        result = store(uri).outbox.flush(60)
        assert (0, 0, 2) == (result.pending, result.parked, result.dead), result
    with client(plain) as api:
        (found,) = api.search_logged_models([api.get_experiment_by_name(experiment_name).experiment_id])
        assert {(key, 1.0) for key in ("alone", "a", "b", "c")} == {(one.key, one.value) for one in found.metrics}
        (held,) = the_runs(plain, experiment_name)
        assert {"alone": 2.0, "a": 2.0, "b": 1.0, "c": 1.0, "after": 1.0} == held.data.metrics
        assert "FINISHED" == held.info.status


def test_a_model_is_shown_as_others_have_changed_it_since_what_was_logged_here_arrived(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """And what is pending in front. MLflow notes the versions of a model in a tag, which it reads before it sets it."""
    uri = f"outbox+{mlflow_server.url}"
    with tracking(uri, tmp_path) as mlflow:
        number = mlflow.set_experiment(experiment_name).experiment_id
        for source in (mlflow.MlflowClient().create_run(number).info.run_id, None):
            model = mlflow.initialize_logged_model(
                name="m", source_run_id=source, tags={"stage": "dev", "gone": "soon", "mine": "1"}
            ).model_id
            mlflow.set_logged_model_tags(model, {"stage": "test", "mine": "2"})
            mlflow.MlflowClient().finalize_logged_model(model, "FAILED")
            deliver(uri)
            with client(mlflow_server.url) as api:
                api.set_logged_model_tags(model, {"stage": "prod", "mine": "0"})
                api.delete_logged_model_tag(model, "gone")
                api.finalize_logged_model(model, "READY")
            seen = mlflow.get_logged_model(model)
            assert ("prod", "READY") == (seen.tags["stage"], str(seen.status))
            assert "gone" not in seen.tags
            mlflow.set_logged_model_tags(model, {"mine": "3"})
            assert ("prod", "3") == tuple(mlflow.get_logged_model(model).tags[key] for key in ("stage", "mine"))


@pytest.mark.parametrize("begun", ["up", "away"])
def test_a_model_with_many_params_has_all_of_them_after_a_request_that_was_lost(
    begun: str, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """MLflow sends a hundred with the creation and the others behind it: the model is there when that is repeated."""
    params = {f"p{number}": str(number) for number in range(230)}
    with FaultProxy(mlflow_server.url) as proxy:
        uri = f"outbox+{proxy.url}"
        with tracking(uri, tmp_path) as mlflow:
            number = mlflow.create_experiment(experiment_name)
            proxy.on(lambda method, path: method == "POST" and path.endswith("/params"), drop())
            if begun == "away":
                proxy.down()
            mlflow.MlflowClient().create_logged_model(number, name="m", params=params)
            proxy.up()
            deliver(uri)
    with client(mlflow_server.url) as api:
        (found,) = api.search_logged_models([number])
        assert params == found.params


@pytest.mark.parametrize("way", ["up", "away", "killed"])
def test_a_history_that_is_copied_to_a_model_stays_as_it_was(
    way: str, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """MLflow copies it when a model is logged. A loop without steps has many points of one millisecond there."""
    from mlflow.entities import Metric

    with world(way, mlflow_server, tmp_path) as here:
        api = here.mlflow.MlflowClient()
        number = api.create_experiment(experiment_name)
        run_id = api.create_run(number).info.run_id
        here.kill()
        model = api.create_logged_model(number, name="m", source_run_id=run_id).model_id
        now = int(time.time() * 1000)
        for index in range(30):
            api.log_metric(run_id, "loss", index / 2, timestamp=now + index // 10)
        copies = [
            Metric(point.key, point.value, point.timestamp, point.step, model)  # as ``log_model`` does
            for point in api.get_metric_history(run_id, "loss")
        ]
        api.log_batch(run_id, metrics=copies)
    with client(mlflow_server.url) as api:
        (run,) = the_runs(mlflow_server.url, experiment_name)
        history = [(point.timestamp - now, point.value) for point in api.get_metric_history(run.info.run_id, "loss")]
        (found,) = api.search_logged_models([run.info.experiment_id])
        held = sorted((point.timestamp - now, point.value) for point in found.metrics)
    assert [(index // 10, index / 2) for index in range(30)] == history
    assert [(0, 4.5), (1, 9.5), (2, 14.5)] == held


def test_a_history_that_is_copied_in_parts_which_meet_within_a_millisecond_has_no_dead_letter(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """MLflow's client sends a thousand points at a time; the model's point of that millisecond is the first part's."""
    from mlflow.entities import Metric

    uri = f"outbox+{mlflow_server.url}"
    with tracking(uri, tmp_path) as mlflow:
        api = mlflow.MlflowClient()
        number = api.create_experiment(experiment_name)
        run_id = api.create_run(number).info.run_id
        model = api.create_logged_model(number, name="m", source_run_id=run_id).model_id
        now = int(time.time() * 1000)
        points = [(index // 10, index / 2) for index in range(30)]
        for later, value in points:
            api.log_metric(run_id, "loss", value, timestamp=now + later)
        copies = [Metric("loss", value, now + later, 0, model) for later, value in points]
        for part in (copies[:15], copies[15:]):
            api.log_batch(run_id, metrics=part)
        deliver(uri)  # with no dead letter
    with client(mlflow_server.url) as api:
        history = [(point.timestamp - now, point.value) for point in api.get_metric_history(run_id, "loss")]
        (found,) = api.search_logged_models([number])
    assert points == history
    assert [(0, 4.5), (1, 7.0), (2, 14.5)] == sorted((point.timestamp - now, point.value) for point in found.metrics)


@pytest.mark.parametrize("source", ["e" * 32, "of another tool!"])
def test_a_model_whose_run_is_gone_for_good_is_read_and_changed(
    source: str, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """``mlflow gc`` removes deleted runs and leaves their models; MLflow looks for no run when a model is meant.

    So it takes any source, also of a model that is made through an outbox.
    """
    with client(mlflow_server.url) as api:
        number = api.create_experiment(experiment_name)
        model = api.create_logged_model(number, name="m", source_run_id=source).model_id
    uri = f"outbox+{mlflow_server.url}"
    (tmp_path / "x.txt").write_text("x")
    with tracking(uri, tmp_path / "outbox") as mlflow:
        api = mlflow.MlflowClient()
        assert "m" == api.get_logged_model(model).name
        api.set_logged_model_tags(model, {"a": "b"})
        api.log_model_artifact(model, str(tmp_path / "x.txt"))
        api.finalize_logged_model(model, "READY")
        assert source == api.create_logged_model(number, name="own", source_run_id=source).source_run_id
        deliver(uri)
    with client(mlflow_server.url) as api:
        assert {source} == {one.source_run_id for one in api.search_logged_models([number])}
        found = api.get_logged_model(model)
        assert ({"a": "b"}, "READY", source) == (found.tags, str(found.status), found.source_run_id)
        assert ["x.txt"] == [info.path for info in api.list_logged_model_artifacts(model)]
