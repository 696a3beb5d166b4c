"""Where files go that a journal gives to a trace, which may be one that somebody else wrote."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from contents import QUICK, client
from mlflow_outbox.destination import resolve
from mlflow_outbox.errors import InvalidEvent
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox.spool.events import FileFor, RunStarted
from mlflow_outbox_worker import trace_places
from mlflow_outbox_worker.mlflow_sink import open_sink, trace_files
from mlflow_outbox_worker.outcome import classify
from servers import eventually
from sink_contract import fails, new_run
from spools import RUN, make_journal, metric
from workers import delivering


def check(given: str, place: str = "", location: str = "mlflow-artifacts:/1") -> None:
    """Look at a place that has no ids of this side, or that has become another one."""
    trace_places.check(given, place or given, lambda: location)


@pytest.mark.parametrize(
    "given",
    [
        "mlflow-artifacts:/1/traces/tr-1/artifacts",
        "mlflow-artifacts:/traces/tr-1/artifacts",
        "mlflow-artifacts:/workspaces/w/team/traces/12/traces/tr-1/artifacts",
        "mlflow-artifacts:/with a space/per%cent/ä/traces/tr-1/artifacts/attachments",
        "outbox-artifacts:/0123/experiment/9066900000000000001/artifacts/traces/tr-1/artifacts",
    ],
)
def test_a_place_that_calls_write_down_is_taken(given: str) -> None:
    """Whatever the experiment's is called."""
    check(given, "file:///srv/1/traces/tr-1/artifacts")
    check(given)


def test_another_host_is_taken_where_the_experiment_has_it() -> None:
    """Artifacts may be kept by a server of their own, and a replay to another place goes to that one's."""
    given = "mlflow-artifacts://files.example:5000/1/traces/tr-1/artifacts"
    check(given, location="mlflow-artifacts://files.example:5000/1")
    check(given, place="s3://bucket/2/traces/tr-1/artifacts")
    for location in ("", "mlflow-artifacts:/1", "mlflow-artifacts://other.example:5000/1", "s3://files.example:5000/1"):
        with pytest.raises(InvalidEvent, match="no place of a trace"):
            check(given, location=location)


@pytest.mark.parametrize(
    "given",
    [
        "",
        "/home/me/.ssh",
        "/srv/1/traces/tr-1/artifacts",
        "file:///srv/1/traces/tr-1/artifacts",
        "http://evil.example/traces/tr-1/artifacts",
        "s3://evil/traces/tr-1/artifacts",
        "mlflow-artifacts://[evil/traces/tr-1/artifacts",
        "mlflow-artifacts:/\t/evil.example/traces/tr-1/artifacts",
        "mlflow-artifacts:/1/../../mlflow/traces/tr-1/artifacts",
        "mlflow-artifacts:/1/%252e%252e/traces/tr-1/artifacts",
        "mlflow-artifacts:/1?x=/traces/tr-1/artifacts",
        "mlflow-artifacts:/1",
        "outbox-artifacts:/0/run/1/artifacts/traces/tr-1/artifacts",
        "outbox-artifacts:/0/experiment/1/artifacts",
        "outbox-artifacts:/0/experiment/1/artifacts/.ssh",
        "outbox-artifacts:/0/experiment/1/artifacts/traces/../artifacts",
        "outbox-artifacts:/0/experiment/1/artifacts/.ssh/traces/tr-1/artifacts",
        "outbox-artifacts:/0/experiment/1/artifacts/traces/tr-1/artifacts/../../../.ssh",
    ],
)
def test_a_place_elsewhere_is_refused(given: str) -> None:
    """A directory of this machine, another host, or another part of the server."""
    with pytest.raises(InvalidEvent):
        check(given)


