"""Offline runs reach MLflow from wherever they lie, once, whatever happens in between."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from contents import QUICK, artifact_text, numbered, points, runs, stamped_points, the_run
from mlflow_outbox import MLflowTracker
from mlflow_outbox.destination import resolve
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox_worker import replay
from mlflow_outbox_worker.jobs import Job, Prepared, Wish, prepare
from mlflow_outbox_worker.lease import Lease
from mlflow_outbox_worker.mlflow_sink import open_sink
from mlflow_outbox_worker.replay import JobResult, Replay
from mlflow_outbox_worker.sources import replay_directory
from replays import NOW_MS, command, contents_of, log_offline, run_with_kills, the_outbox
from servers import MlflowServer, eventually

NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def replayed(*paths: Path, **wish: object) -> list[JobResult]:
    """Replay and return how it went."""
    wanted = Wish(**wish)  # type: ignore[arg-type]  # some of its fields
    prepared = prepare(list(paths), wanted)
    assert [] == prepared.problems
    stopped = threading.Event()
    return [Replay(job, QUICK, wanted, stopped=stopped).run(lambda _: None, timeout=240) for job in prepared.jobs]


def states(results: list[JobResult]) -> list[str]:
    """Return the state of every run."""
    return sorted(run.state for result in results for run in result.runs)


@pytest.mark.parametrize("store", ["server", "sqlite", "file"])
def test_an_offline_run_arrives_as_it_was_on_the_writing_machine(
    store: str, mlflow_server: MlflowServer, sqlite_uri: str, file_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """Start, end and metric times, status, name, user, source and other tags, params, files."""
    uri = {"server": mlflow_server.url, "sqlite": sqlite_uri, "file": file_uri}[store]
    log_offline(experiment_name, uri, tmp_path / "outbox", status="FAILED")
    assert ["sent"] == states(replayed(tmp_path / "outbox"))
    run = the_run(uri, experiment_name)
    assert ("offline", "FAILED") == (run.info.run_name, run.info.status)
    assert (NOW_MS, NOW_MS + 100_000) == (run.info.start_time, run.info.end_time)
    assert {"depth": "3", "name": "offline"} == run.data.params
    assert "train" == run.data.tags["phase"]
    assert {"mlflow.user", "mlflow.source.name", "mlflow.source.type"} <= run.data.tags.keys()
    assert [(i, NOW_MS + i, i / 2) for i in range(100)] == stamped_points(uri, run.info.run_id, "loss")
    assert "report of offline" == artifact_text(uri, run.info.run_id, "reports/report.txt")


def test_all_that_is_made_in_the_state_directory_is_the_user_s_alone(
    sqlite_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """F90: with any umask, as on a cluster where one group has all users; also the directories on the way there."""
    log_offline(experiment_name, sqlite_uri, tmp_path / "outbox")
    (tmp_path / "outbox").rename(tmp_path / "copy")
    umask = os.umask(0)
    try:
        assert 0 == command("replay", tmp_path / "copy", "--experiment", "another", "--timeout", 60)
        assert 0 == command("export", "--all", "-d", tmp_path / "copy", "-o", tmp_path / "runs.tar")
        assert 0 == command("replay", tmp_path / "runs.tar", "--experiment", "a third", "--timeout", 60)
    finally:
        os.umask(umask)
    made = [tmp_path / "runs.tar", *(tmp_path / "state").rglob("*")]
    assert len(made) > 8
    assert {} == {path: mode for path in made if (mode := path.lstat().st_mode & 0o077)}


def test_a_run_that_was_never_ended_stays_running(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """That a replay came to its end says nothing about the run."""
    log_offline(experiment_name, mlflow_server.url, tmp_path / "outbox", status=None)
    replayed(tmp_path / "outbox")
    assert "RUNNING" == the_run(mlflow_server.url, experiment_name).info.status


def test_a_replay_to_another_server_only_reads(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Not a byte, name or time changes in the source; the second time there is nothing to send."""
    for name in ("one", "two", "three"):
        log_offline(experiment_name, NOWHERE, tmp_path / "outbox", name=name)
    before = contents_of(tmp_path / "outbox")
    assert ["sent"] * 3 == states(replayed(tmp_path / "outbox", to=mlflow_server.url))
    assert "before" == replayed(tmp_path / "outbox", to=mlflow_server.url)[0].cut_short
    assert before == contents_of(tmp_path / "outbox")
    assert {"one", "two", "three"} == {run.info.run_name for run in runs(mlflow_server.url, experiment_name)}


