"""A second and a third job go on with a run, offline: in MLflow it is one run with all their steps."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from contents import QUICK, artifact_text, client, numbered, points, runs, the_run
from mlflow_outbox import MLflowTracker
from mlflow_outbox.destination import resolve
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox.spool.events import RunEnded, RunStarted
from mlflow_outbox.spool.identity import in_full
from mlflow_outbox_worker.ledger import Ledger
from replays import command, the_outbox
from servers import MlflowServer, eventually
from spools import RUN, make_journal, metric
from workers import delivering

Job = Callable[..., str]
PARENT = "mlflow.parentRunId"


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def job(mlflow_server: MlflowServer, experiment_name: str) -> Job:
    """Be one job: start a run, or go on with one, log steps to an outbox, end the run; return the run's id."""

    def work(root: Path, first: int, last: int, run_id: str | None = None, status: str | None = "FINISHED") -> str:
        tracker = MLflowTracker(experiment_name, mlflow_server.url, outbox_dir=root, worker="none", settings=QUICK)
        run = tracker.start_run("long" if run_id is None else None, run_id=run_id)
        for step in range(first, last):
            run.log_metric("loss", step / 2, step=step)
        run.set_tag("last job", str(first))
        run.log_text(f"from {first}", f"jobs/{first}.txt")
        if status is not None:
            run.end(status)
        tracker.close(0)
        return run.run_id

    return work


def check(uri: str, experiment: str, steps: int, last_job: int, status: str = "FINISHED") -> None:
    """Check that there is one run with all steps once, and what the last job made of it."""
    run = the_run(uri, experiment)
    assert numbered(steps) == points(uri, run.info.run_id, "loss")
    assert ("long", status, str(last_job)) == (run.info.run_name, run.info.status, run.data.tags["last job"])


