"""Experiments, traces and models that are not there, and tags that they do not have: refused as without an outbox."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from contents import client
from mlflow_outbox.testing.faults import status
from mlflow_outbox.testing.proxy import FaultProxy
from plugin_world import NOWHERE, WAYS, away, deliver, store, the_runs, tracking, world
from servers import MlflowServer, eventually

#: What MLflow refuses: called with mlflow, and the ids of an experiment and of a run of it.
REFUSED: dict[str, Callable[[Any, str, str], object]] = {
    "a tag of no experiment": lambda m, _e, _r: m.MlflowClient().set_experiment_tag("987654", "a", "b"),
    "deleting a tag of no experiment": lambda m, _e, _r: m.MlflowClient().delete_experiment_tag("987654", "a"),
    "a tag of a deleted experiment": lambda m, e, _r: (
        m.MlflowClient().delete_experiment(e),
        m.MlflowClient().set_experiment_tag(e, "a", "b"),
    ),
    "deleting no tag of an experiment": lambda m, e, _r: m.MlflowClient().delete_experiment_tag(e, "never set"),
    "a bad key": lambda m, e, _r: m.MlflowClient().set_trace_tag(traced(m, e), "a$", "b"),
    "a long key": lambda m, e, _r: m.MlflowClient().set_trace_tag(traced(m, e), "a" * 300, "b"),
    "deleting no tag of a trace": lambda m, e, _r: m.MlflowClient().delete_trace_tag(traced(m, e), "never set"),
    "a tag of no trace": lambda m, _e, _r: m.set_trace_tag("tr-" + "f" * 32, "a", "b"),
    "a metric of no model": lambda m, _e, r: m.MlflowClient().log_metric(r, "m", 1.0, model_id="m-" + "f" * 32),
}


def traced(mlflow: Any, experiment: str) -> str:
    """Return the id of a new trace."""
    mlflow.set_experiment(experiment_id=experiment)
    with mlflow.start_span("s") as span:
        pass
    mlflow.flush_trace_async_logging()
    return str(span.trace_id)


@pytest.mark.parametrize("what", list(REFUSED))
def test_what_is_not_there_is_refused_at_the_call(
    what: str, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """With and without an outbox; and nothing of it is left for the worker to park or to give up."""
    from mlflow.exceptions import MlflowException

    for prefix in ("", "outbox+"):
        uri = f"{prefix}{mlflow_server.url}"
        with tracking(uri, tmp_path) as mlflow:
            number = mlflow.create_experiment(experiment_name + prefix)
            run = mlflow.MlflowClient().create_run(number).info.run_id
            deliver(uri)
            with pytest.raises(MlflowException):
                REFUSED[what](mlflow, number, run)
            deliver(uri)


def test_what_is_there_is_taken_whether_the_server_is_or_not(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """An experiment of somebody else's: asked for once, not while the server is away; tags come and go."""
    with client(mlflow_server.url) as api:
        theirs = api.create_experiment(experiment_name, tags={"old": "1", "older": "2"})
    for up in (True, False):
        with FaultProxy(mlflow_server.url) as proxy:
            uri = f"outbox+{proxy.url}"
            with tracking(uri, tmp_path / str(up)) as mlflow:
                if not up:
                    proxy.down()
                api = mlflow.MlflowClient()
                for number in range(3):
                    api.set_experiment_tag(theirs, f"{up}", str(number))
                api.delete_experiment_tag(theirs, "old" if up else "older")
                asked = [request for request in proxy.requests if request.path.endswith("experiments/get")]
                assert len(asked) <= 2, "once to write, once for the tag that goes"
                proxy.up()
                eventually(lambda: not store(uri).server.is_away(), message="the pause after the outage is over")  # noqa: B023 - called before it changes
                deliver(uri)
    with client(mlflow_server.url) as api:
        assert {"True": "2", "False": "2"} == dict(api.get_experiment(theirs).tags)


def test_an_experiment_that_was_renamed_offline_is_found_by_its_new_name_alone(tmp_path: Path) -> None:
    """As a server has it after the rename."""
    with tracking(NOWHERE, tmp_path, exit_timeout=0) as mlflow:
        api = mlflow.MlflowClient()
        number = api.create_experiment("old")
        assert number == api.get_experiment_by_name("old").experiment_id
        api.rename_experiment(number, "new")
        assert api.get_experiment_by_name("old") is None
        assert number == api.get_experiment_by_name("new").experiment_id
        assert "new" == api.get_experiment(number).name