@pytest.mark.parametrize("form", ["{}", "file://{}", "outbox-artifacts:/0/experiment/0/artifacts/../../..{}"])
def test_what_somebody_wrote_into_a_journal_puts_no_file_elsewhere(form: str, sqlite_uri: str, tmp_path: Path) -> None:
    """It is a dead letter, and what comes behind it arrives."""
    outbox = OutboxDirectory.create(tmp_path / "outbox", resolve(sqlite_uri), now_ms=1)
    elsewhere, content = tmp_path / "home" / ".ssh", b"ssh-ed25519 AAAA"
    digest = hashlib.sha256(content).hexdigest()
    writer = make_journal(outbox)
    assert writer.append(RunStarted(1_700_000_000_000, "r", "me", {}, False))
    files = outbox.run(RUN) / "files"
    files.mkdir(0o700, exist_ok=True)
    (files / digest).write_bytes(content)
    owner = f"uri:{form.format(elsewhere)}"
    assert writer.append(FileFor(owner, "authorized_keys", digest, len(content), 1_700_000_000_001))
    assert writer.append(metric(1))
    writer.close()
    with delivering(outbox, sqlite_uri, QUICK) as counters:
        eventually(lambda: (1, 2) == (counters["dead_letters"], counters["delivered"]), 60)
    assert [] == list(tmp_path.rglob("authorized_keys"))


@pytest.mark.parametrize("owner", ["experiment:{}", "run:{}", "anything:{}", "{}"])
def test_only_models_and_traces_are_given_files(owner: str, sqlite_uri: str, tmp_path: Path) -> None:
    """A journal may make an experiment with any directory for its place, and would put files right there."""
    elsewhere, content = tmp_path / "home" / ".ssh", b"ssh-ed25519 AAAA"
    with client(sqlite_uri) as api:
        number = api.create_experiment("of a journal", artifact_location=elsewhere.as_uri())
    outbox = OutboxDirectory.create(tmp_path / "outbox", resolve(sqlite_uri), now_ms=1)
    digest = hashlib.sha256(content).hexdigest()
    writer = make_journal(outbox)
    assert writer.append(RunStarted(1_700_000_000_000, "r", "me", {}, False))
    files = outbox.run(RUN) / "files"
    files.mkdir(0o700, exist_ok=True)
    (files / digest).write_bytes(content)
    file = FileFor(owner.format(number), "authorized_keys", digest, len(content), 1_700_000_000_001)
    assert writer.append(file)
    assert writer.append(metric(1))
    writer.close()
    with delivering(outbox, sqlite_uri, QUICK) as counters:
        eventually(lambda: 3 == counters["dead_letters"] + counters["delivered"], 60)
        assert (1, 2) == (counters["dead_letters"], counters["delivered"])
    assert [] == list(tmp_path.rglob("authorized_keys"))


@pytest.mark.parametrize("kind", ["trace", "output", "point"])
def test_no_id_in_a_journal_leads_out_of_a_file_store(kind: str, file_uri: str, tmp_path: Path) -> None:
    """MLflow's own makes a path of it, and would write a file, and files of given names and contents, anywhere."""
    from mlflow.entities import LoggedModelOutput, Metric, TraceInfo, TraceLocation, TraceState

    from mlflow_outbox.plugin import codec

    elsewhere = str(tmp_path / "home" / ".git" / "refs")
    with contextlib.closing(open_sink(file_uri)) as sink:
        experiment = sink.experiment_id("of a journal")
        run_id = new_run(sink, experiment)
        place = TraceLocation.from_experiment_id(experiment)
        points: dict[str, Any] = {"metrics": [Metric("loss", 1.0, 1, 1, elsewhere)], "params": [], "tags": []}
        calls: dict[str, tuple[str, dict[str, Any]]] = {
            "trace": ("start_trace", {"trace_info": TraceInfo(elsewhere, place, 1, TraceState.OK, tags={"v1": "x"})}),
            "output": ("log_outputs", {"run_id": run_id, "models": [LoggedModelOutput(elsewhere, 1)]}),
            "point": ("log_batch", {"run_id": run_id, **points}),
        }
        operation, arguments = calls[kind]
        error = fails(lambda: sink.call(operation, codec.dumps(arguments).decode()))
    assert "dead_letter" == classify(error, operation).kind, error
    assert not (tmp_path / "home").exists()


def test_the_id_of_a_trace_is_the_name_of_one_folder() -> None:
    """Where the spans of a trace become a file, too."""
    store: Any = SimpleNamespace(get_experiment=lambda _: pytest.fail("nothing is asked for"))
    for trace_id in ("../../.ssh", "..", "", "a/b", "tr-%2e%2e", "tr-1?x"):
        spans = [SimpleNamespace(trace_id=trace_id)]
        with pytest.raises(ValueError, match="is none"):
            trace_files.keep(store, store, "1", spans)