def test_a_second_machine_with_a_copy_of_the_files_creates_nothing_twice(
    mlflow_server: MlflowServer, file_uri: str, experiment_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no ledger of the first; the run is found by its tag, and every point is there once."""
    log_offline(experiment_name, NOWHERE, tmp_path / "outbox", points=2500)
    shutil.copytree(tmp_path / "outbox", tmp_path / "copy")
    for uri in (mlflow_server.url, file_uri):
        for machine, files in (("first", "outbox"), ("second", "copy")):
            monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / machine))
            assert ["sent"] == states(replayed(tmp_path / files, to=uri))
        run = the_run(uri, experiment_name)
        assert numbered(2500) == points(uri, run.info.run_id, "loss")


@pytest.mark.parametrize("beside", [True, False])
def test_a_single_run_is_replayed_from_a_directory_that_was_moved_and_renamed(
    beside: bool, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """With outbox.json beside it, it knows where to go; alone it needs to be told."""
    run_id = log_offline(experiment_name, mlflow_server.url, tmp_path / "outbox")
    place = tmp_path / "usb"
    place.mkdir()
    shutil.move(the_outbox(tmp_path / "outbox") / "runs" / run_id, place / "my best run")
    if beside:
        shutil.copy(the_outbox(tmp_path / "outbox") / "outbox.json", place)
        assert ["sent"] == states(replayed(place / "my best run"))
    else:
        assert "give --to" in prepare([place / "my best run"], Wish()).problems[0]
        assert ["sent"] == states(replayed(place / "my best run", to=mlflow_server.url))
    assert numbered(100) == points(mlflow_server.url, the_run(mlflow_server.url, experiment_name).info.run_id, "loss")


def test_a_delivered_run_is_replayed_to_another_server_from_where_it_was_filed(
    mlflow_server: MlflowServer, sqlite_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """Filed runs stay on disk for this; at their own destination they are left alone."""
    run_id = log_offline(experiment_name, mlflow_server.url, tmp_path / "outbox")
    replayed(tmp_path / "outbox")
    filed = the_outbox(tmp_path / "outbox") / "delivered" / run_id
    assert filed.is_dir()
    assert ([], 1) == (prepare([tmp_path / "outbox"], Wish()).jobs, prepare([filed], Wish()).before)
    assert ["sent"] == states(replayed(filed, to=sqlite_uri))
    assert numbered(100) == points(sqlite_uri, the_run(sqlite_uri, experiment_name).info.run_id, "loss")


def test_runs_go_into_another_experiment_beside_their_own(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """It is another run there, and again only one however often it is sent."""
    log_offline(experiment_name, mlflow_server.url, tmp_path / "outbox")
    replayed(tmp_path / "outbox")
    for _ in range(2):
        replayed(tmp_path / "outbox", experiment=f"{experiment_name}-copy")
    own, copy = (the_run(mlflow_server.url, name).info.run_id for name in (experiment_name, f"{experiment_name}-copy"))
    assert own != copy
    assert numbered(100) == points(mlflow_server.url, copy, "loss")


def test_only_finished_runs_go_when_only_they_are_wanted(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Failed, killed and unended ones stay."""
    for status in ("FINISHED", "FAILED", "KILLED", None):
        log_offline(experiment_name, mlflow_server.url, tmp_path / "outbox", name=str(status), status=status)
    assert ["sent"] == states(replayed(tmp_path / "outbox", only_finished=True))
    assert "FINISHED" == the_run(mlflow_server.url, experiment_name).info.run_name
    assert ["sent"] * 3 == states(replayed(tmp_path / "outbox"))


def test_a_wiped_server_gets_everything_again(
    own_mlflow_server: Callable[..., MlflowServer], experiment_name: str, tmp_path: Path
) -> None:
    """Delivered runs are sent once more, each once; --again twice changes nothing."""
    server = own_mlflow_server()
    for name in ("one", "two"):
        log_offline(experiment_name, server.url, tmp_path / "outbox", name=name)
    replayed(tmp_path / "outbox")
    server.wipe()
    server.start()
    for _ in range(2):
        assert ["sent"] * 2 == states(replayed(tmp_path / "outbox", again=True))
        found = runs(server.url, experiment_name)
        assert {"one", "two"} == {run.info.run_name for run in found}
        assert 2 == len(found)
        for run in found:
            assert numbered(100) == points(server.url, run.info.run_id, "loss")
            assert "FINISHED" == run.info.status


def test_again_to_another_server_starts_anew_there_only(
    own_mlflow_server: Callable[..., MlflowServer], sqlite_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """What is known of other destinations stays known."""
    server = own_mlflow_server()
    log_offline(experiment_name, NOWHERE, tmp_path / "outbox")
    for uri in (server.url, sqlite_uri):
        replayed(tmp_path / "outbox", to=uri)
    server.wipe()
    server.start()
    assert ["sent"] == states(replayed(tmp_path / "outbox", to=server.url, again=True))
    assert numbered(100) == points(server.url, the_run(server.url, experiment_name).info.run_id, "loss")
    assert "before" == replayed(tmp_path / "outbox", to=sqlite_uri)[0].cut_short


def test_delivered_runs_that_cannot_be_sent_once_more_are_left(
    own_mlflow_server: Callable[..., MlflowServer],
    experiment_name: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The server is down: none is sent, all are left, and the code says so, whether time is up or it is told to end."""
    server = own_mlflow_server()
    for name in ("one", "two"):
        run_id = log_offline(experiment_name, server.url, tmp_path / "outbox", name=name)
    assert ["sent"] * 2 == states(replayed(tmp_path / "outbox"))
    server.stop()
    outbox = the_outbox(tmp_path / "outbox")
    wish, told = Wish(again=True), threading.Event()
    [job] = prepare([outbox / "delivered" / run_id], wish).jobs
    result = Replay(job, QUICK, wish, stopped=told).run(lambda shown: told.set() if shown.note else None, timeout=240)
    assert ("interrupted", ["left"]) == (result.cut_short, states([result]))
    assert 3 == command("replay", outbox, "--again", "--timeout", "0.5")
    said = capsys.readouterr().out
    assert "0 runs sent" in said
    assert "2 runs left" in said


def test_a_bad_run_is_skipped_and_named_and_the_rest_goes_on(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One whose segment cannot be read at all, and three good ones."""
    good = [log_offline(experiment_name, NOWHERE, tmp_path / "outbox", name=f"run {n}") for n in range(3)]
    unreadable = log_offline(experiment_name, NOWHERE, tmp_path / "outbox", name="unreadable")
    [segment] = (the_outbox(tmp_path / "outbox") / "runs" / unreadable).glob("*.log")
    segment.write_bytes(b"\0" * 5000)
    assert 1 == command("replay", tmp_path / "outbox", "--to", mlflow_server.url)
    said = capsys.readouterr()
    assert segment.name in said.err
    assert "3 runs sent" in said.out
    assert len(good) == len(runs(mlflow_server.url, experiment_name))


def test_a_run_that_mlflow_refuses_is_skipped_and_named(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its experiment was deleted; the other experiment's run arrives, the code says that a person is needed."""
    from contents import client

    with client(mlflow_server.url) as mlflow:
        mlflow.delete_experiment(mlflow.create_experiment(f"{experiment_name}-gone"))
    bad = log_offline(f"{experiment_name}-gone", NOWHERE, tmp_path / "outbox")
    log_offline(experiment_name, NOWHERE, tmp_path / "outbox")
    assert 4 == command("replay", tmp_path / "outbox", "--to", mlflow_server.url)
    said = capsys.readouterr()
    assert f"run {bad} was skipped" in said.err
    assert "1 run sent" in said.out
    assert "1 run skipped" in said.out
    assert 1 == len(runs(mlflow_server.url, experiment_name))


@pytest.mark.parametrize("own", [True, False])
def test_a_replay_that_is_killed_again_and_again_creates_nothing_twice(
    own: bool, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """SIGKILL at random moments, of an own outbox and of a copy: every run and point is there once at the end."""
    uri = mlflow_server.url
    for number in range(6):
        log_offline(experiment_name, uri, tmp_path / "outbox", name=f"run {number}", points=400)
    arguments = [tmp_path / "outbox"] if own else [tmp_path / "outbox", "--to", f"{uri}/"]
    if not own:
        path = the_outbox(tmp_path / "outbox") / "outbox.json"
        path.write_text(path.read_text().replace(uri, NOWHERE))
    killed, code = run_with_kills(
        "replay", *arguments, least=0.2, most=1.0, kills=4, env={"MLFLOW_OUTBOX_BATCH_POINTS": "100"}
    )
    assert (True, 0) == (killed > 0, code)
    found = runs(uri, experiment_name)
    assert {f"run {number}" for number in range(6)} == {run.info.run_name for run in found}
    assert 6 == len(found)
    for run in found:
        assert numbered(400) == points(uri, run.info.run_id, "loss")
        assert "FINISHED" == run.info.status


def test_a_bundle_is_replayed_without_unpacking_it_by_hand(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing of it stays on the machine, and the second time nothing is sent."""
    log_offline(experiment_name, mlflow_server.url, tmp_path / "outbox")
    assert 0 == command("export", "--all", "-o", "runs.tar.gz", "-d", tmp_path / "outbox")
    capsys.readouterr()
    assert 0 == command("replay", "runs.tar.gz", "--json")
    (told,) = json.loads(capsys.readouterr().out)
    assert (mlflow_server.url, None) == (told["destination"], told["cut_short"])
    assert ["sent"] == [run["state"] for run in told["runs"]]
    assert 0 == command("replay", "runs.tar.gz")
    assert numbered(100) == points(mlflow_server.url, the_run(mlflow_server.url, experiment_name).info.run_id, "loss")
    assert [] == list((tmp_path / "state" / "mlflow-outbox" / "bundles").iterdir())


def test_a_dry_run_says_what_would_be_sent_and_sends_nothing(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run, name, status and number of events; no ledger is made either."""
    run_id = log_offline(experiment_name, mlflow_server.url, tmp_path / "outbox")
    before = contents_of(tmp_path)
    assert 0 == command("replay", tmp_path / "outbox", "--dry-run")
    said = capsys.readouterr().out
    assert all(part in said for part in (run_id, "offline", "FINISHED", "104", mlflow_server.url))
    assert before == contents_of(tmp_path)
    assert [] == runs(mlflow_server.url, experiment_name)


def test_an_outbox_that_another_worker_delivers_is_left_to_it(experiment_name: str, tmp_path: Path) -> None:
    """The message names it, and the exit code is its own."""
    log_offline(experiment_name, NOWHERE, tmp_path / "outbox")
    lease = Lease(OutboxDirectory.open(the_outbox(tmp_path / "outbox")).lock, "thread")
    assert lease.acquire()
    assert 6 == command("replay", tmp_path / "outbox")
    lease.release()


def test_a_replay_of_other_runs_to_the_same_place_is_told_to_come_later(
    sqlite_uri: str, experiment_name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The one that is under way does not send these: afterwards the same command does."""
    log_offline(experiment_name, NOWHERE, tmp_path / "outbox")
    place = replay_directory(resolve(sqlite_uri))
    place.mkdir(parents=True)
    lease = Lease(place / "worker.lock", "command")
    assert lease.acquire()
    words = ["replay", tmp_path / "outbox", "--to", sqlite_uri]
    assert 6 == command(*words)
    said = capsys.readouterr().err
    assert f"another replay to {sqlite_uri} is under way" in said
    assert "repeat this one afterwards" in said
    assert 6 == command(*words, "--again")
    said = capsys.readouterr().err
    assert "another replay to the same place is under way" in said
    assert "repeat this one afterwards" in said
    lease.release()
    assert 0 == command(*words)
    assert 1 == len(runs(sqlite_uri, experiment_name))


def test_a_server_that_is_away_leaves_the_runs_where_they_are(experiment_name: str, tmp_path: Path) -> None:
    """Within the time that was given; the exit code says that something is left."""
    log_offline(experiment_name, NOWHERE, tmp_path / "outbox")
    assert 3 == command("replay", tmp_path / "outbox", "--timeout", "0.5")


def test_bad_usage_is_told_from_failure(tmp_path: Path) -> None:
    """A path that is not there, options that exclude each other."""
    assert 2 == command("replay", tmp_path / "nowhere")
    assert 2 == command("replay", tmp_path, "--follow", "--again")
    assert 2 == command("replay")


# -- following


class Follower:
    """A replay that follows, in a thread."""

    def __init__(self, path: Path, uri: str | None = None) -> None:
        open_sink(NOWHERE).close()  # imports mlflow, which two threads at once may find half imported
        wish = Wish(to=uri, follow=True)
        [job] = prepare([path], wish).jobs
        self.notes: list[str] = []
        self.result: JobResult | None = None
        self.job: Job = job
        self._replay = Replay(job, dataclasses.replace(QUICK, poll_interval=0.02), wish, stopped=threading.Event())
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self.result = self._replay.run(lambda progress: self.notes.append(progress.note), timeout=240)

    def is_over(self) -> bool:
        """Tell whether it came to its end."""
        return not self._thread.is_alive()

    def join(self) -> JobResult:
        """Wait for its end."""
        self._thread.join(240)
        assert self.result is not None
        return self.result


@pytest.mark.parametrize("own", [True, False])
def test_a_run_is_followed_while_it_is_written_and_until_it_has_ended(
    own: bool, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Points arrive while the writer is idle in between; its files are never touched; the end ends the following."""
    uri = mlflow_server.url
    tracker = MLflowTracker(experiment_name, uri if own else NOWHERE, outbox_dir=tmp_path / "outbox", worker="none")
    run = tracker.start_run("followed")
    run.log_metric("loss", 0.0, step=0)
    follower = Follower(tmp_path / "outbox", None if own else uri)
    written = the_outbox(tmp_path / "outbox") / "runs"
    for step in range(1, 4):
        run.log_metric("loss", step / 2, step=step)
        before = contents_of(written)
        run_id = eventually(lambda: runs(uri, experiment_name))[0].info.run_id
        eventually(lambda s=step, r=run_id: numbered(s + 1) == points(uri, r, "loss"))  # type: ignore[misc]  # mypy infers no default
        assert before == contents_of(written)
    assert not follower.is_over()
    assert any("writing" in note for note in follower.notes)
    assert "RUNNING" == runs(uri, experiment_name)[0].info.status
    run.end()
    before = contents_of(written)
    assert "" == follower.join().cut_short
    assert "FINISHED" == the_run(uri, experiment_name).info.status
    assert before == contents_of(written)


def test_a_run_that_ends_between_the_last_turn_and_the_look_at_its_writer_is_sent_to_its_end(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All was sent, then a point and the end are logged, and only then is seen that nobody writes any more."""
    uri = mlflow_server.url
    tracker = MLflowTracker(experiment_name, NOWHERE, outbox_dir=tmp_path / "outbox", worker="none")
    run = tracker.start_run("followed")
    run.log_metric("loss", 0.0, step=0)
    look, ending = replay.life_of, threading.Event()

    def life_of(folders: tuple[Path, ...], give_up: float) -> str:
        if ending.is_set():
            ending.clear()
            run.log_metric("loss", 0.5, step=1)
            run.end()
        return look(folders, give_up)

    monkeypatch.setattr(replay, "life_of", life_of)
    follower = Follower(tmp_path / "outbox", uri)
    run_id = eventually(lambda: runs(uri, experiment_name))[0].info.run_id
    eventually(lambda: numbered(1) == points(uri, run_id, "loss"))
    ending.set()
    assert "" == follower.join().cut_short
    assert ("FINISHED", numbered(2)) == (the_run(uri, experiment_name).info.status, points(uri, run_id, "loss"))


def test_a_writer_that_died_ends_the_following_and_not_the_run(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Told from one that is idle: nobody holds its segment any more. The run stays as it was left."""
    uri = mlflow_server.url
    child = os.fork()
    if child == 0:
        tracker = MLflowTracker(experiment_name, NOWHERE, outbox_dir=tmp_path / "outbox", worker="none")
        run = tracker.start_run("dies")
        run.log_metric("loss", 0.0, step=0)
        signal.pause()
        os._exit(0)
    try:
        eventually(lambda: list(tmp_path.glob("outbox/*/runs/*/*.log")))
        follower = Follower(tmp_path / "outbox", uri)
        eventually(lambda: any("writing" in note for note in follower.notes))
        assert not follower.is_over()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    follower.join()
    assert any("died" in note for note in follower.notes)
    assert "RUNNING" == the_run(uri, experiment_name).info.status


def test_a_writer_on_another_machine_may_be_silent_for_long(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Its lock cannot be seen and its boot is another: silence alone does not end the following, its end does."""
    from mlflow_outbox.spool import sequence

    uri = mlflow_server.url
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sequence, "boot_id", lambda: "another machine's")
        tracker = MLflowTracker(experiment_name, NOWHERE, outbox_dir=tmp_path / "outbox", worker="none")
        run = tracker.start_run("far away")
        run.log_metric("loss", 0.0, step=0)
        [segment] = the_outbox(tmp_path / "outbox").glob("runs/*/*.log")
        shutil.copytree(tmp_path / "outbox", tmp_path / "share")
        [seen] = the_outbox(tmp_path / "share").glob("runs/*/*.log")
        ten_minutes_ago = seen.stat().st_mtime - 600
        os.utime(seen, (ten_minutes_ago, ten_minutes_ago))
        follower = Follower(tmp_path / "share", uri)
        eventually(lambda: any("silent" in note for note in follower.notes))
        assert not follower.is_over()
        run.log_metric("loss", 0.5, step=1)
        run.end()
        shutil.copyfile(segment, seen)
        follower.join()
    remote = the_run(uri, experiment_name)
    assert ("FINISHED", numbered(2)) == (remote.info.status, points(uri, remote.info.run_id, "loss"))


def test_files_of_a_run_that_goes_on_go_to_another_store_although_they_are_filed_already(
    sqlite_uri: str, file_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """Its copies lie with what is delivered, and no segment of it does."""
    run_id = log_offline(experiment_name, sqlite_uri, tmp_path / "outbox", status=None)
    outbox = the_outbox(tmp_path / "outbox")
    (outbox / "delivered" / run_id).mkdir(mode=0o700)
    (outbox / "runs" / run_id / "files").rename(outbox / "delivered" / run_id / "files")
    (result,) = replayed(tmp_path / "outbox", to=file_uri)
    assert [0] == [run.dead for run in result.runs]
    run = the_run(file_uri, experiment_name)
    assert "report of offline" == artifact_text(file_uri, run.info.run_id, "reports/report.txt")


# -- beside a worker


def test_a_run_that_is_filed_meanwhile_arrives_whole(
    sqlite_uri: str, file_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """Its own worker delivers and moves it between the look at what there is and the first read."""
    log_offline(experiment_name, sqlite_uri, tmp_path / "outbox")
    wish = Wish(to=file_uri)
    [job] = prepare([tmp_path / "outbox"], wish).jobs
    assert ["sent"] == states(replayed(tmp_path / "outbox"))
    result = Replay(job, QUICK, wish, stopped=threading.Event()).run(lambda _: None, timeout=240)
    assert ["sent"] == states([result])
    assert numbered(100) == points(file_uri, the_run(file_uri, experiment_name).info.run_id, "loss")


def test_a_run_that_is_named_by_its_directory_and_filed_meanwhile_arrives_whole(
    sqlite_uri: str, file_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """Wherever it lies by then."""
    run_id = log_offline(experiment_name, sqlite_uri, tmp_path / "outbox")
    wish = Wish(to=file_uri)
    [job] = prepare([the_outbox(tmp_path / "outbox") / "runs" / run_id], wish).jobs
    assert ["sent"] == states(replayed(tmp_path / "outbox"))
    result = Replay(job, QUICK, wish, stopped=threading.Event()).run(lambda _: None, timeout=240)
    assert ["sent"] == states([result])
    assert numbered(100) == points(file_uri, the_run(file_uri, experiment_name).info.run_id, "loss")


@pytest.mark.parametrize("seconds", ["60", "0"])
def test_a_run_that_is_reclaimed_meanwhile_is_skipped_and_named(
    seconds: str,
    sqlite_uri: str,
    file_uri: str,
    experiment_name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nothing of it is at the other place, and nobody is told that it is, however little time there was."""
    run_id = log_offline(experiment_name, sqlite_uri, tmp_path / "outbox")

    def prepare_late(*arguments: Any, **more: Any) -> Prepared:
        found = prepare(*arguments, **more)
        assert ["sent"] == states(replayed(tmp_path / "outbox"))
        assert 0 == command("gc", "--older-than", "0", "-d", tmp_path / "outbox")
        return found

    monkeypatch.setattr("mlflow_outbox_worker.jobs.prepare", prepare_late)
    assert 1 == command("replay", tmp_path / "outbox", "--to", file_uri, "--timeout", seconds)
    said = capsys.readouterr()
    assert f"run {run_id} was skipped: it is not on disk any more" in said.err
    assert "0 runs sent" in said.out


def test_a_run_that_is_reclaimed_before_it_is_sent_again_is_skipped_and_named(
    sqlite_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """What its own ledger knows of it is forgotten, so it would look like one that has nothing to send."""
    log_offline(experiment_name, sqlite_uri, tmp_path / "outbox")
    assert ["sent"] == states(replayed(tmp_path / "outbox"))
    wish = Wish(again=True)
    [job] = prepare([tmp_path / "outbox"], wish).jobs
    assert 0 == command("gc", "--older-than", "0", "-d", tmp_path / "outbox")
    result = Replay(job, QUICK, wish, stopped=threading.Event()).run(lambda _: None, timeout=240)
    assert [("skipped", True)] == [(run.state, run.gone) for run in result.runs]
