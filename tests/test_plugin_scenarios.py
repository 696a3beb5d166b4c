"""Unchanged MLflow code, with the server there, away from the start, and taken away halfway: MLflow holds the same."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pytest

import plugin_scenarios
from mlflow_outbox.testing.proxy import FaultProxy
from plugin_world import deliver, differences, picture, tracking
from servers import MlflowServer

pytestmark = pytest.mark.compatibility

_pictures: dict[str, dict[str, Any]] = {}


def plain_picture(name: str, server: MlflowServer, tmp_path: Path) -> dict[str, Any]:
    """Return what MLflow holds after a scenario without an outbox; made once."""
    if name not in _pictures:
        experiment = f"plain-{name}-{uuid.uuid4().hex[:8]}"
        with tracking(server.url, tmp_path / "unused") as mlflow:
            plugin_scenarios.ALL[name](mlflow, experiment, plugin_scenarios.nothing)
            mlflow.flush_async_logging()
            mlflow.flush_trace_async_logging()
        _pictures[name] = picture(server.url, experiment)
    return _pictures[name]


@pytest.mark.parametrize("mode", ["up", "away from the start", "away from halfway"])
@pytest.mark.parametrize("name", list(plugin_scenarios.ALL))
def test_mlflow_holds_what_it_holds_without_an_outbox(
    name: str, mode: str, mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    """Field by field: runs, points, params, tags, files, datasets, models, their MLmodel, traces and spans."""
    expected = plain_picture(name, mlflow_server, tmp_path)
    experiment = f"outbox-{name}-{uuid.uuid4().hex[:8]}"
    with FaultProxy(mlflow_server.url) as proxy:
        uri = f"outbox+{proxy.url}"
        with tracking(uri, tmp_path / "outbox") as mlflow:
            if mode == "away from the start":
                proxy.down()
            plugin_scenarios.ALL[name](
                mlflow, experiment, proxy.down if "halfway" in mode else plugin_scenarios.nothing
            )
            mlflow.flush_trace_async_logging()
            proxy.up()
            deliver(uri)
    assert [] == differences(expected, picture(mlflow_server.url, experiment))
