"""The demo's session: a data set that scikit-learn ships, experiments that really run, and the objects that hold them.

The classes have the fields that an autopilot session's classes have; nothing here knows about tracking.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import enum
import runpy
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.datasets import load_diabetes
from sklearn.linear_model import SGDRegressor
from sklearn.metrics import root_mean_squared_error
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

METRIC = "rmse"
DATASET = "diabetes"


class Phase(enum.Enum):
    """Where a session is."""

    EXPERIMENTS = "experiments"
    COMPLETED = "completed"


@dataclasses.dataclass
class DataProfile:
    """What a session knows of its data."""

    n_rows: int
    n_columns: int
    columns: list[str]
    numeric_columns: list[str]
    categorical_columns: list[str]
    column_types: dict[str, Any]
    target_column: str
    target_type: str
    missing_values: dict[str, Any]
    missing_percentages: dict[str, Any]
    numeric_stats: dict[str, dict[str, Any]]
    categorical_stats: dict[str, dict[Any, Any]]
    target_stats: dict[str, Any]


@dataclasses.dataclass
class Preprocessing:
    """What is done to the data before a model sees it."""

    missing_values: str = "none"
    scaling: str = "standard"
    encoding: str = "none"
    target_transform: str | None = None


@dataclasses.dataclass
class ExperimentSpec:
    """An experiment to be run."""

    name: str
    module: str
    model_type: str
    model_params: dict[str, Any]
    hypothesis: str
    reasoning: str
    preprocessing: Preprocessing = dataclasses.field(default_factory=Preprocessing)


@dataclasses.dataclass
class ExperimentResult:
    """An experiment that was run."""

    experiment_name: str
    iteration: int
    model_type: str
    model_params: dict[str, Any]
    preprocessing: Preprocessing
    metrics: dict[str, float]
    hypothesis: str
    reasoning: str
    execution_time: float
    success: bool
    error_message: str | None
    code_path: Path
    model_path: Path | None
    timestamp: dt.datetime


@dataclasses.dataclass
class ExperimentState:
    """The whole session."""

    session_id: str
    start_time: dt.datetime
    experiments: list[ExperimentResult] = dataclasses.field(default_factory=list)
    current_iteration: int = 0
    phase: Phase = Phase.EXPERIMENTS
    best_metric: float | None = None
    best_experiment: str | None = None
    termination_reason: str | None = None
    end_time: dt.datetime | None = None

    def add(self, result: ExperimentResult) -> None:
        """Take a result into account; the lowest error is the best."""
        self.experiments.append(result)
        self.current_iteration = result.iteration
        if result.success and (self.best_metric is None or result.metrics[METRIC] < self.best_metric):
            self.best_metric, self.best_experiment = result.metrics[METRIC], result.experiment_name

    def finish(self) -> None:
        """End the session."""
        self.phase, self.termination_reason = Phase.COMPLETED, "every planned experiment was run"
        self.end_time = dt.datetime.now(dt.timezone.utc)

    def get_elapsed_time(self) -> float:
        """Return seconds from the start to the end, or to now."""
        return ((self.end_time or dt.datetime.now(dt.timezone.utc)) - self.start_time).total_seconds()


def profile() -> DataProfile:
    """Profile the data set."""
    frame = load_diabetes(as_frame=True, scaled=False).frame
    categorical = ["sex"]
    numeric = [str(name) for name in frame.columns if name not in categorical]
    missing = frame.isna().sum()
    return DataProfile(
        n_rows=len(frame),
        n_columns=len(frame.columns),
        columns=[str(name) for name in frame.columns],
        numeric_columns=numeric,
        categorical_columns=categorical,
        column_types=frame.dtypes.to_dict(),
        target_column="target",
        target_type="numeric",
        missing_values=missing.to_dict(),
        missing_percentages=(100 * missing / len(frame)).to_dict(),
        numeric_stats={name: frame[name].describe().to_dict() for name in numeric},
        categorical_stats={name: frame[name].value_counts().to_dict() for name in categorical},
        target_stats={**frame["target"].describe().to_dict(), "skew": frame["target"].skew()},
    )


SPECS = [
    ExperimentSpec(
        "baseline_mean",
        "sklearn.dummy",
        "DummyRegressor",
        {"strategy": "mean"},
        "Predicting the mean sets the error that every model has to beat.",
        "Without a baseline no later number means anything. The mean minimises squared error without any feature.",
        Preprocessing(scaling="none"),
    ),
    ExperimentSpec(
        "linear",
        "sklearn.linear_model",
        "LinearRegression",
        {},
        "The ten measurements explain a good part of the progression linearly.",
        "Ten features and 442 patients: a linear model is hard to overfit, and tells whether there is signal at all.",
    ),
    ExperimentSpec(
        "ridge_10",
        "sklearn.linear_model",
        "Ridge",
        {"alpha": 10.0},
        "The serum measurements are correlated, so shrinking their coefficients lowers the error.",
        "s1 and s2 (total and LDL cholesterol) are nearly collinear, which makes plain least squares unstable.",
    ),
    ExperimentSpec(
        "neighbours_15",
        "sklearn.neighbors",
        "KNeighborsRegressor",
        {"n_neighbors": 15, "weights": "distance"},
        "Patients with similar measurements progress alike.",
        "A local model needs no form for the relation; scaling matters, because it works on distances.",
    ),
    ExperimentSpec(
        "forest_invalid_depth",
        "sklearn.ensemble",
        "RandomForestRegressor",
        {"n_estimators": 200, "max_depth": -3},
        "Shallow trees keep a forest from learning noise.",
        "A small data set calls for strong limits on depth. (The proposed depth is no depth, as will be seen.)",
        Preprocessing(scaling="none"),
    ),
    ExperimentSpec(
        "forest_depth_6",
        "sklearn.ensemble",
        "RandomForestRegressor",
        {"n_estimators": 200, "max_depth": 6, "min_samples_leaf": 5, "random_state": 0},
        "Shallow trees with a valid depth find interactions that linear models miss.",
        "The previous attempt failed on its depth of -3; the idea behind it still deserves a test.",
        Preprocessing(scaling="none"),
    ),
    ExperimentSpec(
        "boosting_slow",
        "sklearn.ensemble",
        "GradientBoostingRegressor",
        {"n_estimators": 250, "learning_rate": 0.03, "max_depth": 2, "subsample": 0.7, "random_state": 0},
        "Many small steps generalise better than a forest of full votes.",
        "A low learning rate with subsampling regularises; depth 2 allows interactions of two measurements.",
        Preprocessing(scaling="none"),
    ),
    ExperimentSpec(
        "svr_rbf",
        "sklearn.svm",
        "SVR",
        {"C": 60.0, "epsilon": 10.0, "kernel": "rbf", "gamma": 0.02},
        "A smooth non-linear function fits better than steps made of trees.",
        "Trees approximate a smooth dose-response with steps; an RBF kernel does not have to.",
    ),
]

_CODE = '''"""{name}: {hypothesis}"""

from sklearn.datasets import load_diabetes
{imports}
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error
from sklearn.model_selection import train_test_split
{more_imports}
data = load_diabetes(scaled=False)
X_train, X_test, y_train, y_test = train_test_split(data.data, data.target, test_size=0.25, random_state=0)

model = {model}
model.fit(X_train, y_train)
predicted = model.predict(X_test)

metrics = {{
    "rmse": root_mean_squared_error(y_test, predicted),
    "mae": mean_absolute_error(y_test, predicted),
    "r2": r2_score(y_test, predicted),
}}
if __name__ == "__main__":
    print(metrics)
'''


def generate(spec: ExperimentSpec, iteration: int, folder: Path) -> Path:
    """Write the code of an experiment and return its path."""
    arguments = ", ".join(f"{name}={value!r}" for name, value in spec.model_params.items())
    model = f"{spec.model_type}({arguments})"
    more = ""
    if spec.preprocessing.scaling == "standard":
        model = f"make_pipeline(StandardScaler(), {model})"
        more = "from sklearn.pipeline import make_pipeline\nfrom sklearn.preprocessing import StandardScaler\n"
    path = folder / f"experiment_{iteration}.py"
    text = _CODE.format(
        name=spec.name,
        hypothesis=spec.hypothesis,
        imports=f"from {spec.module} import {spec.model_type}",
        more_imports=more,
        model=model,
    )
    path.write_text(text)
    return path


def run(spec: ExperimentSpec, iteration: int, folder: Path) -> ExperimentResult:
    """Generate an experiment's code, run it, and return what came of it."""
    code_path = generate(spec, iteration, folder)
    metrics: dict[str, float] = {}
    error = None
    started = time.perf_counter()
    try:
        metrics = runpy.run_path(str(code_path))["metrics"]
    except Exception:  # noqa: BLE001 - generated code can fail in any way, which is a result: kept with its traceback
        error = traceback.format_exc()
    return ExperimentResult(
        experiment_name=spec.name,
        iteration=iteration,
        model_type=spec.model_type,
        model_params=spec.model_params,
        preprocessing=spec.preprocessing,
        metrics=metrics,
        hypothesis=spec.hypothesis,
        reasoning=spec.reasoning,
        execution_time=time.perf_counter() - started,
        success=error is None,
        error_message=error,
        code_path=code_path,
        model_path=None,
        timestamp=dt.datetime.now(dt.timezone.utc),
    )


