"""A file store whose writer is killed at each system call that changes something, and what others left torn in one."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from faults import workload
from faults.children import Nest
from faults.table import Row
from faults.test_kills import changes, points_of
from mlflow_outbox_worker.sink import RUN_ID_TAG, MetricPoint, Sink

#: The calls that change what is on disk; ``openat`` only where it makes a file.
CALLS = ("openat", "write", "mkdir", "rename", "rmdir", "unlink", "unlinkat")
KEY = "0123456789abcdef0123456789abcdef"


def record(sink: Sink) -> None:
    """Do what a worker does that has lost its ledger: look for the run, create it when it is not there, fill it."""
    experiment = sink.experiment_id("recorded")
    found = sink.find_runs(experiment, KEY)
    tags = {RUN_ID_TAG: KEY, "note": "from the start"}
    run = found[0] if found else sink.create_run(experiment, run_name="one", start_time_ms=1, user="ada", tags=tags)
    points = [] if sink.metric_history(run, "loss") else [MetricPoint("loss", 0.5, 1, 1)]
    sink.log_batch(run, points, {"lr": "0.1"}, {"t": "1"})
    sink.update_run(run, status="FINISHED", end_time_ms=2)


def record_once(fd: int, uri: str) -> None:
    """Record, and acknowledge."""
    from mlflow_outbox_worker.mlflow_sink import open_sink

    with closing(open_sink(uri)) as sink:
        record(sink)
    workload.ack(fd, 1)
    os._exit(0)


def record_again(fd: int, uri: str) -> None:
    """Record where somebody was killed, then report what MLflow's own client finds."""
    from mlflow import MlflowClient

    from mlflow_outbox_worker.mlflow_sink import open_sink

    def work() -> dict[str, Any]:
        with closing(open_sink(uri)) as sink:
            record(sink)
        os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
        client = MlflowClient(uri)
        experiments = [e for e in client.search_experiments() if e.name == "recorded"]
        runs = [run for experiment in experiments for run in client.search_runs([experiment.experiment_id])]
        return {
            "experiments": len(experiments),
            "runs": [[r.info.run_name, r.info.status, r.data.metrics, r.data.params, r.data.tags] for r in runs],
        }

    workload.reported(fd, work)


def check(report: dict[str, Any], root: Path) -> None:
    """Check that there is one run, whole, and nothing half-made beside it."""
    assert 1 == report["experiments"], report
    assert 1 == len(report["runs"]), report
    name, status, metrics, params, tags = report["runs"][0]
    assert ("one", "FINISHED", {"loss": 0.5}, {"lr": "0.1"}) == (name, status, metrics, params)
    shown = {key: tags.get(key) for key in (RUN_ID_TAG, "note", "t", "mlflow.user")}
    assert {RUN_ID_TAG: KEY, "note": "from the start", "t": "1", "mlflow.user": "ada"} == shown
    assert 1 == sum((folder / "tags" / RUN_ID_TAG).exists() for folder in root.glob("*/*"))
    assert [] == list(root.glob("**/.mlflow_outbox-*"))


@pytest.mark.needs("strace")
@pytest.mark.fault("F31", "a file store's writer killed at system calls of creating and filling a run, its ledger lost")
def test_a_file_store_s_run_is_there_wholly_or_not_at_all(nest: Nest, row: Row, tmp_path: Path) -> None:
    """The next one, which knows nothing, makes one run of it; MLflow's own client reads it; no draft stays behind."""
    trace = tmp_path / "trace"
    whole = nest.traced(trace, ",".join(CALLS), "", record_once, (tmp_path / "whole").as_uri())
    assert 0 == whole.join()
    points = changes(trace)
    chosen = row.sample(points, 10, len(points))
    fired = 0
    for number, (name, when) in enumerate(chosen):
        root = tmp_path / f"mlruns{number}"
        inject = f"{name}:signal=SIGKILL:when={when}"
        child = nest.traced(trace, ",".join(CALLS), inject, record_once, root.as_uri())
        killed = child.join() != 0
        assert killed or points_of(trace)[name] < when, f"{name} {when} came, and nobody was killed"
        fired += killed
        try:
            check(nest.start(record_again, root.as_uri()).report(), root)
        except AssertionError as error:
            failure = f"killed before {name} {when}: {error}"
            raise AssertionError(failure) from error
        row.done()
    row.measure(points=len(points), fired=fired)


def tear(whole: Path, folder: Path, how: str) -> None:
    """Make a copy of a run or of an experiment, torn."""
    folder.mkdir()
    description = (whole / "meta.yaml").read_text()
    if how == "description empty":
        (folder / "meta.yaml").touch()
    elif how == "description cut":
        (folder / "meta.yaml").write_text(description[: len(description) // 2])
    elif how == "description in another encoding":
        (folder / "meta.yaml").write_bytes(description.replace(whole.name, folder.name).encode() + b"note: caf\xe9\n")
    elif how == "a metric without a point":
        for name in ("metrics", "params", "artifacts"):
            (folder / name).mkdir()
        (folder / "metrics" / "loss").touch()
        (folder / "meta.yaml").write_text(description.replace(whole.name, folder.name))


@pytest.mark.fault("F31", "a file store in which another process left a run and an experiment torn")
@pytest.mark.parametrize(
    "how",
    [
        *("description empty", "description cut", "description in another encoding", "no description"),
        "a metric without a point",
    ],
)
def test_what_others_left_torn_in_a_file_store_holds_nothing_up(
    how: str, file_uri: str, nest: Nest, row: Row, tmp_path: Path
) -> None:
    """A torn run or experiment is none: delivery goes on beside it, and touches nothing in it."""
    root = tmp_path / "mlruns"
    assert 0 == nest.start(record_once, file_uri).join()
    (run,) = (path.parent for path in root.glob("*/*/tags"))
    torn = [run.parent / ("a" * 32), root / "123456789"]
    tear(run, torn[0], how)
    if how != "a metric without a point":
        tear(run.parent, torn[1], how)
    before = sorted(str(path) for folder in torn for path in folder.rglob("*"))
    report = nest.start(workload.drain, file_uri, str(tmp_path / "outbox"), "recorded", 0, {}).report()
    assert {"pending": 0, "parked": 0, "dead": 0} == {k: report["left"][k] for k in ("pending", "parked", "dead")}
    assert before == sorted(str(path) for folder in torn for path in folder.rglob("*"))
    row.done()
