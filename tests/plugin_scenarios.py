"""What users do with MLflow, written against MLflow alone: run with and without an outbox in front."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

#: Called by a scenario halfway, where a test may take the server away.
Halfway = Callable[[], None]


def fluent(mlflow: Any, experiment: str, halfway: Halfway) -> None:
    """The fluent API: params, metrics, tags, files, tables, nested runs."""
    mlflow.set_experiment(experiment)
    mlflow.set_experiment_tag("team", "science")
    with mlflow.start_run(run_name="parent", tags={"given": "at the start"}, description="what it is") as run:
        mlflow.log_param("lr", 0.1)
        mlflow.log_params({"depth": 3, "long": "x" * 500})
        for step in range(5):
            mlflow.log_metric("loss", 1 / (step + 1), step=step)
        halfway()
        mlflow.log_metrics({"a": 1.5, "nan": float("nan"), "inf": float("inf")}, step=7)
        mlflow.set_tags({"stage": "first", "gone": "soon"})
        mlflow.set_tag("stage", "second")
        mlflow.delete_tag("gone")
        mlflow.log_text("hello", "notes/hello.txt")
        mlflow.log_text("hello again", "notes/hello.txt")
        mlflow.log_dict({"a": [1, 2]}, "config.yaml")
        mlflow.log_table({"question": ["q1"], "answer": ["a1"]}, "table.json")
        mlflow.log_table({"question": ["q2"], "answer": ["a2"]}, "table.json")
        with mlflow.start_run(run_name="child", nested=True):
            mlflow.log_metric("loss", 0.5)
        assert "second" == mlflow.get_run(run.info.run_id).data.tags["stage"]
        assert 2 == len(mlflow.load_table("table.json", run_ids=[run.info.run_id]))
        assert "hello again" == mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/notes/hello.txt")
    with mlflow.start_run(run_id=run.info.run_id):
        mlflow.log_metric("late", 2.0)
    assert ["child", "parent"] == sorted(r.info.run_name for r in mlflow.search_runs(output_format="list"))


def tables(mlflow: Any, experiment: str, halfway: Halfway) -> None:
    """Tables as the first files of a run and of a model, which MLflow lists before it writes and appends to."""
    from mlflow.exceptions import MlflowException

    mlflow.set_experiment(experiment)
    with mlflow.start_run(run_name="tables") as run:
        mlflow.log_metric("m", 1.0)
        made = mlflow.initialize_logged_model(name="made")
        halfway()
        assert [] == mlflow.MlflowClient().list_artifacts(run.info.run_id)
        assert [] == mlflow.artifacts.list_artifacts(run_id=run.info.run_id)
        assert [] == mlflow.MlflowClient().list_logged_model_artifacts(made.model_id)
        try:
            mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/not-there.txt")
        except MlflowException as error:
            assert "needs the tracking server" not in str(error)  # noqa: PT017 - scenarios are written against MLflow alone
        else:
            raise AssertionError
        for row in range(3):
            mlflow.log_table({"question": [f"q{row}"]}, "deep/table.json")
        assert 3 == len(mlflow.load_table("deep/table.json", run_ids=[run.info.run_id]))
    with mlflow.start_run(run_id=run.info.run_id):
        mlflow.log_table({"question": ["q3"]}, "deep/table.json")
        assert 4 == len(mlflow.load_table("deep/table.json", run_ids=[run.info.run_id]))


def client(mlflow: Any, experiment: str, halfway: Halfway) -> None:
    """MlflowClient: everything by id, asynchronous calls, deleted and failed runs."""
    from mlflow.entities import Metric, Param, RunTag

    api = mlflow.MlflowClient()
    number = api.create_experiment(experiment, tags={"made": "by the client"})
    assert experiment == api.get_experiment(number).name
    run = api.create_run(number, run_name="one", tags={"k": "v"}, start_time=1_700_000_000_000)
    api.log_batch(
        run.info.run_id,
        [Metric("m", i / 2, 1_700_000_000_000 + i, i) for i in range(50)],
        [Param("p", "1")],
        [RunTag("t", "1")],
    )
    halfway()
    api.log_metric(run.info.run_id, "async", 1.0, synchronous=False)
    api.log_param(run.info.run_id, "async", "yes", synchronous=False)
    api.set_tag(run.info.run_id, "async", "yes", synchronous=False)
    mlflow.flush_async_logging()
    api.update_run(run.info.run_id, name="renamed")
    api.set_terminated(run.info.run_id, "FAILED", 1_700_000_001_000)
    assert 50 == len(api.get_metric_history(run.info.run_id, "m"))
    assert "FAILED" == api.get_run(run.info.run_id).info.status
    gone = api.create_run(number, run_name="gone")
    api.delete_run(gone.info.run_id)
    back = api.create_run(number, run_name="back")
    api.delete_run(back.info.run_id)
    api.restore_run(back.info.run_id)
    api.set_terminated(back.info.run_id)


def figures(mlflow: Any, experiment: str, halfway: Halfway) -> None:
    """Figures and images, which MLflow writes in threads of its own."""
    import matplotlib as mpl
    import numpy as np

    mpl.use("agg")
    import matplotlib.pyplot as plt

    mlflow.set_experiment(experiment)
    with mlflow.start_run(run_name="figures"):
        figure, axes = plt.subplots(figsize=(1, 1))
        axes.plot([1, 2])
        mlflow.log_figure(figure, "plots/line.png")
        plt.close(figure)
        halfway()
        mlflow.log_image(np.zeros((4, 4, 3), dtype="uint8"), "image.png")
        mlflow.log_image(np.zeros((4, 4, 3), dtype="uint8"), key="photo", step=1, timestamp=1_700_000_000_000)
        mlflow.flush_artifact_async_logging()


def datasets(mlflow: Any, experiment: str, halfway: Halfway) -> None:
    """Datasets as inputs."""
    import pandas as pd

    mlflow.set_experiment(experiment)
    with mlflow.start_run(run_name="datasets") as run:
        data = mlflow.data.from_pandas(pd.DataFrame({"x": [1, 2], "y": [0, 1]}), name="table", targets="y")
        mlflow.log_input(data, context="training")
        halfway()
        mlflow.log_input(
            mlflow.data.from_pandas(pd.DataFrame({"x": [3]}), name="other"), context="test", tags={"a": "b"}
        )
        assert 2 == len(mlflow.get_run(run.info.run_id).inputs.dataset_inputs)


def model(mlflow: Any, experiment: str, halfway: Halfway) -> None:
    """A model logged by hand, with metrics that belong to it."""

    class Same(mlflow.pyfunc.PythonModel):  # type: ignore[misc, name-defined]
        def predict(self, context: Any, model_input: list[str]) -> list[str]:
            return model_input

    mlflow.set_experiment(experiment)
    with mlflow.start_run(run_name="model"):
        mlflow.log_param("kind", "identity")
        mlflow.log_metric("before", 1.0)
        halfway()
        info = mlflow.pyfunc.log_model(
            name="same", python_model=Same(), pip_requirements=["mlflow"], params={"extra": "1"}
        )
        mlflow.log_metric("score", 0.75, step=3, model_id=info.model_id)
        mlflow.set_logged_model_tags(info.model_id, {"quality": "good"})
    held = mlflow.get_logged_model(info.model_id)
    assert ("same", "good", "identity") == (held.name, held.tags["quality"], held.params["kind"])
    assert ["b"] == mlflow.pyfunc.load_model(info.model_uri).predict(["b"])
    outside = mlflow.initialize_logged_model(name="outside", model_type="agent")
    mlflow.finalize_logged_model(outside.model_id, "READY")


def autolog(mlflow: Any, experiment: str, halfway: Halfway) -> None:
    """scikit-learn's autologging, which swallows its own errors."""
    from sklearn.linear_model import LogisticRegression

    mlflow.set_experiment(experiment)
    mlflow.sklearn.autolog(log_models=False, silent=True)
    try:
        with mlflow.start_run(run_name="autolog"):
            halfway()
            LogisticRegression(max_iter=50).fit([[0.0], [1.0], [2.0], [3.0]], [0, 0, 1, 1])
    finally:
        mlflow.sklearn.autolog(disable=True)


def traces(mlflow: Any, experiment: str, halfway: Halfway) -> None:
    """Traces with and without a run."""
    mlflow.set_experiment(experiment)

    @mlflow.trace  # type: ignore[untyped-decorator]  # MLflow's
    def add(x: int, y: int) -> int:
        with mlflow.start_span("inner") as span:
            span.set_inputs({"x": x})
            span.set_outputs(x + y)
        return x + y

    add(1, 2)
    mlflow.flush_trace_async_logging()
    halfway()
    with mlflow.start_run(run_name="traced"):
        add(3, 4)
    mlflow.flush_trace_async_logging()
    trace = mlflow.get_trace(mlflow.get_last_active_trace_id())
    assert ["add", "inner"] == sorted(span.name for span in trace.data.spans)
    mlflow.set_trace_tag(trace.info.trace_id, "looked at", "yes")


ALL: dict[str, Callable[[Any, str, Halfway], None]] = {
    scenario.__name__: scenario for scenario in (fluent, tables, client, figures, datasets, model, autolog, traces)
}


def nothing() -> None:
    """Stand in for what a test does halfway."""
