"""The page that documents the tracker: its complete example with only the imports changed, and what each row says."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
from pathlib import Path
from typing import Any

import pytest

from contents import QUICK, artifact_text, artifacts, client, runs
from mlflow_outbox import MLflowTracker, Settings, create_tracker
from mlflow_outbox.errors import ArtifactRefused, InvalidSettings
from servers import MlflowServer


@dataclasses.dataclass
class Profile:
    """A session's DataProfile."""

    n_rows: int = 1000
    n_columns: int = 15
    columns: list[str] = dataclasses.field(default_factory=lambda: [f"c{n}" for n in range(15)])
    numeric_columns: list[str] = dataclasses.field(default_factory=lambda: [f"c{n}" for n in range(8)])
    categorical_columns: list[str] = dataclasses.field(default_factory=lambda: [f"c{n}" for n in range(8, 14)])
    target_column: str = "price"
    target_type: str = "numeric"
    missing_values: dict[str, int] = dataclasses.field(default_factory=lambda: {"c1": 3, "c2": 4})
    target_stats: dict[str, float] = dataclasses.field(default_factory=lambda: {"mean": 1.5, "worst": float("nan")})


@dataclasses.dataclass
class Result:
    """A session's ExperimentResult."""

    experiment_name: str
    iteration: int
    code_path: Path
    success: bool = True
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    error_message: str | None = None
    model_type: str = "RandomForestClassifier"
    model_params: dict[str, Any] = dataclasses.field(
        default_factory=lambda: {"n_estimators": 200, "max_depth": 10, "min_samples_split": 5}
    )
    preprocessing: dict[str, str] = dataclasses.field(
        default_factory=lambda: {"missing_values": "median", "scaling": "standard", "encoding": "onehot"}
    )
    hypothesis: str = "deeper trees " * 40
    reasoning: str = "because the learning curve says so"
    execution_time: float = 45.3
    timestamp: dt.datetime = dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.timezone.utc)


@dataclasses.dataclass
class State:
    """A session's ExperimentState."""

    experiments: list[Result]
    session_id: str = "abc123"
    current_iteration: int = 2
    phase: str = "done"
    best_metric: float | None = 0.87
    best_experiment: str | None = "experiment_1"
    termination_reason: str | None = "max_iterations"

    def get_elapsed_time(self) -> float:
        """Return seconds."""
        return 99.5


@pytest.fixture(params=["server", "sqlite", "file"])
def uri(request: pytest.FixtureRequest, mlflow_server: MlflowServer, sqlite_uri: str, file_uri: str) -> str:
    """The tracking URI of each kind of store."""
    return {"server": mlflow_server.url, "sqlite": sqlite_uri, "file": file_uri}[request.param]


def session(tracker: MLflowTracker, folder: Path) -> None:
    """Be the complete example of the page, with a second experiment that fails."""
    (folder / "experiment_1.py").write_text("print('one')\n")
    (folder / "experiment_2.py").write_text("print('two')\n")
    plots = []
    for name in ("metric_progression.png", "model_comparison.png", "improvement_over_baseline.png"):
        plots.append(folder / name)
        plots[-1].write_bytes(b"\x89PNG " + name.encode())

    tracker.log_data_profile(Profile())
    results = [
        Result("experiment_1", 1, folder / "experiment_1.py", metrics={"accuracy": 0.87, "f1": 0.85}),
        Result("experiment_2", 2, folder / "experiment_2.py", success=False, error_message="ValueError: no"),
    ]
    for result in results:
        tracker.log_experiment(result)
    tracker.log_final_summary(State(results))
    tracker.log_visualizations([*plots, folder / "missing.png"])


