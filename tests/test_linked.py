"""Points that name a model or a dataset: many of them go as one request, and cost no more than others."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import Metric

from contents import client
from mlflow_outbox import views
from mlflow_outbox.linked import points_in
from mlflow_outbox.plugin import codec, reads
from mlflow_outbox.spool.events import Event, Params, Request, arguments_of
from mlflow_outbox.testing import faults
from mlflow_outbox.testing.proxy import FaultProxy
from mlflow_outbox.views import RunView
from mlflow_outbox_worker.intake import _end
from mlflow_outbox_worker.planner import Call, Linked, Step, plan
from plugin_world import store, the_runs, tracking
from servers import MlflowServer


def linked(*metrics: Metric, **others: Any) -> Request:
    """A request of points, as the plugin writes it."""
    arguments = {"run_id": "r", "metrics": list(metrics), "params": [], "tags": []} | others
    return Request("log_batch", codec.dumps(arguments), 1)


def point(number: int, key: str = "loss") -> Metric:
    """One that names a model."""
    return Metric(key, float(number), number, number, model_id="m-1")


def planned(*events: Event, most: int = 1000) -> list[Step]:
    """What is done for the events of one writer."""
    return plan([("w", event) for event in events], RunView(), batch_points=most).steps


def sizes(steps: list[Step]) -> list[int]:
    """How many requests each step makes as one."""
    return [len(step.requests) if isinstance(step, Linked) else 1 for step in steps]


def test_points_that_follow_each_other_go_together_up_to_the_limit() -> None:
    """In their order."""
    events = [linked(point(number)) for number in range(7)]
    steps = planned(*events, most=3)
    assert [3, 3, 1] == sizes(steps)
    assert Call(events[6]) == steps[2]
    assert [*events[:6]] == [request for step in steps[:2] if isinstance(step, Linked) for request in step.requests]


@pytest.mark.parametrize(
    "between",
    [
        Params({"a": "1"}, 1),
        Request("set_logged_model_tags", b"{}", 1),
        linked(point(9), run_id="another"),
        linked(point(9), tags=[{"key": "k", "value": "v"}]),
        linked(*map(point, range(1000))),
        Request("log_batch", b'{"run_id": "r", "metrics": 7}', 1),
        Request("log_batch", b"no JSON", 1),
        Request("log_batch", linked(point(9)).arguments, 1, kept="a" * 64),
    ],
    ids=["a param", "a call", "of another run", "with tags", "many", "no metrics", "unreadable", "in a file"],
)
def test_points_on_both_sides_of_something_else_do_not_go_together(between: Event) -> None:
    """It keeps its place."""
    steps = planned(linked(point(1)), linked(point(2)), between, linked(point(3)), linked(point(4)))
    assert [2, 1, 2] == sizes(steps)


def test_a_window_holds_many_points_and_few_of_other_requests() -> None:
    """Of those that go together a hundred are one."""
    points: list[tuple[str, Event]] = [("w", linked(point(number))) for number in range(4000)]
    calls: list[tuple[str, Event]] = [("w", Request("set_trace_tag", b"{}", 1)) for _ in range(40)]
    assert (0, 20, 0) == (_end(points[:1900]), _end(calls), _end([*points[:900], *calls[:5]]))
    assert 1900 < _end(points) <= 2000
    assert 20 == _end([one for pair in zip(points, calls, strict=False) for one in pair])


def test_a_view_keeps_the_latest_requests_of_points_and_the_last_point_of_each_metric(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So it does not grow; a reader sees the metrics that were logged long ago."""
    monkeypatch.setattr(views, "LINKED", 10)
    view = RunView()
    view.fold(linked(point(5, "early"), Metric("odd", math.nan, 2, 0, model_id="m-1")), "w")
    for number in range(50):
        view.fold(linked(point(number)), "w")
        view.fold(Request("create_logged_model", b"{}", 1), "w")
        view.trim()
    assert Counter(log_batch=10, create_logged_model=50) == Counter(one.operation for one in view.requests)
    assert list(range(40, 50)) == [
        one.step for kept in view.requests if kept.operation == "log_batch" for one in points_in(kept.arguments)
    ]
    assert views.Latest(5.0, 5, 5, 1) == view.linked["early"]
    assert math.isnan(view.linked["odd"].value)
    assert {} == view.metrics  # what is compared with MLflow at the end is not of these


