"""Steps and times of any kind of number through the plugin: taken, refused and kept as without an outbox."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from contents import client
from mlflow_outbox.spool.events import Metric as MetricEvent
from mlflow_outbox.spool.events import Metrics, Tags
from mlflow_outbox.testing.proxy import FaultProxy
from plugin_world import deliver, store, the_runs, tracking
from servers import MlflowServer

_T = 1_700_000_000_000

#: What a program may give, by the name of the metric that it is given for.
NUMBERS: dict[str, Any] = {
    "int64": np.int64(3),
    "int32": np.int32(4),
    "unsigned": np.uint8(5),
    "array of one": np.array(6),
    "whole": 7.0,
    "half": 7.5,
    "numpy float": np.float64(8.0),
    "boolean": True,
    "numpy boolean": np.bool_(True),
    "most": 2**63 - 1,
    "least": -(2**63),
    "too much": 2**63,
    "unsigned and too much": np.uint64(2**63 + 1),
    "not a number": float("nan"),
    "infinity": float("inf"),
    "text": "9",
}
MODES = ["up", "away", "killed"]


def outcomes(mlflow: Any, experiment: str, numbers: dict[str, Any], halfway: Callable[[], None]) -> dict[str, str]:
    """Give every number as a step and as a time, alone and in a batch; return the errors' kinds by what was done."""
    from mlflow.entities import Metric

    api = mlflow.MlflowClient()
    run_id = api.create_run(api.create_experiment(experiment), start_time=np.int64(_T)).info.run_id
    found: dict[str, str] = {}

    def attempt(what: str, call: Callable[[], object]) -> None:
        try:
            with warnings.catch_warnings():  # of NumPy before 2.3, for a boolean; MLflow's own code has it too
                warnings.simplefilter("ignore", DeprecationWarning)
                call()
        except Exception as error:  # noqa: BLE001 - its kind is what is looked at
            found[what] = type(error).__name__
        else:
            found[what] = "taken"

    api.log_metric(run_id, "before", 1.0, _T, 0)
    halfway()
    for name, number in numbers.items():
        attempt(f"{name}, step", lambda n=name, v=number: api.log_metric(run_id, f"step/{n}", 1.0, _T, v))
        attempt(
            f"{name}, step in a batch",
            lambda n=name, v=number: api.log_batch(
                run_id, [Metric(f"good/{n}", 1.0, _T, 1), Metric(f"batch/{n}", np.float32(1), _T, v)]
            ),
        )
        if not isinstance(number, (int, np.integer)) or number >= 0:
            attempt(f"{name}, time", lambda n=name, v=number: api.log_metric(run_id, f"time/{n}", 1.0, v, 1))
    api.set_tag(run_id, "after", "1")
    attempt("end", lambda: api.set_terminated(run_id, end_time=np.int64(_T + 1000)))
    return found


def held(uri: str, experiment: str) -> dict[str, Any]:
    """Return all points of the experiment's one run, its tag, status and times."""
    (run,) = the_runs(uri, experiment)
    with client(uri) as api:
        points = {
            key: [(p.value, p.timestamp, p.step) for p in api.get_metric_history(run.info.run_id, key)]
            for key in sorted(run.data.metrics)
        }
    return {
        "points": points,
        "tag": run.data.tags.get("after"),
        "status": run.info.status,
        "times": (run.info.start_time, run.info.end_time),
    }


