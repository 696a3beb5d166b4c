"""Assessments of traces behind an ``outbox+`` URI: they are the server's, and name runs as it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from contents import client
from mlflow_outbox.testing.faults import delay
from plugin_world import away, deliver, store, the_runs
from servers import MlflowServer, eventually

SOURCE_RUN = "mlflow.assessment.sourceRunId"


def assessments(server: MlflowServer, experiment: str) -> list[Any]:
    """Return the assessments of all traces of an experiment as the server has them, by name."""
    with client(server.url) as api:
        number = api.get_experiment_by_name(experiment).experiment_id
        found = [one for trace in api.search_traces(locations=[number]) for one in trace.info.assessments]
    return sorted(found, key=lambda one: str(one.name))


@pytest.mark.parametrize("kind", ["feedback", "expectation"])
def test_an_assessment_names_a_run_that_began_offline_as_the_server_does(
    kind: str, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """When it is made and when it is changed; what its author wrote, and his own object, stay as they are."""
    with away(mlflow_server, tmp_path, create_timeout=20) as (mlflow, proxy, uri):
        mlflow.set_experiment(experiment_name)
        with mlflow.start_run() as run, mlflow.start_span("span") as span:
            pass
        mlflow.flush_trace_async_logging()
        proxy.up()
        deliver(uri)
        log = {"feedback": mlflow.log_feedback, "expectation": mlflow.log_expectation}[kind]
        given = {SOURCE_RUN: run.info.run_id}
        made = log(trace_id=span.trace_id, name="of the run", value=run.info.run_id, metadata=given)
        assert {SOURCE_RUN: run.info.run_id} == given
        (there,) = the_runs(mlflow_server.url, experiment_name)
        assert there.info.run_id != run.info.run_id
        (found,) = assessments(mlflow_server, experiment_name)
        assert (there.info.run_id, run.info.run_id) == (found.metadata[SOURCE_RUN], found.value)
        found.metadata = {"again": "1", SOURCE_RUN: run.info.run_id}
        mlflow.update_assessment(trace_id=span.trace_id, assessment_id=made.assessment_id, assessment=found)
    (changed,) = assessments(mlflow_server, experiment_name)
    assert {"again": "1", SOURCE_RUN: there.info.run_id}.items() <= changed.metadata.items()


@pytest.mark.parametrize("parked", [False, True])
def test_an_assessment_waits_for_the_trace_that_is_on_its_way_from_here(
    parked: bool, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """A server that is slower than a call waits for its answer does not have the trace yet: it was lost for that.

    What waits for a person beside it, a run that somebody deleted, is none of its business.
    """
    with away(mlflow_server, tmp_path, create_timeout=0.5) as (mlflow, proxy, uri):
        proxy.up()
        mlflow.set_experiment(experiment_name)
        if parked:
            with mlflow.start_run(), client(mlflow_server.url) as api:
                deliver(uri)
                (there,) = the_runs(mlflow_server.url, experiment_name)  # it may have taken longer than is waited for
                api.delete_run(there.info.run_id)
                mlflow.log_metric("late", 1.0)
            assert 0 < store(uri).outbox.flush(60).parked
        proxy.on(lambda method, path: method == "POST" and path.endswith("/traces"), delay(1.5), times=None)
        with mlflow.start_span("span") as span:
            pass
        mlflow.flush_trace_async_logging()
        mlflow.log_feedback(trace_id=span.trace_id, name="good", value=True)
    assert [("good", True)] == [(one.name, one.value) for one in assessments(mlflow_server, experiment_name)]


def test_an_evaluation_in_a_run_that_began_offline_is_one_of_the_run_at_the_server(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Once the server is back: what scorers said names the run by the id that everybody finds it by."""
    import mlflow.genai
    from mlflow.genai.scorers import scorer

    @scorer  # type: ignore[untyped-decorator]  # mlflow is not followed by mypy
    def good(outputs: Any) -> bool:
        return outputs == "a"

    with away(mlflow_server, tmp_path, create_timeout=20) as (_, proxy, uri):
        mlflow.set_experiment(experiment_name)
        with mlflow.start_run():
            proxy.up()
            deliver(uri)
            mlflow.genai.evaluate(data=[{"inputs": {"q": "1"}, "outputs": "a"}], scorers=[good])
        mlflow.flush_trace_async_logging()
        deliver(uri)
    (there,) = the_runs(mlflow_server.url, experiment_name)
    eventually(lambda: assessments(mlflow_server, experiment_name), message="the scorer's word has arrived")
    assert [("good", there.info.run_id)] == [
        (one.name, one.metadata[SOURCE_RUN]) for one in assessments(mlflow_server, experiment_name)
    ]


def test_an_evaluation_of_traces_of_an_experiment_that_began_offline_is_of_these_and_not_of_copies(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """MLflow copies those of another experiment, by its id: a trace's and a run's are one, whatever they are called."""
    import mlflow.genai
    from mlflow.genai.scorers import scorer

    @scorer  # type: ignore[untyped-decorator]  # mlflow is not followed by mypy
    def good(outputs: Any) -> bool:
        return outputs == "a"

    with away(mlflow_server, tmp_path, create_timeout=20) as (_, proxy, uri):
        mlflow.set_experiment(experiment_name)
        with mlflow.start_run() as run:
            proxy.up()
            deliver(uri)
            with mlflow.start_span("asks") as span:
                span.set_inputs({"q": "1"})
                span.set_outputs("a")
            mlflow.flush_trace_async_logging()
            deliver(uri)
            traces = mlflow.search_traces()
            found = mlflow.MlflowClient().get_trace(span.trace_id)
            assert run.info.experiment_id == found.info.experiment_id
            result = mlflow.genai.evaluate(data=traces, scorers=[good])
            assert [True] == list(result.tables["eval_results"]["good/value"])
        mlflow.flush_trace_async_logging()
        deliver(uri)
    with client(mlflow_server.url) as api:
        number = api.get_experiment_by_name(experiment_name).experiment_id
        there = api.search_traces(locations=[number])
    assert [span.trace_id] == [trace.info.trace_id for trace in there]
    assert ["good"] == [one.name for one in there[0].info.assessments]
