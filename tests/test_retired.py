"""The ledger gives back what it holds of runs that are gone, and their ids lead to MLflow all the same."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from commands import offline, outbox_of
from contents import QUICK, client, numbered, points, the_run
from ledgers import edit, letter, record, run, view
from mlflow_outbox import MLflowTracker
from mlflow_outbox.outbox import FlushResult
from mlflow_outbox.run import Run
from mlflow_outbox.spool import provisional
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox_worker import flush, upkeep
from mlflow_outbox_worker.backlog import counted, total
from mlflow_outbox_worker.cli.flush import Flush
from mlflow_outbox_worker.flush import Watch
from mlflow_outbox_worker.ledger import Ledger
from mlflow_outbox_worker.records import RunRecord
from mlflow_outbox_worker.requeue import MOVED
from mlflow_outbox_worker.retention import retire
from mlflow_outbox_worker.retired import Totals
from mlflow_outbox_worker.survey import survey
from plugin_world import store, tracking
from replays import command
from servers import eventually
from spools import make_outbox
from workers import delivering

DAY = 86_400.0
#: Nothing is kept, and looked for many times a second.
NOTHING_KEPT = dataclasses.replace(QUICK, retention=0)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """A ledger."""
    with contextlib.closing(Ledger.open(tmp_path / "ledger")) as opened:
        yield opened


def done(run_id: str, **given: object) -> RunRecord:
    """The record of a run that was delivered and read back."""
    one = record(run_id, 7, f"remote of {run_id}")
    one.state, one.ended, one.verified_at_ms, one.delivered, one.dead = "done", True, 5, 7, 1
    for name, value in given.items():
        setattr(one, name, value)
    return one


def gone(run_id: str) -> bool:
    """Nothing is on disk of any run."""
    return bool(run_id)


class TestRows:
    def test_of_a_run_that_is_gone_only_its_ids_and_its_counts_are_kept(self, ledger: Ledger, tmp_path: Path) -> None:
        """Record and view give way to a row of a hundred bytes; both its ids lead on."""
        ledger.commit(done("a"), view=view(), dead=[letter("a")])
        assert ledger.settle_dead_letter(next(ledger.dead_letters("a")))
        assert 1 == ledger.retire(["a", "never seen"], gone)
        assert ([], None, []) == (list(ledger.records()), ledger.view("a"), list(ledger.settled_letters("a")))
        assert ("a", Totals(1, 7, 1)) == (ledger.local_id("remote of a"), ledger.totals())
        rest = ledger.record("a")
        assert rest is not None
        assert ("remote of a", "done", {}, 0) == (rest.remote_id, rest.state, rest.cursors, rest.delivered)
        ((size,),) = ledger._source.query("SELECT length(value) FROM Cache WHERE key = 'gone/a'")
        assert size < 100
        assert 0 == ledger.retire(["a"], gone)

    def test_a_run_that_is_not_done_or_not_gone_is_left_alone(self, ledger: Ledger) -> None:
        """Whatever was seen of it before the transaction."""
        ledger.commit(done("a", state="active"))
        ledger.commit(done("b", verified_at_ms=0))
        ledger.commit(done("c"))
        assert 0 == ledger.retire(["a", "b"], gone)
        assert 0 == ledger.retire(["c"], lambda _: False)
        assert ["a", "b", "c"] == [found.run_id for found in ledger.records()]

    def test_a_run_that_goes_on_has_a_record_again_and_is_counted_once(self, ledger: Ledger) -> None:
        """What was counted before stays in the sum; forgetting it takes every trace."""
        ledger.commit(done("a"))
        ledger.retire(["a"], gone)
        again = ledger.record("a")
        assert again is not None
        again.delivered, again.state = 2, "active"
        ledger.commit(again)
        assert [again] == list(ledger.records())
        assert FlushResult(9, 0, 0, 0) == total({}, *_both(ledger), {}, parked=False)
        again.state = "done"
        ledger.commit(again)
        ledger.retire(["a"], gone)
        assert Totals(2, 9, 1) == ledger.totals()
        ledger.forget("a")
        assert (None, None) == (ledger.record("a"), ledger.local_id("remote of a"))

    def test_each_run_is_counted_once_whenever_it_is_retired(
        self, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A worker may retire it while another process adds up."""
        ledger.commit(done("a"))
        ledger.commit(done("b"))
        original = Ledger.records

        def late(self: Ledger) -> Iterator[RunRecord]:
            found = list(original(self))
            self.retire(["a"], gone)
            return iter(found)

        monkeypatch.setattr(Ledger, "records", late)
        assert FlushResult(14, 0, 0, 3) == total({}, *_both(ledger), {"b": 3}, parked=False)

    def test_a_kill_in_the_middle_leaves_either_state(self, tmp_path: Path) -> None:
        """Never a count twice, never none."""
        text = """
ledger = Ledger.open(directory)
one = RunRecord("a", remote_id="r", state="done", verified_at_ms=1, delivered=3)
ledger.commit(one)
ledger.retire(["a"], lambda _: os.kill(os.getpid(), signal.SIGKILL))
"""
        with pytest.raises(AssertionError, match="-9"):
            run(text, tmp_path / "ledger")
        with contextlib.closing(Ledger.open(tmp_path / "ledger")) as found:
            assert (Totals(), ["a"]) == (found.totals(), [one.run_id for one in found.records()])


