"""What MLflow holds, asked of MLflow's own client: the judge of every test, independent of the code under test."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from mlflow_outbox import Settings

#: Settings with pauses that suit a test.
QUICK = Settings(poll_interval=0.02, retry_initial=0.02, retry_max=0.2, parked_retry=0.2, exit_timeout=20.0)


@contextmanager
def client(uri: str) -> Iterator[Any]:
    """Yield MLflow's client for a store; a file store is allowed meanwhile."""
    from mlflow import MlflowClient

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        yield MlflowClient(tracking_uri=uri)


def runs(uri: str, experiment: str) -> list[Any]:
    """Return all active runs of an experiment, oldest first."""
    with client(uri) as mlflow:
        found = mlflow.get_experiment_by_name(experiment)
        if found is None:
            return []
        listed: list[Any] = list(mlflow.search_runs([found.experiment_id], max_results=1000))
        return sorted(listed, key=lambda run: run.info.start_time)


def the_run(uri: str, experiment: str) -> Any:
    """Return the only run of an experiment."""
    listed = runs(uri, experiment)
    assert 1 == len(listed), [run.info.run_name for run in listed]
    return listed[0]


def points(uri: str, run_id: str, key: str) -> Counter[tuple[int, float]]:
    """Return how often each (step, value) of a metric is held."""
    with client(uri) as mlflow:
        return Counter((point.step, point.value) for point in mlflow.get_metric_history(run_id, key))


def stamped_points(uri: str, run_id: str, key: str) -> list[tuple[int, int, float]]:
    """Return (step, time in ms, value) of every point of a metric, sorted."""
    with client(uri) as mlflow:
        return sorted((p.step, p.timestamp, p.value) for p in mlflow.get_metric_history(run_id, key))


def artifacts(uri: str, run_id: str, path: str | None = None) -> list[str]:
    """Return the paths of all files of a run, in all folders."""
    found: list[str] = []
    with client(uri) as mlflow:
        for item in mlflow.list_artifacts(run_id, path):
            found += artifacts(uri, run_id, item.path) if item.is_dir else [item.path]
    return sorted(found)


def artifact_text(uri: str, run_id: str, path: str) -> str:
    """Return the content of a text artifact."""
    with (
        client(uri) as mlflow,
        tempfile.TemporaryDirectory() as folder,
        open(mlflow.download_artifacts(run_id, path, folder), encoding="utf-8") as file,
    ):
        return file.read()


def numbered(count: int) -> Counter[tuple[int, float]]:
    """Return the points that ``for i in range(count): log_metric(key, i / 2, step=i)`` makes, each once."""
    return Counter((step, step / 2) for step in range(count))
