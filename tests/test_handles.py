"""Copies and pickles of trackers and runs: what a program gives to its other processes, or keeps in a checkpoint."""

from __future__ import annotations

import copy
import itertools
import multiprocessing
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from contents import QUICK, artifact_text, points, runs, the_run
from mlflow_outbox import MLflowTracker, Run, Settings
from mlflow_outbox.errors import OutboxError, OutboxUnusable
from mlflow_outbox.spool.events import Artifact
from mlflow_outbox.spool.identity import new_writer
from servers import eventually
from spools import Everything

NOWHERE = "http://127.0.0.1:9"


class Holder:
    """Whatever holds a run or a tracker, such as a callback."""

    def __init__(self, held: Any) -> None:
        self.held = held


def offline(folder: Path, uri: str = NOWHERE, settings: Settings = QUICK) -> MLflowTracker:
    """Return a tracker that only writes."""
    return MLflowTracker("handles", uri, outbox_dir=folder, worker="none", settings=settings)


def test_a_copy_is_the_same_handle_also_within_what_is_copied(tmp_path: Path) -> None:
    """A model's deep copy, for instance of its averaged weights, logs to the run that the model logs to."""
    with offline(tmp_path) as tracker, tracker.start_run("copied") as run:
        for handle in (tracker, run):
            assert handle is copy.copy(handle)
            assert handle is copy.deepcopy(Holder([handle])).held[0]