TRAINING_PARAMS = {"eta0": 0.002, "alpha": 0.01, "learning_rate": "constant", "random_state": 0}


def training(epochs: int) -> Iterator[dict[str, float]]:
    """Train a model epoch by epoch and yield its errors, as a training loop would log them."""
    data = load_diabetes()
    parts = train_test_split(data.data, data.target, test_size=0.25, random_state=0)
    train_x, valid_x, train_y, valid_y = (np.asarray(part) for part in parts)
    scaler = StandardScaler().fit(train_x)
    train_x, valid_x = scaler.transform(train_x), scaler.transform(valid_x)
    model = SGDRegressor(**TRAINING_PARAMS)
    for _ in range(epochs):
        model.partial_fit(train_x, train_y)
        yield {
            "train_rmse": root_mean_squared_error(train_y, model.predict(train_x)),
            "valid_rmse": root_mean_squared_error(valid_y, model.predict(valid_x)),
        }


def plot(state: ExperimentState, folder: Path) -> list[Path]:
    """Draw the session's three plots and return their paths."""
    good = [result for result in state.experiments if result.success]
    names = [result.experiment_name for result in good]
    errors = [result.metrics[METRIC] for result in good]
    iterations = [result.iteration for result in good]
    best_so_far = np.minimum.accumulate(errors)

    def progression(axes: Any) -> None:
        axes.plot(iterations, errors, "o", label="experiment")
        axes.step(iterations, best_so_far, where="post", label="best so far")
        axes.set(xlabel="iteration", ylabel=METRIC, title=f"{METRIC} by iteration")
        axes.legend()

    def comparison(axes: Any) -> None:
        axes.barh(names[::-1], errors[::-1])
        axes.set(xlabel=METRIC, title="Models compared")

    def improvement(axes: Any) -> None:
        axes.bar(names, [100 * (errors[0] - error) / errors[0] for error in errors])
        axes.set(ylabel="% less error than the baseline", title="Improvement over the baseline")
        axes.tick_params(axis="x", labelrotation=30)

    drawings = {
        "metric_progression": progression,
        "model_comparison": comparison,
        "improvement_over_baseline": improvement,
    }
    paths = []
    for name, draw in drawings.items():
        figure = Figure(figsize=(7, 4), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure.subplots())
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=110)
    return paths