@pytest.mark.parametrize("made", ["by somebody else", "by another process", "by both"])
def test_a_changed_param_is_refused_when_a_run_is_gone_on_with(
    made: str, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """With and without an outbox, and offline where the outbox knows it; the same value is taken."""
    from mlflow.exceptions import MlflowException

    for prefix in ("", "outbox+"):
        uri = f"{prefix}{mlflow_server.url}"
        maker = uri if made == "by another process" else mlflow_server.url
        with tracking(maker, tmp_path) as mlflow:
            api = mlflow.MlflowClient()
            run_id = api.create_run(api.create_experiment(experiment_name + prefix)).info.run_id
            api.log_param(run_id, "p", "1")
        if made == "by both":
            with tracking(uri, tmp_path) as mlflow:
                mlflow.MlflowClient().log_metric(run_id, "m", 1.0)
        offline = {"create_timeout": 0} if made == "by another process" else {}
        with tracking(uri, tmp_path, **offline) as mlflow:
            api = mlflow.MlflowClient()
            api.log_param(run_id, "p", "1")
            with pytest.raises(MlflowException, match="Changing param values is not allowed") as raised:
                api.log_param(run_id, "p", "2")
            assert "INVALID_PARAMETER_VALUE" == raised.value.error_code
            deliver(uri)


@pytest.mark.parametrize("way", WAYS)
def test_a_name_that_an_experiment_had_before_its_rename_is_free_for_another(
    way: str, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Twice in a row, and for one that the server made; a name that one has is refused. Each gets its own runs."""
    from mlflow.exceptions import MlflowException

    with world(way, mlflow_server, tmp_path) as here:
        api = here.mlflow.MlflowClient()
        made = [api.create_experiment(experiment_name)]
        here.kill()
        for number in range(2):
            api.rename_experiment(made[-1], f"{experiment_name}-{number}")
            with pytest.raises(MlflowException, match="exists"):
                api.create_experiment(f"{experiment_name}-{number}")
            made.append(api.create_experiment(experiment_name))
            with pytest.raises(MlflowException, match="exists"):
                api.create_experiment(experiment_name)
        assert 3 == len({*made})
        assert made[-1] == api.get_experiment_by_name(experiment_name).experiment_id
        for number in reversed(range(3)):
            api.create_run(made[number], run_name=f"run {number}")
    for number, name in enumerate((f"{experiment_name}-0", f"{experiment_name}-1", experiment_name)):
        assert [f"run {number}"] == [run.info.run_name for run in the_runs(mlflow_server.url, name)]


def test_a_link_that_no_server_takes_away_is_refused_as_it_is_without_an_outbox(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Only Databricks does: for all others it would be a dead letter, which nobody has asked for."""
    said = []
    for prefix in ("", "outbox+"):
        uri = f"{prefix}{mlflow_server.url}"
        with tracking(uri, tmp_path) as mlflow:
            api = mlflow.MlflowClient()
            number = api.create_experiment(experiment_name + prefix)
            run, trace = api.create_run(number).info.run_id, traced(mlflow, number)
            api.link_traces_to_run([trace], run)
            with pytest.raises(NotImplementedError) as raised:
                api.unlink_traces_from_run([trace], run)
            said.append(str(raised.value).partition(" for ")[0])
            deliver(uri)
    assert said[0] == said[1]


def test_a_link_that_is_refused_is_so_while_the_server_is_away_and_says_nothing_of_the_server(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """What MLflow's store has is no question to the server: the pause after its failure goes on."""
    from mlflow.exceptions import MlflowException

    with away(mlflow_server, tmp_path) as (mlflow, proxy, uri):
        api = mlflow.MlflowClient()
        number = api.create_experiment(experiment_name)
        run, trace = api.create_run(number).info.run_id, traced(mlflow, number)
        store(uri).server.answers()
        with pytest.raises(NotImplementedError):
            api.unlink_traces_from_run([trace], run)
        with pytest.raises(MlflowException, match="Cannot link more than 100 traces"):
            api.link_traces_to_run([f"tr-{i:032x}" for i in range(101)], run)
        api.link_traces_to_run([trace], run)
        assert store(uri).server.was_away()
        proxy.up()
        deliver(uri)
    with client(mlflow_server.url) as api:
        (made,) = the_runs(mlflow_server.url, experiment_name)
        linked = api.search_traces(locations=[made.info.experiment_id], run_id=made.info.run_id)
        assert [trace] == [found.info.trace_id for found in linked]


def test_a_file_store_links_no_traces_with_and_without_an_outbox(tmp_path: Path) -> None:
    """Else the link would be a dead letter."""
    from mlflow.exceptions import MlflowException

    for prefix in ("", "outbox+"):
        uri = f"{prefix}{(tmp_path / 'store').as_uri()}"
        with tracking(uri, tmp_path / "outbox") as mlflow:
            api = mlflow.MlflowClient()
            run = api.create_run("0").info.run_id
            with pytest.raises(MlflowException):
                api.link_traces_to_run(["tr-" + "1" * 32], run)
            deliver(uri)


def test_a_trace_of_another_process_is_tagged_also_while_it_is_on_its_way(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """The server does not know it yet, and is asked again when what waits has arrived."""
    uri = f"outbox+{mlflow_server.url}"
    with tracking(uri, tmp_path, worker="none") as mlflow:
        trace = traced(mlflow, mlflow.create_experiment(experiment_name))
    with tracking(uri, tmp_path) as mlflow:
        mlflow.set_trace_tag(trace, "a", "b")
        deliver(uri)
        assert "b" == mlflow.get_trace(trace).info.tags["a"]


def test_a_tag_of_a_trace_of_another_process_comes_after_it_when_an_outage_is_over(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Nothing says in which experiment the trace is, so its room is another one; a tag that came first was lost."""
    with FaultProxy(mlflow_server.url) as proxy:
        proxy.down()
        uri = f"outbox+{proxy.url}"
        with tracking(uri, tmp_path, worker="none", exit_timeout=0) as mlflow:
            trace = traced(mlflow, mlflow.create_experiment(experiment_name))
        with tracking(uri, tmp_path) as mlflow:
            mlflow.set_trace_tag(trace, "a", "b")
            proxy.on(lambda method, path: method == "POST" and path.endswith("/traces"), status(503), times=5)
            proxy.up()
            deliver(uri)
            assert "b" == mlflow.get_trace(trace).info.tags["a"]


@pytest.mark.parametrize("what", ["deleted", "archived"])
def test_a_trace_that_takes_nothing_any_more_holds_up_no_other(
    what: str, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Of a deleted one a server with workspaces says that it is not there. A dead letter keeps what it was to get."""
    code, text, number = {
        "deleted": ("RESOURCE_DOES_NOT_EXIST", "Trace with ID 'tr-1' not found.", 404),
        "archived": ("INVALID_STATE", "Cannot update traces that are no longer DB-backed: 'tr-1'.", 500),
    }[what]
    answer = status(number, {"Content-Type": "application/json"}, f'{{"error_code": "{code}", "message": "{text}"}}')
    with FaultProxy(mlflow_server.url) as proxy:
        uri = f"outbox+{proxy.url}"
        with tracking(uri, tmp_path) as mlflow:
            experiment = mlflow.create_experiment(experiment_name)
            trace = traced(mlflow, experiment)
            deliver(uri)
            if what == "deleted":
                proxy.on(lambda _method, path: trace in path and path.endswith("/tags"), answer, times=None)
                mlflow.set_trace_tag(trace, "a", "b")
            else:
                proxy.on(lambda method, path: method == "POST" and path.endswith("mlflow/traces"), answer, times=1)
                traced(mlflow, experiment)
            later = traced(mlflow, experiment)
            result = store(uri).outbox.flush(60)
            assert (0, 0, 1) == (result.pending, result.parked, result.dead)
    with client(mlflow_server.url) as api:
        assert "OK" == api.get_trace(later).info.state


def test_what_a_server_refuses_of_an_experiment_is_refused_while_it_is_away(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Else the experiment would wait for a person, and each of its runs with it."""
    from mlflow.exceptions import MlflowException

    with client(mlflow_server.url) as api:
        theirs = api.create_experiment(f"{experiment_name}-theirs")
    with away(mlflow_server, tmp_path) as (mlflow, proxy, uri):
        api = mlflow.MlflowClient()
        with pytest.raises(TypeError):
            api.create_experiment(f"{experiment_name}-tag", tags={"a": None})
        with pytest.raises(MlflowException, match="can't include fragments"):
            api.create_experiment(f"{experiment_name}-place", artifact_location="s3://bucket/files#1")
        with pytest.raises(MlflowException, match="Invalid query string"):
            api.create_experiment(f"{experiment_name}-query", artifact_location="http://host/files?folder=../other")
        for none in ("abc", "", "a/b", "9" * 20):
            for call in (api.create_run, api.create_logged_model, api.get_experiment, api.delete_experiment):
                with pytest.raises(MlflowException, match=f"Invalid experiment ID '{none}'"):
                    call(none)
            with pytest.raises(MlflowException, match=f"Invalid experiment ID '{none}'"):
                api.set_experiment_tag(none, "a", "b")
        number = api.create_experiment(experiment_name)
        for experiment in (number, theirs):
            api.delete_experiment(experiment)
            with pytest.raises(MlflowException, match="Cannot rename a non-active experiment"):
                api.rename_experiment(experiment, f"{experiment_name}-renamed")
            with pytest.raises(MlflowException, match="must be in the 'active' state"):
                api.create_logged_model(experiment, name="m")
            api.restore_experiment(experiment)
            api.create_logged_model(experiment, name="m")
            api.create_run(experiment)
        proxy.up()
        deliver(uri)
    with client(mlflow_server.url) as api:
        for name in (experiment_name, f"{experiment_name}-theirs"):
            experiment = api.get_experiment_by_name(name)
            assert "active" == experiment.lifecycle_stage
            assert 1 == len(api.search_runs([experiment.experiment_id]))
            assert 1 == len(api.search_logged_models([experiment.experiment_id]))