def _log(run: Run, tracker: MLflowTracker, number: int) -> None:
    for step in range(50):
        assert run.log_metric(f"child-{number}", step / 2, step=step)
    assert run.log_text(f"of {number}", f"{number}.txt")
    with tracker.start_run(f"own-{number}") as own:
        own.log_metric("m", float(number))


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_processes_that_are_given_a_run_and_a_tracker_log_to_them(
    method: str, sqlite_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """Its worker delivers what they write, once."""
    with MLflowTracker(experiment_name, sqlite_uri, outbox_dir=tmp_path, settings=QUICK) as tracker:
        with tracker.start_run("shared") as run:
            start: Any = multiprocessing.get_context(method)
            children = [start.Process(target=_log, args=(run, tracker, number)) for number in range(2)]
            for child in children:
                child.start()
            for child in children:
                child.join(120)
            assert [0, 0] == [child.exitcode for child in children]
        left = tracker.flush(120)
    assert (0, 0, 0) == (left.pending, left.parked, left.dead)
    held = {run.info.run_name: run for run in runs(sqlite_uri, experiment_name)}
    assert {"shared", "own-0", "own-1"} == held.keys()
    for number in range(2):
        info = held["shared"].info
        assert [(step, step / 2) for step in range(50)] == sorted(
            points(sqlite_uri, info.run_id, f"child-{number}").elements()
        )
        assert f"of {number}" == artifact_text(sqlite_uri, info.run_id, f"{number}.txt")
        assert {"m": float(number)} == held[f"own-{number}"].data.metrics


def test_a_program_that_gives_its_tracker_away_and_logs_nothing_delivers_what_others_log(
    sqlite_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """They only write: while it runs nothing would arrive, and nothing be said at its end."""
    tracker = MLflowTracker(experiment_name, sqlite_uri, outbox_dir=tmp_path, settings=QUICK)
    try:
        done = read_elsewhere(pickle.dumps([tracker]))
        assert (0, "True\n") == (done.returncode, done.stdout), done.stderr
        eventually(lambda: [run.data.metrics for run in runs(sqlite_uri, experiment_name)] == [{"m": 1.0}], 60)
    finally:
        tracker.close(60)


def test_in_the_process_that_it_comes_from_a_pickled_run_is_delivered_by_the_same_worker(
    sqlite_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """It counts where the first one does, and an end that was logged stays one."""
    with MLflowTracker(experiment_name, sqlite_uri, outbox_dir=tmp_path, settings=QUICK) as tracker:
        run = tracker.start_run("pickled")
        again = pickle.loads(pickle.dumps(run))
        assert again.run_id == run.run_id
        assert again.log_metric("m", 1.0)
        assert not again.log_metric("m", "no number")
        assert 1 == sum(number for name, number in tracker.counters.items() if name.startswith("refused_"))
        assert run.end()
        assert "ended" in repr(pickle.loads(pickle.dumps(run)))
        assert tracker.flush(60)
    assert {"m": 1.0} == the_run(sqlite_uri, experiment_name).data.metrics


def test_of_two_handles_in_one_millisecond_the_later_one_has_the_last_word(tmp_path: Path) -> None:
    """As of the tasks of a pool's process, each of which gets the run anew."""
    with offline(tmp_path) as tracker:
        for number in range(60):
            run = tracker.start_run(f"r{number}")
            run.set_tag("task", "first")
            pickle.loads(pickle.dumps(run)).set_tag("task", "second")
        assert ["second"] * 60 == [run["tags"]["task"] for run in tracker.get_all_runs()]


def test_the_tasks_of_a_pool_s_process_are_one_writer_of_their_run(tmp_path: Path) -> None:
    """Each gets the run anew, and lets go of it: a thousand were as many to look at, at each look, while it went on."""
    with offline(tmp_path) as tracker, tracker.start_run("shared") as run:
        data = pickle.dumps(run)
        for number in range(20):
            assert pickle.loads(data).log_metric(f"m{number}", float(number))
        assert tracker.outbox_path is not None
        segments = (tracker.outbox_path / "runs" / run.run_id).glob("*.log")
        assert 2 == len({path.name.partition("-")[0] for path in segments})
        [shown] = tracker.get_all_runs()
        assert {f"m{number}": float(number) for number in range(20)} == shown["metrics"]


def test_the_plots_of_a_pool_s_tasks_go_to_the_summary_that_the_program_has_logged(tmp_path: Path) -> None:
    """Each task gets the tracker anew, and made a run of its own."""
    with offline(tmp_path) as tracker:
        tracker.log_final_summary({"current_iteration": 3})
        data = pickle.dumps(tracker)
        for name in ("a.png", "b.png"):
            (tmp_path / name).write_bytes(name.encode())
            pickle.loads(data).log_visualizations([tmp_path / name])
        [shown] = tracker.get_all_runs()
        assert tracker.outbox_path is not None
        logged = Everything(tracker.outbox_path / "runs" / shown["run_id"]).events
        assert {"a.png", "b.png", "final_state.json"} == {one.path for one in logged if isinstance(one, Artifact)}


def test_pickles_of_more_runs_than_are_remembered_are_written_to(tmp_path: Path) -> None:
    """By other writers then."""
    with offline(tmp_path) as tracker:
        data = [pickle.dumps(tracker.start_run(f"r{number}")) for number in range(130)]
        assert all(pickle.loads(one).log_metric("m", turn) for turn in (1.0, 2.0) for one in data)
        assert [2.0] * 130 == [run["metrics"]["m"] for run in tracker.get_all_runs()]


def test_no_two_writers_have_one_id_however_many_there_are() -> None:
    """And each comes after the one before, but for one in 65,536."""
    ids = [new_writer() for _ in range(150_000)]
    assert len(ids) == len(set(ids))
    assert {16} == {len(one) for one in ids}
    assert 3 >= sum(later < earlier for earlier, later in itertools.pairwise(ids))


def test_a_pickle_holds_no_credentials(tmp_path: Path) -> None:
    """Neither of a tracker nor of a run."""
    with offline(tmp_path, "http://someone:canary-password@127.0.0.1:9") as tracker, tracker.start_run("secret") as run:
        for handle in (tracker, run):
            assert b"canary" not in pickle.dumps(handle)
        assert tracker.outbox_path == pickle.loads(pickle.dumps(tracker)).outbox_path


_READS = """
import pickle, sys
sys.path[:0] = {paths!r}
for handle in pickle.loads({data!r}):
    run = handle.start_run("other") if hasattr(handle, "start_run") else handle
    print(run.log_metric("m", 1.0))
"""


def read_elsewhere(data: bytes) -> subprocess.CompletedProcess[str]:
    """Read a pickle of trackers and runs in another process, which logs to each."""
    code = _READS.format(paths=sys.path, data=data)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


def test_a_checkpoint_can_be_read_where_its_outbox_is_not(tmp_path: Path) -> None:
    """What is logged there is not kept, and said so; with ``strict`` it is an error."""
    with offline(tmp_path / "outbox") as tracker, tracker.start_run("kept") as run:
        data = pickle.dumps([tracker, run])
    here = read_elsewhere(data)
    assert (0, "True\nTrue\n") == (here.returncode, here.stdout), here.stderr
    with offline(tmp_path / "strict", settings=Settings(strict=True)) as tracker, tracker.start_run("strict") as run:
        strict = [pickle.dumps([handle]) for handle in (tracker, run)]
    shutil.rmtree(tmp_path / "outbox")
    shutil.rmtree(tmp_path / "strict")
    gone = read_elsewhere(data)
    assert (0, "False\nFalse\n") == (gone.returncode, gone.stdout), gone.stderr
    assert "nothing can be kept of what is logged here" in gone.stderr
    assert not (tmp_path / "outbox").exists()
    for each in strict:
        with pytest.raises(OutboxUnusable):
            pickle.loads(each)


def test_handles_that_keep_nothing_are_pickled_as_such(tmp_path: Path) -> None:
    """A disabled tracker's, too."""
    tracker = offline(tmp_path, settings=Settings(disabled=True))
    again = pickle.loads(pickle.dumps([tracker, tracker.start_run("none")]))
    assert again[0].disabled
    assert not again[1].log_metric("m", 1.0)
    assert [] == list(tmp_path.iterdir())


def test_a_pickle_of_another_version_is_read(tmp_path: Path) -> None:
    """Options that it has and this one has not do not matter; a run id that leads elsewhere does."""
    with offline(tmp_path) as tracker, tracker.start_run("earlier") as run:
        make, (path, identity, note, ended) = run.__reduce__()
        again = make(path, identity, {**note, "of_another_version": 1}, ended)
        assert again.log_metric("m", 1.0)
        with pytest.raises(OutboxError, match="the run id"):
            make(path, ("../../elsewhere", *identity[1:]), note, ended)