def test_points_of_a_model_arrive_in_few_requests(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Each once, of the model and of its run, though an answer is lost; and readers see the last one offline."""
    with FaultProxy(mlflow_server.url) as proxy:
        uri = f"outbox+{proxy.url}"
        with tracking(uri, tmp_path) as mlflow:
            mlflow.set_experiment(experiment_name)
            with mlflow.start_run() as run:
                model = mlflow.initialize_logged_model(name="m", source_run_id=run.info.run_id)
                mlflow.log_metric("early", 7.0, model_id=model.model_id)
                proxy.down()  # how many requests it takes would depend on who is faster, who logs or who delivers
                for step in range(2500):
                    mlflow.log_metric("loss", step / 2, step=step, model_id=model.model_id)
            proxy.on("log-batch", faults.forward_then_drop_response())
            proxy.up()
            result = store(uri).outbox.flush(60)
            assert (0, 0, 0) == (result.pending, result.parked, result.dead), result
            asked = [one.path for one in proxy.requests if one.path.endswith("runs/log-batch")]
            assert len(asked) < 20
            proxy.down()
            assert {"early": 7.0, "loss": 1249.5} == mlflow.get_run(run.info.run_id).data.metrics
    with client(mlflow_server.url) as api:
        (found,) = api.search_logged_models([api.get_experiment_by_name(experiment_name).experiment_id])
        (held,) = the_runs(mlflow_server.url, experiment_name)
        history = api.get_metric_history(held.info.run_id, "loss")
    assert [step / 2 for step in range(2500)] == sorted(one.value for one in history)
    expected = Counter({("early", 7.0): 1} | {("loss", step / 2): 1 for step in range(2500)})
    assert expected == Counter((one.key, one.value) for one in found.metrics)


def test_of_many_points_the_one_that_mlflow_refuses_is_a_dead_letter(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """What is beside it arrives, with few requests more."""
    with FaultProxy(mlflow_server.url) as proxy:
        uri = f"outbox+{proxy.url}"
        refused = json.dumps({"error_code": "INVALID_PARAMETER_VALUE", "message": "not this one"})
        proxy.on("log-batch", faults.status(400, body=refused), times=None, body=lambda body: b'"step": 77' in body)
        with tracking(uri, tmp_path) as mlflow:
            mlflow.set_experiment(experiment_name)
            with mlflow.start_run() as run:
                model = mlflow.initialize_logged_model(name="m", source_run_id=run.info.run_id)
                for step in range(80):
                    mlflow.log_metric("loss", step / 2, step=step, model_id=model.model_id)
            result = store(uri).outbox.flush(60)
            assert (0, 0, 1) == (result.pending, result.parked, result.dead), result
    (held,) = the_runs(mlflow_server.url, experiment_name)
    with client(mlflow_server.url) as api:
        history = api.get_metric_history(held.info.run_id, "loss")
    assert [step for step in range(80) if step != 77] == sorted(one.step for one in history)


def test_requests_that_go_together_say_what_they_said() -> None:
    """Not a number included."""
    from mlflow_outbox import linked as module

    values = [0.1, math.inf, -math.inf, math.nan, 1e308, -0.0]
    requests = [
        linked(Metric("k", value, 1, 2**62, model_id="m", dataset_name="d", dataset_digest="1")) for value in values
    ]
    joined = module.joined(requests)
    assert arguments_of(joined.arguments)["run_id"] == "r"
    made = codec.loads(joined.arguments)["metrics"]
    assert list(map(repr, values)) == [repr(one.value) for one in made]
    assert {("k", 1, 2**62, "m", "d")} == {
        (one.key, one.timestamp, one.step, one.model_id, one.dataset_name) for one in made
    }
    view = RunView()
    reads.fold_batch(view, joined.arguments)
    assert 6 == view.metrics["k"].points
