"""Creates of which nobody knows whether they are carried out: only for these a run waits before it is done."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from contents import QUICK, numbered, points, the_run
from mlflow_outbox import MLflowTracker
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox.testing import faults
from mlflow_outbox.testing.proxy import Action, FaultProxy
from mlflow_outbox_worker.outcome import classify
from mlflow_outbox_worker.sink import SinkError
from mlflow_outbox_worker.twins import was_refused
from servers import MlflowServer, eventually
from workers import delivering

#: As long as a server may take for an answer, and a run waits for a create in doubt: longer than this test.
PATIENT = dataclasses.replace(QUICK, request_timeout=600.0)


@pytest.mark.parametrize(
    ("error", "refused"),
    [
        (SinkError("refused", kind="connection", sent=False), True),
        (SinkError("too many", kind="answer", status=429), True),
        (SinkError("no", kind="answer", status=403), True),
        (SinkError("bad name", kind="answer", status=400), True),
        (SinkError("reset", kind="connection"), False),
        (SinkError("late", kind="timeout"), False),
        (SinkError("failed", kind="answer", status=500), False),
        (SinkError("gateway", kind="answer", status=502), False),
        (SinkError("unavailable", kind="answer", status=503), False),
        (SinkError("a login page", kind="not_mlflow"), False),
    ],
    ids=str,
)
def test_only_what_never_arrived_or_was_refused_is_certainly_not_carried_out(
    error: SinkError, *, refused: bool
) -> None:
    """What failed behind a gateway, or in the server, may have been carried out, or be carried out later."""
    assert refused == was_refused(error, classify(error, "create_run"))


@pytest.mark.parametrize(
    ("answer", "waits"), [(faults.status(429), False), (faults.status(502), True)], ids=["429", "502"]
)
def test_a_run_is_done_at_once_where_its_creation_was_put_off_and_waits_where_it_failed(
    answer: Action, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path, *, waits: bool
) -> None:
    """A limit on requests says that nothing was done; a gateway's answer does not. What was logged is there anyway."""
    with FaultProxy(mlflow_server.url) as proxy:
        proxy.on("runs/create", answer, times=3)
        tracker = MLflowTracker(experiment_name, proxy.url, outbox_dir=tmp_path, worker="none", settings=PATIENT)
        with tracker.start_run() as run:
            for step in range(20):
                run.log_metric("loss", step / 2, step=step)
        tracker.close(0)
        assert tracker.outbox_path is not None
        with delivering(OutboxDirectory.open(tracker.outbox_path), proxy.url, PATIENT) as counters:
            eventually(lambda: not tracker.flush(0).pending, 60)
            if not waits:
                eventually(lambda: counters["runs_verified"] == 1, 60)
            assert (0 if waits else 1) == counters["runs_verified"]
    assert numbered(20) == points(mlflow_server.url, the_run(mlflow_server.url, experiment_name).info.run_id, "loss")