def test_a_servers_client_takes_numbers_as_the_plain_uri_does(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """With the server there, away and killed: the same errors at the same calls, the same points afterwards."""
    plain = f"{experiment_name}-plain"
    with tracking(mlflow_server.url, tmp_path / "unused") as mlflow:
        expected = outcomes(mlflow, plain, NUMBERS, lambda: None)
    assert {"taken", "TypeError", "ValueError"} == set(expected.values())
    for mode in MODES:
        experiment = f"{experiment_name}-{mode}"
        with FaultProxy(mlflow_server.url) as proxy:
            uri = f"outbox+{proxy.url}"
            with tracking(uri, tmp_path / mode) as mlflow:
                if mode == "away":
                    proxy.down()
                assert expected == outcomes(mlflow, experiment, NUMBERS, proxy.down if mode == "killed" else os.getpid)
                proxy.up()
                deliver(uri)
        assert held(mlflow_server.url, plain) == held(mlflow_server.url, experiment)


@pytest.mark.parametrize("scheme", ["sqlite", "file"])
def test_an_embedded_store_gets_what_comes_before_the_decimal_point(
    scheme: str, request: pytest.FixtureRequest, experiment_name: str, tmp_path: Path
) -> None:
    """What has no form of 64 bits is refused at the call; nothing is taken and then lost."""
    plain: str = request.getfixturevalue(f"{scheme}_uri")
    uri = f"outbox+{plain}"
    with tracking(uri, tmp_path / "outbox") as mlflow:
        found = outcomes(mlflow, experiment_name, NUMBERS, lambda: None)
        deliver(uri)
    refused = {"too much", "unsigned and too much", "not a number", "infinity", "text"}
    assert refused == {what.partition(",")[0] for what, error in found.items() if error != "taken"}
    assert {"taken", "MlflowException"} == set(found.values())
    there = held(plain, experiment_name)
    for name, step in {"int64": 3, "whole": 7, "half": 7, "numpy float": 8, "boolean": 1, "least": -(2**63)}.items():
        assert [(1.0, _T, step)] == there["points"][f"step/{name}"]
        assert [(1.0, _T, step)] == there["points"][f"batch/{name}"]
    assert [(1.0, 7, 1)] == there["points"]["time/half"]
    assert ("1", "FINISHED", (_T, _T + 1000)) == (there["tag"], there["status"], there["times"])


def test_points_of_models_and_outputs_take_the_numbers_of_other_libraries(
    sqlite_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """A metric with a link to a model, and the step at which a run made one."""
    from mlflow.entities import LoggedModelOutput, Metric

    uri = f"outbox+{sqlite_uri}"
    with tracking(uri, tmp_path / "outbox") as mlflow:
        mlflow.set_experiment(experiment_name)
        with mlflow.start_run() as run:
            model = mlflow.initialize_logged_model(name="m", source_run_id=run.info.run_id)
            api = mlflow.MlflowClient()
            point = Metric("score", np.float32(0.5), np.int64(_T), np.int64(2), model_id=model.model_id)
            api.log_batch(run.info.run_id, [point])
            api.log_outputs(run.info.run_id, [LoggedModelOutput(model.model_id, np.int64(5))])
        deliver(uri)
    with client(sqlite_uri) as plain:
        assert [5] == [made.step for made in plain.get_run(run.info.run_id).outputs.model_outputs]
        (seen,) = plain.get_logged_model(model.model_id).metrics
        assert (0.5, _T, 2) == (seen.value, seen.timestamp, seen.step)


@pytest.mark.parametrize("bad", [{"timestamp": "late"}, {"step": "third"}, {"step": []}])
def test_a_refusal_names_the_point_of_a_batch_as_it_does_without_an_outbox(
    bad: dict[str, Any], sqlite_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """In the same words; so does one of a single call."""
    from mlflow.entities import Metric

    def refusals(uri: str) -> list[str]:
        with tracking(uri, tmp_path / "outbox") as mlflow:
            api = mlflow.MlflowClient()
            mlflow.set_experiment(experiment_name)
            with mlflow.start_run() as run:
                given = {"timestamp": 1, "step": 0, **bad}
                points = [Metric("good", 1.0, 1, 0), Metric("bad", 1.0, **given)]
                found = []
                for call in (
                    lambda: api.log_batch(run.info.run_id, points),
                    lambda: api.log_metric(run.info.run_id, "bad", 1.0, **given),
                ):
                    with pytest.raises(Exception, match="") as raised:
                        call()
                    found.append(f"{raised.type.__name__}: {raised.value}")
            return found

    assert refusals(sqlite_uri) == refusals(f"outbox+{sqlite_uri}")


@pytest.mark.parametrize("scheme", ["http", "sqlite", "file"])
def test_a_point_beyond_64_bits_in_a_journal_is_a_dead_letter_and_its_neighbours_arrive(
    scheme: str, request: pytest.FixtureRequest, experiment_name: str, tmp_path: Path
) -> None:
    """An earlier version wrote such points; a server answers 200 to a batch with one, and drops the rest of it."""
    server: MlflowServer | None = request.getfixturevalue("mlflow_server") if scheme == "http" else None
    plain = server.url if server is not None else request.getfixturevalue(f"{scheme}_uri")
    uri = f"outbox+{plain}"
    with tracking(uri, tmp_path / "outbox") as mlflow:
        api = mlflow.MlflowClient()
        run_id = api.create_run(api.create_experiment(experiment_name)).info.run_id
        journal = store(uri).journals.get(run_id)
        assert journal is not None
        for event in (
            MetricEvent("before", 1.0, _T, 1),
            MetricEvent("huge", 1.0, _T, 2**63),
            Metrics({"late": 1.0, "later": 2.0}, 2**63, 1),
            MetricEvent("after", 1.0, _T, 2),
            Tags({"after": "1"}, _T),
        ):
            journal.append(event)
        result = store(uri).outbox.flush(60)
    assert (0, 0, 3) == (result.pending, result.parked, result.dead)
    there = held(plain, experiment_name)
    assert {"after": [(1.0, _T, 2)], "before": [(1.0, _T, 1)]} == there["points"]
    assert "1" == there["tag"]