class TestExpiry:
    def test_after_a_month_only_ids_that_nobody_else_knows_are_left(self, ledger: Ledger, tmp_path: Path) -> None:
        """A provisional id is good for ever; a run of which something is on disk again keeps its row."""
        directory, given, back = make_outbox(tmp_path / "box"), provisional.new_run_id(), "b" * 32
        for run_id in (given, "a" * 32, back):
            ledger.commit(done(run_id))
        now = time.time()
        assert 3 == retire(directory, ledger, now=now)
        retire(directory, ledger, now=now + 29 * DAY)
        assert ledger.record("a" * 32) is not None
        directory.make_run(back)
        retire(directory, ledger, now=now + 31 * DAY)
        assert (None, None) == (ledger.record("a" * 32), ledger.local_id("remote of " + "a" * 32))
        for run_id in (given, back):
            assert f"remote of {run_id}" == getattr(ledger.record(run_id), "remote_id", "")
        assert 3 == ledger.totals().runs

    def test_where_ids_of_mlflow_have_become_others_all_are_left(self, ledger: Ledger, tmp_path: Path) -> None:
        """Nobody else knows what they have become."""
        ledger.commit(done("a" * 32))
        ledger.set_meta(MOVED, b"yes")
        directory = make_outbox(tmp_path / "box")
        retire(directory, ledger, now=time.time())
        retire(directory, ledger, now=time.time() + 31 * DAY)
        assert ledger.record("a" * 32) is not None

    def test_rooms_dead_letters_and_what_is_on_disk_stay(self, ledger: Ledger, tmp_path: Path) -> None:
        """And everything does where the outbox itself is not there."""
        directory, waiting, filed = make_outbox(tmp_path / "box"), "a" * 32, "b" * 32
        for run_id in (provisional.COMMON_ROOM, waiting, filed, "c" * 32):
            ledger.commit(done(run_id), dead=[letter("c" * 32)] if run_id == "c" * 32 else ())
        directory.make_run(waiting)
        (directory.delivered / filed).mkdir()
        assert 0 == retire(directory, ledger, now=time.time())
        ledger.commit(done("d" * 32))
        (directory.path / "runs").rename(directory.path / "elsewhere")
        assert 0 == retire(directory, ledger, now=time.time())
        assert 5 == len(list(ledger.records()))

    def test_a_damaged_sum_is_put_aside_and_begun_anew(self, ledger: Ledger, tmp_path: Path) -> None:
        """Counts are no reason not to deliver."""
        ledger.commit(done("a"))
        ledger.retire(["a"], gone)
        ledger.close()
        edit(tmp_path / "ledger", "UPDATE Cache SET value = x'00' WHERE key = 'meta/retired'")
        with contextlib.closing(Ledger.open(tmp_path / "ledger")) as found:
            assert Totals() == found.totals()
            found.commit(done("b"))
            found.retire(["b"], gone)
            assert Totals(1, 7, 1) == found.totals()


