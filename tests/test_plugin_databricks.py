"""``outbox+databricks://profile``: what can be seen of it without a workspace."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from mlflow_outbox.plugin.registry_store import OutboxRegistry
from mlflow_outbox.plugin.tracking_store import OutboxStore
from mlflow_outbox.spool import provisional
from mlflow_outbox.testing.faults import accept_hang
from mlflow_outbox.testing.proxy import FaultProxy
from mlflow_outbox_worker.mlflow_sink.rest import DatabricksStore
from plugin_world import store, tracking
from servers import MlflowServer, eventually

_TOKEN = "dapi-5ecret-t0ken"


def test_a_profile_says_where_the_workspace_is(
    mlflow_server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it does not answer, no call waits beyond its deadline, and runs begin offline. The token stays there."""
    uri = "outbox+databricks://work"
    with FaultProxy(mlflow_server.url) as proxy:
        (tmp_path / "databrickscfg").write_text(f"[work]\nhost = {proxy.url}\ntoken = {_TOKEN}\n")
        monkeypatch.setenv("DATABRICKS_CONFIG_FILE", str(tmp_path / "databrickscfg"))
        proxy.on("", accept_hang(), times=None)
        waits = {"create_timeout": 0.5, "request_timeout": 2, "exit_timeout": 0, "worker": "none"}
        with tracking(uri, tmp_path / "outbox", **waits) as mlflow:
            held = store(uri)
            assert isinstance(held, OutboxStore)
            assert isinstance(mlflow.MlflowClient()._get_registry_client().store, OutboxRegistry)
            begin = time.monotonic()
            mlflow.set_experiment("/Users/ada/experiment")
            with mlflow.start_run(run_name="offline") as run:
                mlflow.log_metric("m", 1.0)
                assert {"m": 1.0} == mlflow.get_run(run.info.run_id).data.metrics
            assert time.monotonic() - begin < 5.0
            assert provisional.is_provisional(run.info.run_id)
            proxy.clear()
            eventually(lambda: held.server._aside.acquire(blocking=False), 60, "the question that hung is over")
            held.server._aside.release()
            opened = held.server.opened()
            assert isinstance(opened.store, DatabricksStore)
            assert (proxy.url, _TOKEN) == (opened.store.get_host_creds().host, opened.store.get_host_creds().token)
    kept = [path for path in (tmp_path / "outbox").rglob("*") if path.is_file()]
    assert [] == [path for path in kept if _TOKEN.encode() in path.read_bytes()]
