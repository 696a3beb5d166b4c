"""Calls that nobody waits for: what they refuse is raised to who waits, and to nobody else."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from contents import the_run
from plugin_world import WAYS, store, world
from servers import MlflowServer


@pytest.mark.parametrize("way", WAYS)
def test_what_an_asynchronous_call_refuses_is_raised_where_it_is_waited_for(
    way: str, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """A bad key, a changed param, what is no run: the call returns, and the good ones around it arrive."""
    from mlflow.exceptions import MlflowException

    with world(way, mlflow_server, tmp_path) as here:
        mlflow = here.mlflow
        mlflow.set_experiment(experiment_name)
        api = mlflow.MlflowClient()
        with mlflow.start_run() as run:
            run_id = run.info.run_id
            api.log_param(run_id, "p", 1)
            here.kill()
            calls: list[Callable[[], Any]] = [
                lambda: api.log_param(run_id, "a//b", 1, synchronous=False),
                lambda: api.log_param(run_id, "p", 2, synchronous=False),
                lambda: api.log_metric(run_id, "m", 1.0, step="no number", synchronous=False),
                lambda: api.set_tag("../no run", "t", 1, synchronous=False),
            ]
            for call in calls:
                operations = call()
                for _ in range(2):
                    with pytest.raises(MlflowException, match="The following failures occurred") as raised:
                        operations.wait()
                assert re.search(r"MlflowException|RestException|TypeError|INVALID|no number", str(raised.value))
            assert api.log_metric(run_id, "m", 2.0, synchronous=False).wait() is None
            mlflow.log_params({"q": 1}, synchronous=False).wait()
        if way != "plain":
            assert 4 == store(here.uri).outbox.counters["asynchronous_refused"]
    found = the_run(mlflow_server.url, experiment_name).data
    assert ({"m": 2.0}, {"p": "1", "q": "1"}) == (found.metrics, found.params)