@pytest.fixture
def reclaiming(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of this process look many times a second what is past retention."""
    monkeypatch.setattr(upkeep, "_RECLAIM", 0.05)


def is_retired(directory: OutboxDirectory, run_id: str) -> bool:
    """Return whether nothing is left of a run but what its ids need."""
    if directory.run(run_id).exists():
        return False
    with contextlib.closing(Ledger.open(directory.ledger, read_only=True)) as ledger:
        held = ledger.record(run_id)
        return held is not None and run_id not in {one.run_id for one in ledger.records()}


@pytest.mark.usefixtures("reclaiming")
class TestDelivery:
    def test_what_was_delivered_does_not_go_down_and_a_run_may_go_on(
        self, experiment_name: str, sqlite_uri: str, tmp_path: Path
    ) -> None:
        """By the program that ended it, and by one that begins it again by either of its ids: one run in MLflow."""
        options: dict[str, Any] = {"outbox_dir": tmp_path / "box", "worker": "none", "settings": QUICK}
        tracker = MLflowTracker(experiment_name, sqlite_uri, **options)
        one = tracker.start_run("goes on")
        assert tracker.outbox_path is not None
        directory = OutboxDirectory.open(tracker.outbox_path)
        watch = Watch(directory, QUICK)

        def log(to: Run, first: int) -> None:
            for step in range(first, first + 10):
                assert to.log_metric("loss", step / 2, step=step)
            to.end()

        with delivering(directory, sqlite_uri, NOTHING_KEPT) as counters:
            log(one, 0)
            eventually(lambda: is_retired(directory, one.run_id), 60)
            assert FlushResult(12, 0, 0, 0) == watch.measure()[0]
            log(one, 10)
            eventually(lambda: counters["runs_verified"] == 2, 60)
            eventually(lambda: is_retired(directory, one.run_id), 60)
            remote_id = the_run(sqlite_uri, experiment_name).info.run_id
            log(tracker.start_run(run_id=remote_id), 20)
            eventually(lambda: counters["runs_verified"] == 3, 60)
            eventually(lambda: is_retired(directory, one.run_id), 60)
        tracker.close(0)
        assert (35, 0) == (survey(directory, QUICK).delivered, counters["missing"])
        assert 35 == watch.measure()[0].delivered
        assert numbered(30) == points(sqlite_uri, remote_id, "loss")
        assert "FINISHED" == the_run(sqlite_uri, experiment_name).info.status

    def test_a_flush_ends_when_its_run_was_retired_meanwhile(
        self, experiment_name: str, sqlite_uri: str, tmp_path: Path
    ) -> None:
        """Of the program as of the command; and nothing is waited for that was retired before the run went on."""
        tracker = MLflowTracker(
            experiment_name, sqlite_uri, outbox_dir=tmp_path / "box", worker="none", settings=NOTHING_KEPT
        )
        run_id = _log(tracker.start_run("retired"))
        assert tracker.outbox_path is not None
        directory = OutboxDirectory.open(tracker.outbox_path)
        watch, of_command = Watch(directory, NOTHING_KEPT), Flush(directory, NOTHING_KEPT)
        before, ends = watch.measure()
        of_command.look()
        assert (3, 3) == (before.pending, of_command.left)
        with delivering(directory, sqlite_uri, NOTHING_KEPT) as counters:
            eventually(lambda: is_retired(directory, run_id), 60)
            of_command.look()
            assert (FlushResult(3, 0, 0, 0), 0) == (watch.measure(ends)[0], of_command.left)
            _log(tracker.start_run(run_id=run_id))
            eventually(lambda: counters["runs_verified"] == 2, 60)
            eventually(lambda: of_command.look() or of_command.is_done(), 60, "what was verified is recorded")
            assert (0, 0) == (watch.measure(ends)[0].pending, of_command.left)
        tracker.close(0)

    def test_what_is_delivered_and_filed_while_a_flush_looks_is_counted(
        self, experiment_name: str, sqlite_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Between its look at the ledger, which has nothing of it yet, and the one at the disk, where it is no more."""
        tracker = MLflowTracker(experiment_name, sqlite_uri, outbox_dir=tmp_path / "box", worker="none", settings=QUICK)
        run_id = _log(tracker.start_run("filed"))
        assert tracker.outbox_path is not None
        directory = OutboxDirectory.open(tracker.outbox_path)
        Ledger.open(directory.ledger).close()
        looked = []

        def slowly(ledger: Ledger) -> tuple[dict[str, RunRecord], Totals]:
            found = counted(ledger)
            if not looked:
                looked.append(found)
                with delivering(directory, sqlite_uri, QUICK):
                    eventually(lambda: not directory.run(run_id).exists(), 60)
            return found

        monkeypatch.setattr(flush, "counted", slowly)
        assert FlushResult(3, 0, 0, 0) == Watch(directory, QUICK).until_delivered(60)
        assert ({}, Totals()) == looked[0]
        tracker.close(0)

    def test_a_run_of_which_nothing_was_delivered_is_waited_for(self, tmp_path: Path) -> None:
        """A record is missing too where nobody has begun to deliver."""
        tracker = MLflowTracker("e", "http://127.0.0.1:9", outbox_dir=tmp_path, worker="none", settings=QUICK)
        _log(tracker.start_run("waits"))
        assert tracker.outbox_path is not None
        watch = Watch(OutboxDirectory.open(tracker.outbox_path), QUICK)
        _, ends = watch.measure()
        assert 3 == watch.measure(ends)[0].pending
        tracker.close(0)

    def test_a_bundle_of_a_run_that_is_gone_changes_nothing(
        self, experiment_name: str, sqlite_uri: str, tmp_path: Path
    ) -> None:
        """Taken in again, even after its row has expired, it is found in MLflow."""
        (run_id,) = offline(tmp_path / "box", sqlite_uri, experiment=experiment_name)
        directory = OutboxDirectory.open(outbox_of(tmp_path / "box"))
        assert 0 == command("export", "--all", "--outbox-dir", tmp_path / "box", "-o", tmp_path / "runs.tar")
        for forgotten in (False, True):
            with delivering(directory, sqlite_uri, NOTHING_KEPT):
                eventually(lambda: is_retired(directory, run_id), 60)
            if forgotten:
                with contextlib.closing(Ledger.open(directory.ledger)) as ledger:
                    retire(directory, ledger, now=time.time() + 31 * DAY)
                    assert ledger.record(run_id) is None
            assert 0 == command("import", tmp_path / "runs.tar", "--outbox-dir", tmp_path / "box")
            assert [run_id] == directory.run_ids()
        with delivering(directory, sqlite_uri, NOTHING_KEPT):
            eventually(lambda: is_retired(directory, run_id), 60)
        assert numbered(10) == points(sqlite_uri, the_run(sqlite_uri, experiment_name).info.run_id, "loss")

    def test_gc_gives_the_rows_back_and_show_says_where_the_run_is(
        self, experiment_name: str, sqlite_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """At once, with the files."""
        (run_id,) = offline(tmp_path / "box", sqlite_uri, experiment=experiment_name)
        directory = OutboxDirectory.open(outbox_of(tmp_path / "box"))
        with delivering(directory, sqlite_uri, QUICK):
            eventually(lambda: directory.delivered_ids() == [run_id], 60)
        assert 0 == command("gc", "--older-than", "0", "-d", tmp_path / "box")
        assert is_retired(directory, run_id)
        capsys.readouterr()
        assert 2 == command("show", run_id, "-d", tmp_path / "box")
        remote_id = the_run(sqlite_uri, experiment_name).info.run_id
        assert f"was delivered as {remote_id}, and is not on disk any more" in capsys.readouterr().err

    def test_a_provisional_id_is_good_when_nothing_else_is_left(
        self, experiment_name: str, sqlite_uri: str, tmp_path: Path
    ) -> None:
        """To write to, to read, and as the parent of another run."""
        uri = f"outbox+{sqlite_uri}"
        with tracking(uri, tmp_path / "box", worker="none", create_timeout=0) as mlflow:
            api = mlflow.MlflowClient()
            experiment = api.create_experiment(experiment_name)
            parent = api.create_run(experiment).info.run_id
            assert provisional.is_provisional(parent)
            api.log_param(parent, "depth", "3")
            api.set_terminated(parent)
            directory = store(uri).outbox.directory
            with delivering(directory, sqlite_uri, NOTHING_KEPT):
                eventually(lambda: is_retired(directory, parent), 60)
                api.set_tag(parent, "later", "yes")
                child = api.create_run(experiment, tags={"mlflow.parentRunId": parent}).info.run_id
                api.set_terminated(child)
                store(uri).journals.close(parent)
                eventually(lambda: is_retired(directory, parent) and is_retired(directory, child), 60)
        with tracking(uri, tmp_path / "box") as mlflow:
            assert {"depth": "3"} == mlflow.MlflowClient().get_run(parent).data.params
        with client(sqlite_uri) as api:
            found = api.search_runs([api.get_experiment_by_name(experiment_name).experiment_id])
        (above,) = [one for one in found if "mlflow.parentRunId" not in one.data.tags]
        (below,) = [one for one in found if "mlflow.parentRunId" in one.data.tags]
        assert above.info.run_id == below.data.tags["mlflow.parentRunId"]
        assert ({"depth": "3"}, "yes") == (above.data.params, above.data.tags["later"])


def _log(run: Run) -> str:
    """Log three events with a run, the end among them; return its id."""
    assert run.log_metric("loss", 0.5, step=0)
    assert run.end()
    return run.run_id


def _both(ledger: Ledger) -> tuple[list[RunRecord], Totals]:
    records, totals = counted(ledger)
    return list(records.values()), totals
