"""Room on a full disk: a reserve for the ledger, and delivered runs that give way; undelivered ones never do."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import sqlite3
from pathlib import Path
from types import SimpleNamespace

import pytest

from commands import offline, outbox_of
from contents import QUICK, runs
from ledgers import record
from mlflow_outbox import MLflowTracker
from mlflow_outbox.counters import Counters
from mlflow_outbox.errors import LedgerUnavailable
from mlflow_outbox.settings import Settings, WorkerKind
from mlflow_outbox.spool import demand, reserve
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox.spool.guard import used_bytes
from mlflow_outbox.testing.faults import status
from mlflow_outbox.testing.proxy import FaultProxy
from mlflow_outbox_worker import database, room
from mlflow_outbox_worker.ledger import Ledger
from mlflow_outbox_worker.records import DeadLetter, RunRecord
from mlflow_outbox_worker.removal import leftovers
from mlflow_outbox_worker.room import Room
from mlflow_outbox_worker.sources import run_id_of
from servers import MlflowServer, eventually
from workers import delivering


def filled(experiment: str, uri: str, root: Path, settings: Settings) -> Settings:
    """Deliver a run with three megabytes, and return settings by which its outbox is over its cap."""
    with MLflowTracker(experiment, uri, outbox_dir=root, settings=settings) as before:
        with before.start_run("before") as run:
            assert run.log_text("x" * 3_000_000, "large.txt")
        assert before.flush(60)
    return dataclasses.replace(settings, outbox_bytes=2_500_000)


def held(folder: Path) -> int:
    """Return how many bytes of the disk the reserve of a directory takes."""
    return (folder / reserve.NAME).stat().st_blocks * 512


class TestReserve:
    def test_it_is_made_with_the_outbox_and_does_not_count_against_its_budget(self, tmp_path: Path) -> None:
        """It takes real blocks, and the size of the outbox is that of what it holds."""
        offline(tmp_path)
        outbox = OutboxDirectory.open(outbox_of(tmp_path))
        assert reserve.SIZE <= held(outbox.ledger)
        assert used_bytes(outbox) < 10_000

    def test_it_is_given_back_once_and_made_again(self, tmp_path: Path) -> None:
        """Also where only a copy with holes was left of it."""
        folder = tmp_path / "ledger"
        reserve.make(folder)
        assert reserve.release(folder)
        assert (0, False) == (held(folder), reserve.release(folder))
        os.truncate(folder / reserve.NAME, reserve.SIZE)
        assert 0 == held(folder)
        reserve.make(folder)
        assert reserve.SIZE <= held(folder)

    def test_it_is_not_what_fills_the_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """With little room, and where the file system refuses, there is none, and nothing is said."""

        def refuse(fd: int, *_: int) -> None:
            os.write(fd, b"x")
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(reserve, "free", lambda _: reserve.ROOM - 1)
            reserve.make(tmp_path)
        assert not (tmp_path / reserve.NAME).exists()
        monkeypatch.setattr(os, "posix_fallocate", refuse)
        reserve.make(tmp_path)
        assert 0 == held(tmp_path)

    def test_nothing_is_followed_or_cut_in_its_place(self, tmp_path: Path) -> None:
        """A link to somebody's file."""
        victim = tmp_path / "victim"
        victim.write_text("x")
        (tmp_path / reserve.NAME).symlink_to(victim)
        reserve.make(tmp_path)
        assert not reserve.release(tmp_path)
        assert "x" == victim.read_text()

    def test_the_ledger_gives_it_back_before_the_disk_is_full(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Then it cuts its log before each commit, and with room again the next checkpoint makes the reserve anew."""
        folder = tmp_path / "ledger"
        ledger = Ledger.open(folder)
        with monkeypatch.context() as patch:
            patch.setattr(reserve, "free", lambda _: reserve.LOW - 1)
            for number in range(20):
                ledger.commit(RunRecord("a", reason="x" * 20_000, delivered=number))
                assert 0 == held(folder)
            assert (folder / "cache.db-wal").stat().st_size < 10 * 20_000
        assert ledger.checkpoint()
        assert reserve.SIZE <= held(folder)
        ledger.close()

    def test_a_quota_that_statvfs_does_not_know_of_is_met_too(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The commit that is refused gives it back, so that the next one finds room."""
        folder = tmp_path / "ledger"
        ledger = Ledger.open(folder)

        def refuse(*_: object) -> None:
            msg = "database or disk is full"
            raise sqlite3.OperationalError(msg)

        with monkeypatch.context() as patch:
            patch.setattr(database.Database, "_make_way", refuse)
            with pytest.raises(LedgerUnavailable, match="full"):
                ledger.commit(record("a"))
        assert 0 == held(folder)
        ledger.commit(record("a"))
        ledger.close()


def delivered(root: Path, number: int) -> tuple[OutboxDirectory, Ledger, list[str]]:
    """Make an outbox of runs that were delivered, read back and filed, one after the other."""
    ids = offline(root, runs=number, points=1000)
    outbox = OutboxDirectory.open(outbox_of(root))
    ledger = Ledger.open(outbox.ledger)
    for time_ms, run_id in enumerate(ids, 1):
        os.rename(outbox.run(run_id), outbox.delivered / run_id)
        ledger.commit(RunRecord(run_id, remote_id=run_id, state="done", ended=True, verified_at_ms=time_ms))
    return outbox, ledger, ids


def test_at_the_cap_logging_goes_on_once_what_is_there_is_delivered(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Refused and counted while the server is away; then the delivered run gives way, long before its retention."""
    (tmp_path / "large").write_bytes(bytes(3_000_000))
    given = dataclasses.replace(QUICK, outbox_bytes=2_500_000, sync_interval=0.05)
    with FaultProxy(mlflow_server.url) as proxy:
        proxy.on("mlflow", status(503), times=None)
        tracker = MLflowTracker(experiment_name, proxy.url, outbox_dir=tmp_path / "box", settings=given)
        with tracker.start_run("first") as first:
            first.log_artifact(tmp_path / "large")
        second = tracker.start_run("second")
        eventually(lambda: not second.log_metric("loss", 0.0), 30)
        proxy.clear()
        eventually(lambda: second.log_metric("later", 0.5), 60)
        eventually(lambda: tracker.counters.get("reclaimed_early", 0) >= 1, 60, "who delivers says what it deleted")
        second.end()
        assert tracker.close(60)
    assert tracker.counters["refused_full"] > 0
    assert ["FINISHED"] * 2 == [run.info.status for run in runs(mlflow_server.url, experiment_name)]


@pytest.mark.parametrize("is_delivered", [False, True])
def test_an_outbox_that_is_full_when_a_program_begins_takes_events_once_there_is_room(
    sqlite_uri: str, experiment_name: str, tmp_path: Path, is_delivered: bool
) -> None:
    """Whatever fills it: nothing that the program logs begins a segment, of which whoever delivers would be told."""
    box = tmp_path / "box"
    settings = dataclasses.replace(QUICK, sync_interval=0.05)
    worker: WorkerKind = "thread" if is_delivered else "none"
    before = MLflowTracker(experiment_name, sqlite_uri, outbox_dir=box, worker=worker, settings=settings)
    with before.start_run("before") as run:
        assert run.log_text("x" * 3_000_000, "large.txt")
    assert is_delivered == bool(before.close(60))
    full = dataclasses.replace(settings, outbox_bytes=2_500_000)
    tracker = MLflowTracker(experiment_name, sqlite_uri, outbox_dir=box, settings=full)
    run = tracker.start_run("after")
    assert not run.log_metric("loss", 0.5)
    eventually(lambda: run.log_metric("later", 0.5), 25)
    run.end()
    assert tracker.close(60)


def test_a_run_that_begins_without_room_has_its_name_and_tags_once_there_is_some(
    sqlite_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """Its first points are refused and counted; the later ones would be those of a run of a name that MLflow chose."""
    settings = dataclasses.replace(QUICK, sync_interval=0.05)
    full = filled(experiment_name, sqlite_uri, tmp_path / "box", settings)
    tracker = MLflowTracker(experiment_name, sqlite_uri, outbox_dir=tmp_path / "box", settings=full)
    run = tracker.start_run("after", tags={"team": "vision"}, start_time=1_700_000_000_000)
    assert not run.log_metric("loss", 0.5)
    eventually(lambda: run.log_text("later", "later.txt"), 25)
    run.end()
    assert tracker.close(60)
    held = {run.info.run_name: run for run in runs(sqlite_uri, experiment_name)}
    assert {"before", "after"} == held.keys()
    after = held["after"]
    assert ("vision", 1_700_000_000_000, "FINISHED") == (
        after.data.tags["team"],
        after.info.start_time,
        after.info.status,
    )


def test_who_delivers_makes_as_much_room_as_the_program_allows(
    sqlite_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """A service has settings of its own: by these nothing would give way until the retention time is over."""
    settings = dataclasses.replace(QUICK, sync_interval=0.05)
    full = filled(experiment_name, sqlite_uri, tmp_path / "box", settings)
    tracker = MLflowTracker(experiment_name, sqlite_uri, outbox_dir=tmp_path / "box", worker="none", settings=full)
    run = tracker.start_run("after")
    assert not run.log_metric("loss", 0.5)
    assert tracker.outbox_path is not None
    with delivering(OutboxDirectory.open(tracker.outbox_path), sqlite_uri, settings):
        eventually(lambda: run.log_metric("later", 0.5), 90)
        run.end()
    tracker.close(0)


class TestRoom:
    def test_what_was_verified_first_goes_first_and_only_as_much_as_is_needed(self, tmp_path: Path) -> None:
        """At the cap; it is counted and said."""
        outbox, ledger, ids = delivered(tmp_path, 5)
        counters = Counters()
        budget = used_bytes(outbox)
        room = Room(outbox, Settings(free_bytes=0, outbox_bytes=budget + 1), counters)
        room.look(ledger, measure=True)
        assert 5 == len(outbox.delivered_ids())
        Room(outbox, Settings(free_bytes=0, outbox_bytes=budget), counters).look(ledger, measure=True)
        left = outbox.delivered_ids()
        assert 0 < len(left) < 5
        assert sorted(ids[-len(left) :]) == left
        assert 5 - len(left) == counters["reclaimed_early"]
        ledger.close()

    def test_what_is_undelivered_stays_whatever_it_takes(self, tmp_path: Path) -> None:
        """So do runs with dead letters, runs that were not read back, and the open part of a run that goes on."""
        outbox, ledger, (done, refused, unread, going) = delivered(tmp_path, 4)
        (waiting,) = offline(tmp_path)
        ledger.commit(RunRecord(unread, remote_id=unread))
        kept = ledger.record(refused)
        assert kept is not None
        ledger.commit(kept, dead=[DeadLetter(refused, "", b"", "no", "", 400, 1)])
        outbox.make_run(going)
        (filed,) = (outbox.delivered / going).glob("*.log")
        shutil.copy(filed, outbox.run(going) / "live-000001.log")
        Room(outbox, Settings(free_bytes=10**17), Counters()).look(ledger)
        assert sorted([refused, unread, going]) == outbox.delivered_ids()
        assert not filed.exists(), "a segment of a run that goes on, delivered and filed, goes last, but it goes"
        assert sorted([waiting, going]) == outbox.run_ids()
        assert (outbox.run(going) / "live-000001.log").exists()
        assert done not in outbox.delivered_ids()
        ledger.close()

    def test_a_measurement_that_came_too_early_is_made_later(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """By a look that is not told to: at the cap nothing more is logged that would ask for it."""
        monkeypatch.setattr(room, "_MEASURE", 0.5)
        outbox, ledger, (first, *_) = delivered(tmp_path, 3)
        one = Room(outbox, Settings(free_bytes=0, outbox_bytes=used_bytes(outbox) + 1), Counters())
        one.look(ledger, measure=True)
        (outbox.path / "more").write_bytes(b"xx")
        one.look(ledger, measure=True)
        eventually(lambda: one.look(ledger) or first not in outbox.delivered_ids())
        ledger.close()

    def test_what_is_filed_later_of_a_run_that_goes_on_gives_way_at_once(self, tmp_path: Path) -> None:
        """That nothing could be deleted a moment ago is not believed then."""
        outbox, ledger, (going,) = delivered(tmp_path, 1)
        outbox.make_run(going)
        (filed,) = (outbox.delivered / going).glob("*.log")
        content = filed.read_bytes()
        one = Room(outbox, Settings(free_bytes=10**17), Counters())
        one.look(ledger)
        assert not filed.exists()
        filed.write_bytes(content)
        one.filed()
        one.look(ledger)
        assert not filed.exists()
        ledger.close()

    def test_one_run_that_cannot_be_deleted_keeps_no_other(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What is left of the oldest one stays, and is counted; the next one goes."""
        outbox, ledger, (first, second) = delivered(tmp_path, 2)
        original, counters = shutil.rmtree, Counters()

        def refuse(path: Path) -> None:
            if run_id_of(path) == first:
                raise PermissionError(errno.EPERM, "Operation not permitted", str(path))
            original(path)

        monkeypatch.setattr(shutil, "rmtree", refuse)
        Room(outbox, Settings(free_bytes=10**17), counters).look(ledger)
        assert (1, 1) == (counters["reclaim_errors"], counters["reclaimed_early"])
        assert ([first], []) == ([run_id_of(path) for path in leftovers(outbox)], outbox.delivered_ids())
        assert first != second
        ledger.close()

    def test_delivery_goes_on_where_nothing_can_be_deleted(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is counted; and that nothing is left to delete is not found out anew each second."""
        outbox, ledger, (first, second) = delivered(tmp_path, 2)
        counters = Counters()
        room = Room(outbox, Settings(free_bytes=10**17), counters)

        def refuse(path: Path) -> None:
            raise PermissionError(errno.EPERM, "Operation not permitted", str(path))

        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", refuse)
            room.look(ledger)
        assert (1, 2) == (counters["reclaim_errors"], len(leftovers(outbox)))
        room.look(ledger)
        assert (2, []) == (counters["reclaimed_early"], leftovers(outbox))
        with monkeypatch.context() as patch:
            patch.setattr(Ledger, "dead_letter_counts", refuse)
            room.look(ledger)
        ledger.close()
        assert first != second

    def test_a_name_that_there_is_no_room_for_keeps_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A full disk may refuse the one under which a run would be deleted: then it is deleted where it is."""
        outbox, ledger, _ = delivered(tmp_path, 2)

        def refuse(path: Path, _: Path) -> None:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

        monkeypatch.setattr(os, "rename", refuse)
        Room(outbox, Settings(free_bytes=10**17), Counters()).look(ledger)
        assert [] == os.listdir(outbox.delivered)
        ledger.close()

    @pytest.mark.parametrize("blocks", [0, None], ids=["no blocks", "no answer"])
    def test_where_the_disk_does_not_tell_what_is_free_nothing_gives_way(
        self, blocks: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Some file systems say that they have no blocks, and a server of files may be away for a moment."""
        outbox, ledger, ids = delivered(tmp_path, 2)

        def statvfs(path: Path) -> SimpleNamespace:
            if blocks is None:
                raise OSError(errno.ESTALE, "Stale file handle", str(path))
            return SimpleNamespace(f_blocks=blocks, f_bavail=0, f_frsize=4096)

        monkeypatch.setattr(os, "statvfs", statvfs)
        Room(outbox, Settings(), Counters()).look(ledger)
        assert sorted(ids) == outbox.delivered_ids()
        ledger.close()

    def test_what_is_delivered_gives_way_for_a_file_that_found_no_room(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As much as it needs, once; and nothing if that would not be enough."""
        outbox, ledger, ids = delivered(tmp_path, 3)
        free = reserve.LOW
        monkeypatch.setattr(reserve, "free", lambda _: free)
        one = Room(outbox, Settings(free_bytes=0), Counters())
        demand.tell(outbox.path, 10**12)
        one.look(ledger)
        assert (3, 0) == (len(outbox.delivered_ids()), demand.told(outbox.path))
        demand.tell(outbox.path, 1_000)
        one.look(ledger)
        assert sorted(ids[1:]) == outbox.delivered_ids()
        free += 1_000
        one.look(ledger)
        assert (2, 0) == (len(outbox.delivered_ids()), demand.told(outbox.path))
        ledger.close()

    @pytest.mark.parametrize("what", ["free", "used"])
    def test_what_a_program_allows_that_refuses_events_counts_for_a_day(
        self, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What it wants to be left free, and what the outbox may take; not the word of one that is long gone."""
        outbox, ledger, _ = delivered(tmp_path, 3)
        monkeypatch.setattr(reserve, "free", lambda _: 10**9)
        most, least = (10**12, 10**9 + 1) if what == "free" else (used_bytes(outbox) // 2, 0)
        demand.tell_budget(outbox.path, most, least)
        os.utime(outbox.path / "budget", (1, 1))
        Room(outbox, Settings(), Counters()).look(ledger, measure=True)
        assert 3 == len(outbox.delivered_ids())
        demand.tell_budget(outbox.path, most, least)
        Room(outbox, Settings(), Counters()).look(ledger, measure=True)
        assert len(outbox.delivered_ids()) < 3
        ledger.close()

    def test_where_nothing_may_be_deleted_nothing_is(self, tmp_path: Path) -> None:
        """Another's outbox, or one that is only read."""
        outbox, ledger, _ = delivered(tmp_path, 1)
        Room(None, Settings(free_bytes=10**17), Counters()).look(ledger)
        assert 1 == len(outbox.delivered_ids())
        ledger.close()
