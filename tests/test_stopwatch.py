"""Programs whose tests stop their clocks, as freezegun does: what waits here still waits for as long as it said."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from contents import QUICK, points, the_run
from mlflow_outbox import FlushResult, MLflowTracker
from mlflow_outbox.testing.proxy import FaultProxy
from servers import MlflowServer


def stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop the clocks that freezegun stops, at a time that is decades ahead of what they show."""
    for name, value in (
        ("monotonic", 1.5e9),
        ("monotonic_ns", 1_500_000_000_000_000_000),
        ("perf_counter", 1.5e9),
        ("time", 1.5e9),
        ("time_ns", 1_500_000_000_000_000_000),
    ):
        monkeypatch.setattr(time, name, lambda value=value: value)


def test_a_flush_ends_in_time_where_the_clocks_of_a_program_stand_still(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says what is left; once the clocks go on and the server is back everything arrives."""
    left: list[FlushResult] = []
    with FaultProxy(mlflow_server.url) as proxy:
        proxy.down()
        tracker = MLflowTracker(experiment_name, proxy.url, outbox_dir=tmp_path / "outbox", settings=QUICK)
        with monkeypatch.context() as patch:
            stop(patch)
            with tracker.start_run("stands still") as run:
                assert run.log_metric("m", 1.0, step=1)
            flush = threading.Thread(target=lambda: left.append(tracker.flush(0.5)), daemon=True)
            flush.start()
            flush.join(30)
        assert [True] == [each.pending > 0 for each in left]
        proxy.up()
        assert tracker.flush(60)
        tracker.close(10)
    run_id = the_run(mlflow_server.url, experiment_name).info.run_id
    assert [(1, 1.0)] == list(points(mlflow_server.url, run_id, "m").elements())