@pytest.mark.compatibility
def test_the_complete_example_arrives_as_the_page_says(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Params, metrics, tags, artifacts, names and statuses of every kind of run, in each kind of store."""
    tracker = create_tracker(
        session_id=tmp_path.name, dataset_name="housing", tracking_uri=uri, outbox_dir=tmp_path / "o", settings=QUICK
    )
    experiment = f"autopilot_housing_{tmp_path.name}"
    assert experiment == tracker.experiment_name
    session(tracker, tmp_path)
    assert tracker.flush(60)
    held = {run.info.run_name: run for run in runs(uri, experiment)}
    assert {"data_profile", "experiment_1", "experiment_2", "final_summary"} == set(held)

    profile = held["data_profile"]
    assert {
        "n_rows": "1000",
        "n_columns": "15",
        "n_numeric_features": "8",
        "n_categorical_features": "6",
        "target_column": "price",
        "target_type": "numeric",
    } == profile.data.params
    assert {"total_missing_values": 7.0} == profile.data.metrics
    written = json.loads(artifact_text(uri, profile.info.run_id, "data_profile.json"))
    assert {"mean": 1.5, "worst": None} == written["target_stats"]

    good, bad, final = held["experiment_1"], held["experiment_2"], held["final_summary"]
    assert {
        "model_type": "RandomForestClassifier",
        "iteration": "1",
        "model_n_estimators": "200",
        "model_max_depth": "10",
        "model_min_samples_split": "5",
        "preprocessing_missing": "median",
        "preprocessing_scaling": "standard",
        "preprocessing_encoding": "onehot",
    } == good.data.params
    assert {"accuracy": 0.87, "f1": 0.85, "execution_time": 45.3, "success": 1.0} == good.data.metrics
    assert {"execution_time": 45.3, "success": 0.0} == bad.data.metrics
    assert (("deeper trees " * 40)[:250], "True") == (good.data.tags["hypothesis"], good.data.tags["success"])
    assert ("FINISHED", "FAILED", "FINISHED") == (good.info.status, bad.info.status, final.info.status)
    ended = int(Result.timestamp.timestamp() * 1000)
    assert (ended - 45_300, ended) == (good.info.start_time, good.info.end_time)
    assert ["experiment_1.py", "reasoning.txt"] == artifacts(uri, good.info.run_id)
    assert ["error.txt", "experiment_2.py", "reasoning.txt"] == artifacts(uri, bad.info.run_id)
    assert {
        "total_iterations": 2.0,
        "successful_experiments": 1.0,
        "total_time_seconds": 99.5,
        "best_metric": 0.87,
    } == final.data.metrics
    assert ("experiment_1", "max_iterations", "done") == tuple(
        final.data.tags[key] for key in ("best_experiment", "termination_reason", "phase")
    )
    names = ["final_state.json", "improvement_over_baseline.png", "metric_progression.png", "model_comparison.png"]
    assert names == artifacts(uri, final.info.run_id)
    assert any("missing.png" in record.message for record in caplog.records)
    assert [] == [path.name for path in Path.cwd().iterdir() if path.suffix in {".json", ".txt"}]

    best = tracker.get_best_run("f1", ascending=False)
    assert best is not None
    assert (0.85, "RandomForestClassifier") == (best["metrics"]["f1"], best["params"]["model_type"])
    shown = tracker.get_all_runs()
    assert {
        "data_profile": "FINISHED",
        "experiment_1": "FINISHED",
        "experiment_2": "FAILED",
        "final_summary": "FINISHED",
    } == {run["run_name"]: run["status"] for run in shown}
    with client(uri):
        found = tracker.client.search_runs(
            experiment_ids=[tracker.experiment_id], filter_string="metrics.f1 > 0.5", order_by=["metrics.f1 DESC"]
        )
    assert ["experiment_1"] == [run.info.run_name for run in found]
    tracker.close()


def test_visualizations_before_the_summary_go_to_the_same_run(sqlite_uri: str, tmp_path: Path) -> None:
    """Whichever of the two calls comes first, there is one run final_summary."""
    plot = tmp_path / "plot.png"
    plot.write_bytes(b"png")
    with MLflowTracker("e", sqlite_uri, outbox_dir=tmp_path / "o", settings=QUICK) as tracker:
        tracker.log_visualizations([plot])
        tracker.log_final_summary(State([]))
        assert tracker.flush(60)
    listed = runs(sqlite_uri, "e")
    assert ["final_summary"] == [run.info.run_name for run in listed]
    assert ["final_state.json", "plot.png"] == artifacts(sqlite_uri, listed[0].info.run_id)


def test_runs_of_a_strict_session_end_although_something_of_them_is_refused(tmp_path: Path) -> None:
    """Whoever catches the error and goes on would see them RUNNING for ever."""
    tracker = MLflowTracker(
        "e", "http://127.0.0.1:9", outbox_dir=tmp_path / "o", worker="none", settings=Settings(strict=True)
    )
    gone = Result("x", 1, tmp_path / "gone.py", success=False, error_message="no code")
    for call in (lambda: tracker.log_experiment(gone), lambda: tracker.log_visualizations([tmp_path / "gone.png"])):
        with pytest.raises(ArtifactRefused):
            call()
    assert {"x": "FAILED", "final_summary": "FINISHED"} == {
        run["run_name"]: run["status"] for run in tracker.get_all_runs()
    }


def test_the_default_is_a_local_store_in_mlruns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a tracking URI runs go to mlruns/mlflow.db, artifacts beside it; the variable decides otherwise."""
    here = Path.cwd()
    with MLflowTracker("e", worker="none") as tracker:
        assert f"sqlite:///{here}/mlruns/mlflow.db" == tracker.tracking_uri
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@tracking.example:5000")
    with MLflowTracker("e", worker="none") as tracker:
        assert "http://tracking.example:5000" == tracker.tracking_uri
        assert "secret" not in repr(tracker)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    (here / "mlruns" / "0").mkdir(parents=True)
    (here / "mlruns" / "0" / "meta.yaml").write_text("")
    with MLflowTracker("e", worker="none") as tracker:
        assert (here / "mlruns").as_uri() == tracker.tracking_uri


@pytest.mark.parametrize(
    ("folder", "written"), [("My Rüns", "My Rüns"), ("a%20b", "a%2520b")], ids=["plain", "encoded"]
)
def test_the_tracking_uri_of_a_database_is_one_that_mlflow_reads(
    folder: str, written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """People give it to `mlflow ui`, which made an empty database in a directory "My%20Runs"; and to a tracker."""
    (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / folder)
    with MLflowTracker("e", worker="none") as tracker:
        assert f"sqlite:///{tmp_path}/{written}/mlruns/mlflow.db" == tracker.tracking_uri
        with MLflowTracker("e", tracker.tracking_uri, worker="none") as again:
            assert tracker.outbox_path == again.outbox_path


def test_disabled_only_when_nothing_can_be_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A directory that others may enter disables tracking with a warning; a server that is down does not."""
    assert not MLflowTracker("e", "http://127.0.0.1:9", outbox_dir=tmp_path / "good", worker="none").disabled
    (tmp_path / "file").write_text("in the way")
    tracker = MLflowTracker("e", "http://127.0.0.1:9", outbox_dir=tmp_path / "file")
    assert tracker.disabled
    assert any("disabled" in record.message for record in caplog.records)
    with tracker.start_run("nowhere") as run:
        assert not run.log_metric("loss", 1.0)
    tracker.log_data_profile(Profile())
    tracker.log_visualizations([tmp_path / "x.png"])
    assert [] == tracker.get_all_runs()
    assert tracker.flush()
    assert MLflowTracker("e", "http://127.0.0.1:9", outbox_dir=tmp_path, settings=Settings(disabled=True)).disabled


@pytest.mark.parametrize("name", ["", " ", "d" * 501, "\ud800", None])
def test_a_name_that_no_experiment_can_have_is_refused_at_once(name: Any, tmp_path: Path) -> None:
    """And not when it is delivered: by then everything that was logged would have to wait for a person."""
    with pytest.raises(InvalidSettings, match="the experiment name"):
        MLflowTracker(name, "http://127.0.0.1:9", outbox_dir=tmp_path, worker="none")
    assert not any(tmp_path.iterdir())


@pytest.mark.compatibility
def test_everything_people_log_arrives_as_logged(uri: str, tmp_path: Path) -> None:
    """Values, steps, times, params, tags, files, texts, dicts and statuses through the Run API."""
    import numpy as np

    (tmp_path / "folder" / "sub").mkdir(parents=True)
    (tmp_path / "folder" / "a.txt").write_text("a")
    (tmp_path / "folder" / "sub" / "b.txt").write_text("b")
    name = f"everything_{tmp_path.name}"
    tracker = MLflowTracker(name, uri, outbox_dir=tmp_path / "o", settings=QUICK)
    started = dt.datetime(2026, 5, 6, 7, 8, 9, tzinfo=dt.timezone.utc)
    with tracker.start_run("all", tags={"first": 1}, start_time=started) as run:
        run.log_metric("python", 1, step=np.int64(5), timestamp=1_700_000_000_123)
        run.log_metric("numpy", np.float32(0.5), step=3.0, timestamp=1_700_000_000_456.0)
        run.log_metrics({"bool": np.bool_(True), "nan": float("nan")}, step=2)
        run.log_metric("negative step", 1.5, step=-7)
        run.log_params({"int": 3, "none": None, "unicode": "größe"})
        run.set_tags({"first": "changed", "other/tag": "x"})
        run.log_artifact(tmp_path / "folder" / "a.txt", "inputs")
        run.log_artifacts(tmp_path / "folder", "tree")
        run.log_text("täxt", "notes/n.txt")
        run.log_dict({"x": [1, float("inf")]}, "d.json")
        run.end("KILLED", end_time=started + dt.timedelta(seconds=90))
        run.log_metric("after the end", 1.0)
    run.end("KILLED", end_time=started + dt.timedelta(seconds=90))
    result = tracker.close(60)
    assert result, result
    held = runs(uri, name)[0]
    assert (1.0, 0.5, 1.0, 1.5) == tuple(held.data.metrics[k] for k in ("python", "numpy", "bool", "negative step"))
    assert held.data.metrics["nan"] != held.data.metrics["nan"]
    assert {"int": "3", "none": "None", "unicode": "größe"} == held.data.params
    assert ("changed", "x") == (held.data.tags["first"], held.data.tags["other/tag"])
    begun = int(started.timestamp() * 1000)
    assert (begun, begun + 90_000, "KILLED") == (held.info.start_time, held.info.end_time, held.info.status)
    assert ["d.json", "inputs/a.txt", "notes/n.txt", "tree/a.txt", "tree/sub/b.txt"] == artifacts(uri, held.info.run_id)
    assert "täxt" == artifact_text(uri, held.info.run_id, "notes/n.txt")
    assert {"x": [1, None]} == json.loads(artifact_text(uri, held.info.run_id, "d.json"))
    with client(uri) as mlflow:
        history = mlflow.get_metric_history(held.info.run_id, "numpy")
        assert [(3, 1_700_000_000_456)] == [(point.step, point.timestamp) for point in history]


@pytest.mark.parametrize(
    ("error", "status"), [(None, "FINISHED"), (ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")]
)
def test_a_block_ends_its_run_as_it_ends_itself(error: type[BaseException] | None, status: str, tmp_path: Path) -> None:
    """No exception is FINISHED, an exception FAILED, ctrl-C KILLED; the exception goes on."""
    tracker = MLflowTracker("e", "http://127.0.0.1:9", outbox_dir=tmp_path, worker="none")

    def block() -> None:
        with tracker.start_run("x"):
            if error is not None:
                raise error

    if error is None:
        block()
    else:
        with pytest.raises(error):
            block()
    assert [status] == [run["status"] for run in tracker.get_all_runs()]