def test_three_jobs_in_one_outbox_make_one_run(
    job: Job, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """All offline, delivered together; each wrote its own segment."""
    root = tmp_path / "outbox"
    run_id = job(root, 0, 100, status="FAILED")
    job(root, 100, 200, run_id, status=None)
    job(root, 200, 300, run_id)
    assert 3 == len(list(root.glob(f"*/runs/{run_id}/*.log")))
    assert 0 == command("replay", root)
    check(mlflow_server.url, experiment_name, 300, 200)


def test_a_given_start_time_takes_nothing_from_a_run_that_goes_on(
    sqlite_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """Its tags and its status are those of the later call; the run began when the first one said."""
    root, began = tmp_path / "outbox", time.time_ns() // 1_000_000 - 3_600_000
    tracker = MLflowTracker(experiment_name, sqlite_uri, outbox_dir=root, worker="none", settings=QUICK)
    with tracker.start_run("long", start_time=began, tags={"phase": "1"}) as first:
        first.set_tag("phase", "1b")
    assert 0 == command("flush", "--outbox-dir", root, "--timeout", "60")
    again = tracker.start_run(run_id=first.run_id, start_time=began + 1, tags={"phase": "2"})
    assert 0 == command("flush", "--outbox-dir", root, "--timeout", "60")
    run = the_run(sqlite_uri, experiment_name)
    assert ("2", "RUNNING", began) == (run.data.tags["phase"], run.info.status, run.info.start_time)
    again.end()
    tracker.close(0)


def test_a_run_is_gone_on_with_by_as_much_of_its_id_as_a_terminal_shows(
    job: Job, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """As people copy it from there, filed or not; what several runs begin with is taken for an id of MLflow's."""
    root = tmp_path / "outbox"
    run_id = job(root, 0, 100)
    assert run_id == job(root, 100, 200, run_id[:8])
    assert 0 == command("replay", root)
    assert (the_outbox(root) / "delivered" / run_id).is_dir()
    assert run_id == job(root, 200, 300, run_id[:8])
    assert 0 == command("replay", root)
    check(mlflow_server.url, experiment_name, 300, 200)
    assert "0b0e5e1f" == in_full("0b0e5e1f", ["0b0e5e1f" + end * 24 for end in "ab"])


def log_family(tracker: MLflowTracker) -> str:
    """Log a run, a child of it that is told so at its start, and one that is told later; return the parent's id."""
    parent = tracker.start_run("parent")
    with tracker.start_run("child", tags={PARENT: parent.run_id}) as child:
        child.log_metric("loss", 1.0)
    with tracker.start_run("later child") as child:
        child.set_tag(PARENT, parent.run_id)
    parent.end()
    return parent.run_id


def parents_of(uri: str, experiment: str) -> dict[str, str | None]:
    """Return what each run's tag says of its parent, by name; the parent's name where that is a run there."""
    listed = runs(uri, experiment)
    names = {run.info.run_id: run.info.run_name for run in listed}
    tags = {run.info.run_name: run.data.tags.get(PARENT) for run in listed}
    return {name: names.get(tag, tag) if tag else None for name, tag in tags.items()}


@pytest.mark.parametrize("filed", ["", "filed", "without a ledger"])
def test_nested_runs_name_their_parent_by_mlflow_s_id(
    filed: str, sqlite_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """Whichever is delivered first, also when the parent was filed before and the ledger was lost."""
    root = tmp_path / "outbox"

    def opened() -> MLflowTracker:
        return MLflowTracker(experiment_name, sqlite_uri, outbox_dir=root, worker="none", settings=QUICK)

    tracker = opened()
    expected = {"parent": None, "child": "parent", "later child": "parent"}
    parent = log_family(tracker)
    if filed:
        tracker.close(0)
        assert 0 == command("flush", "--outbox-dir", root, "--timeout", "60")
        assert (the_outbox(root) / "delivered" / parent).is_dir()
        if filed == "without a ledger":
            shutil.rmtree(the_outbox(root) / "delivery")
        tracker = opened()
        tracker.start_run("late child", tags={PARENT: parent}).end()
        expected["late child"] = "parent"
    tracker.start_run("stranger", tags={PARENT: "ab" * 16}).end()
    tracker.close(0)
    assert 0 == command("flush", "--outbox-dir", root, "--timeout", "60")
    assert {**expected, "stranger": "ab" * 16} == parents_of(sqlite_uri, experiment_name)


def test_a_child_of_a_parked_run_is_parked_with_it_and_goes_on_with_it(
    sqlite_uri: str, experiment_name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It holds up no flush, and says for whom it waits."""
    gone, root = f"{experiment_name}-gone", tmp_path / "outbox"
    with client(sqlite_uri) as mlflow:
        number = mlflow.create_experiment(gone)
        mlflow.delete_experiment(number)
    parents = MLflowTracker(gone, sqlite_uri, outbox_dir=root, worker="none", settings=QUICK)
    children = MLflowTracker(experiment_name, sqlite_uri, outbox_dir=root, worker="none", settings=QUICK)
    with parents.start_run("parent") as parent, children.start_run("child", tags={PARENT: parent.run_id}):
        pass
    for tracker in (parents, children):
        tracker.close(0)
    assert 4 == command("flush", "--outbox-dir", root, "--timeout", "60")
    assert 0 == command("status", "--outbox-dir", root)
    assert f"it waits for {parent.run_id}, which is parked" in " ".join(capsys.readouterr().out.split())
    with client(sqlite_uri) as mlflow:
        mlflow.restore_experiment(number)
    assert 0 == command("flush", "--outbox-dir", root, "--timeout", "60")
    held = the_run(sqlite_uri, gone).info.run_id
    assert {"child": held} == parents_of(sqlite_uri, experiment_name)
    with contextlib.closing(Ledger.open(the_outbox(root) / "delivery", read_only=True)) as ledger:
        assert [1] == [record.creates for record in ledger.records() if record.run_id != parent.run_id]


@pytest.mark.parametrize("later", ["first", "second"])
@pytest.mark.parametrize("before", [True, False])
def test_of_two_jobs_contents_of_one_artifact_the_later_stays(
    before: bool, later: str, mlflow_server: MlflowServer, sqlite_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """Whichever job began first, at a server and in a directory, and with what is there already."""
    for name, uri in (("server", mlflow_server.url), ("here", sqlite_uri)):
        root = tmp_path / name
        tracker = MLflowTracker(experiment_name, uri, outbox_dir=root, worker="none", settings=QUICK)
        jobs = {"first": tracker.start_run("shared")}
        if before:
            jobs["first"].log_text("before all", "report.txt")
            assert 0 == command("flush", "--outbox-dir", root, "--timeout", "60")
        jobs["second"] = tracker.start_run(run_id=jobs["first"].run_id)
        earlier = next(name for name in jobs if name != later)
        for label, text in ((earlier, "old"), (later, "new")):
            jobs[label].log_text(text, "report.txt")
            jobs[label].set_tag("last", text)
            logged = time.time_ns() // 1_000_000
            eventually(lambda logged=logged: time.time_ns() // 1_000_000 > logged)  # type: ignore[misc]  # mypy infers no default
        jobs["second"].end()
        jobs["first"].end()
        tracker.close(0)
        assert 0 == command("flush", "--outbox-dir", root, "--timeout", "60")
        run = the_run(uri, experiment_name)
        assert ("new", "new") == (artifact_text(uri, run.info.run_id, "report.txt"), run.data.tags["last"])


def test_a_run_goes_on_after_it_was_delivered_and_filed(
    job: Job, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Its id in the outbox and MLflow's own both lead to it."""
    root = tmp_path / "outbox"
    run_id = job(root, 0, 100)
    assert 0 == command("replay", root)
    assert (the_outbox(root) / "delivered" / run_id).is_dir()
    job(root, 100, 200, run_id)
    assert 0 == command("replay", root)
    check(mlflow_server.url, experiment_name, 200, 100)
    remote_id = the_run(mlflow_server.url, experiment_name).info.run_id
    assert run_id == job(root, 200, 300, remote_id, status="KILLED")
    assert 0 == command("replay", root)
    check(mlflow_server.url, experiment_name, 300, 200, "KILLED")


def test_a_run_that_was_delivered_in_parts_is_whole_at_another_server(
    job: Job, sqlite_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """One part is filed, one waits: a replay elsewhere reads both."""
    root = tmp_path / "outbox"
    run_id = job(root, 0, 100)
    assert 0 == command("replay", root)
    job(root, 100, 200, run_id)
    assert 0 == command("replay", root, "--to", sqlite_uri)
    check(sqlite_uri, experiment_name, 200, 100)


def test_jobs_in_copies_of_an_outbox_make_one_run(
    job: Job, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """The outbox was copied from machine to machine; an older copy that is sent later does not undo the run's end."""
    run_id = job(tmp_path / "one", 0, 100, status="FAILED")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    job(tmp_path / "two", 100, 200, run_id, status="KILLED")
    shutil.copytree(tmp_path / "two", tmp_path / "three")
    job(tmp_path / "three", 200, 300, run_id)
    for name in ("one", "three", "two"):
        assert 0 == command("replay", tmp_path / name)
        assert 1 == len(runs(mlflow_server.url, experiment_name))
    run = the_run(mlflow_server.url, experiment_name)
    assert numbered(300) == points(mlflow_server.url, run.info.run_id, "loss")
    assert ("long", "FINISHED") == (run.info.run_name, run.info.status)


def test_jobs_in_outboxes_of_their_own_make_one_run(
    job: Job, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """The later jobs know nothing but the id; sent before the first job's outbox they wait and say for what."""
    run_id = job(tmp_path / "one", 0, 100)
    assert run_id == job(tmp_path / "two", 100, 200, run_id)
    assert 4 == command("replay", tmp_path / "two", "--timeout", "20")
    assert [] == runs(mlflow_server.url, experiment_name)
    assert 0 == command("replay", tmp_path / "one")
    assert 0 == command("replay", tmp_path / "two")
    check(mlflow_server.url, experiment_name, 200, 100)


def test_outboxes_of_several_jobs_are_replayed_together_as_one_run(
    job: Job, sqlite_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """In whatever order they are named: directories with segments of one run are read as one."""
    run_id = job(tmp_path / "one", 0, 100)
    job(tmp_path / "two", 100, 200, run_id)
    job(tmp_path / "three", 200, 300, run_id)
    names = [tmp_path / name for name in ("three", "one", "two")]
    assert 0 == command("replay", *names, "--to", sqlite_uri)
    check(sqlite_uri, experiment_name, 300, 200)
    assert 0 == command("replay", *names, "--to", sqlite_uri)
    check(sqlite_uri, experiment_name, 300, 200)


def test_a_run_that_was_filed_before_the_ledger_was_lost_goes_on_in_the_experiment_of_its_id(
    sqlite_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """What later segments call it is no name of MLflow's where the program could not ask, or not any more."""
    with client(sqlite_uri) as mlflow:
        number = mlflow.create_experiment(experiment_name)
    outbox = OutboxDirectory.create(tmp_path / "outbox", resolve(sqlite_uri), now_ms=1)
    for step, begun in enumerate((1_700_000_001_000, 1_700_000_002_000)):
        journal = make_journal(outbox)
        assert journal.append(RunStarted(begun, None if step else "r", "me", {}, bool(step), "" if step else number))
        assert journal.append(metric(step))
        assert journal.append(RunEnded("FINISHED", begun + 1))
        journal.close()
        with delivering(outbox, sqlite_uri, QUICK):
            eventually(lambda: not outbox.run(RUN).exists(), 60)
        shutil.rmtree(outbox.ledger)
    with client(sqlite_uri) as mlflow:
        assert mlflow.get_experiment_by_name("exp") is None
    run = the_run(sqlite_uri, experiment_name)
    assert ("r", "FINISHED") == (run.info.run_name, run.info.status)
    assert {(0, 0.0): 1, (1, 1.0): 1} == dict(points(sqlite_uri, run.info.run_id, "loss"))
