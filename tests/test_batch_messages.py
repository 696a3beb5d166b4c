"""The batch that is written without protobuf says exactly what MLflow's own message says."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow.entities import Metric, Param, RunTag

from mlflow_outbox_worker.mlflow_sink.rest import Host, ServerStore
from mlflow_outbox_worker.mlflow_sink.transport import Answer
from mlflow_outbox_worker.sink import MetricPoint

pytestmark = pytest.mark.compatibility

_INT64 = st.integers(-(2**63), 2**63 - 1)
_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
_POINTS = st.lists(st.builds(MetricPoint, _TEXT, st.floats(), _INT64, _INT64), max_size=5)
_LABELS = st.dictionaries(_TEXT, _TEXT, max_size=3)


class _Recording:
    """A transport that keeps what it was to send."""

    def __init__(self) -> None:
        self.bodies: list[Any] = []

    def request(self, _creds: Any, _method: str, _path: str, *, json: Any) -> Answer:
        self.bodies.append(json)
        return Answer(200, {"Content-Length": "2"}, b"{}")


@settings(max_examples=200, deadline=None)
@given(points=_POINTS, params=_LABELS, tags=_LABELS)
def test_a_batch_is_written_as_mlflow_writes_it(
    points: list[MetricPoint], params: dict[str, str], tags: dict[str, str]
) -> None:
    """Any batch, with any text, number and special value, is the same JSON either way."""
    transport: Any = _Recording()
    store = ServerStore(Host("http://127.0.0.1:9").host_creds, transport)
    store.send_batch("run", points, params, tags)
    store.log_batch(
        "run",
        metrics=[Metric(*point) for point in points],
        params=[Param(*item) for item in params.items()],
        tags=[RunTag(*item) for item in tags.items()],
    )
    ours, mlflows = transport.bodies
    assert mlflows == (json.loads(ours) if isinstance(ours, bytes) else ours)
    assert json.dumps(mlflows) == json.dumps(
        json.loads(ours) if isinstance(ours, bytes) else ours
    )  # types and order too
