"""What is delivered is filed and gives way, also of a run that goes on; and none of that holds up delivery."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from commands import offline, outbox_of
from contents import QUICK, artifacts, client, numbered, points, runs, the_run
from mlflow_outbox import MLflowTracker, Settings
from mlflow_outbox.counters import Counters
from mlflow_outbox.spool import guard
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox.spool.events import Artifact, encode
from mlflow_outbox.spool.guard import used_bytes
from mlflow_outbox.spool.reader import RunReader
from mlflow_outbox.spool.window import Window
from mlflow_outbox_worker import courier, finish, room, upkeep
from mlflow_outbox_worker.ledger import Ledger
from mlflow_outbox_worker.records import DeadLetter, RunRecord
from mlflow_outbox_worker.removal import leftovers
from mlflow_outbox_worker.retention import file_passed, filed_parts
from mlflow_outbox_worker.sources import run_id_of
from replays import command
from servers import eventually
from workers import delivering

#: Segments of about a hundred points.
SMALL = dataclasses.replace(QUICK, segment_bytes=4096, sync_interval=0.05)


@pytest.fixture(autouse=True)
def _in_a_hurry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(upkeep, "_FILE", 0.05)
    monkeypatch.setattr(guard, "_MEASURE_EVERY", 0.05)
    monkeypatch.setattr(room, "_MEASURE", 0.05)
    monkeypatch.setattr(room, "_RARELY", 1.0)


def segments(folder: Path) -> list[str]:
    """Return the names of the segments in a run's directory, in order."""
    return sorted(path.name for path in folder.glob("*.log"))


def lose(uri: str, step: int) -> None:
    """Take a point out of MLflow's database."""
    with contextlib.closing(sqlite3.connect(uri.removeprefix("sqlite:///"), timeout=60)) as database, database:
        assert 1 == database.execute("DELETE FROM metrics WHERE step = ?", (step,)).rowcount


def artifact_place(uri: str, one: Open) -> Path:
    """Return where MLflow keeps the artifacts of a run."""
    return Path(the_run(uri, one.tracker.experiment_name).info.artifact_uri.removeprefix("file://"))


def stored(uri: str, key: str) -> int:
    """Return how many points of a metric are in MLflow's database."""
    with contextlib.closing(sqlite3.connect(uri.removeprefix("sqlite:///"), timeout=60)) as database:
        number: int = database.execute("SELECT count(*) FROM metrics WHERE key = ?", (key,)).fetchone()[0]
        return number


class Open:
    """A run that is being written, and its outbox; nothing is delivered by its tracker."""

    def __init__(self, experiment: str, uri: str, root: Path, settings: Settings) -> None:
        self.tracker = MLflowTracker(experiment, uri, outbox_dir=root, worker="none", settings=settings)
        self.run = self.tracker.start_run("goes on")
        self.logged = 0
        assert self.tracker.outbox_path is not None
        self.directory = OutboxDirectory.open(self.tracker.outbox_path)
        self.waiting = self.directory.run(self.run.run_id)
        self.filed = self.directory.delivered / self.run.run_id

    def log(self, number: int) -> None:
        """Log some points, each one once."""
        for step in range(self.logged, self.logged + number):
            assert self.run.log_metric("loss", step / 2, step=step)
        self.logged += number

    def end(self) -> None:
        """End the run and close its journal."""
        self.run.end()
        self.tracker.close(0)


@pytest.fixture
def going(experiment_name: str, sqlite_uri: str, tmp_path: Path) -> Iterator[Open]:
    """A run that goes on, in small segments."""
    opened = Open(experiment_name, sqlite_uri, tmp_path / "outbox", SMALL)
    yield opened
    opened.tracker.close(0)


class TestOfARunThatGoesOn:
    def test_it_logs_many_times_what_its_outbox_may_hold(
        self, experiment_name: str, sqlite_uri: str, tmp_path: Path
    ) -> None:
        """At the cap its oldest delivered segments, whose size follows the cap, give way: it goes on at once."""
        most = 1_000_000
        settings = dataclasses.replace(QUICK, sync_interval=0.05, outbox_bytes=most)
        one = Open(experiment_name, sqlite_uri, tmp_path / "outbox", settings)
        logged = 0
        with delivering(one.directory, sqlite_uri, settings) as counters:
            while logged < 6 * most:
                text = f"{logged:020d}" + "x" * 4000
                eventually(lambda text=text: one.run.set_tag("note", text), 60)  # type: ignore[misc]  # mypy infers no default
                logged += len(text)
                if logged // 100_000 > (logged - len(text)) // 100_000:
                    eventually(lambda: len(segments(one.waiting)) <= 2, 60)
            eventually(lambda: used_bytes(one.directory) < most, 60)
            eventually(one.run.end, 60)
            one.tracker.close(0)
            eventually(lambda: not one.waiting.exists(), 60)
        assert counters["reclaimed_early"] > 50
        assert (1, 0) == (counters["runs_verified"], counters["verification_differences"])
        held = the_run(sqlite_uri, experiment_name)
        assert ("FINISHED", text) == (held.info.status, held.data.tags["note"])

    def test_its_delivered_segments_are_filed_as_it_goes(self, going: Open, sqlite_uri: str) -> None:
        """All but the one that is being written; the ends of it are the same as without."""
        with delivering(going.directory, sqlite_uri, SMALL) as counters:
            for _ in range(3):
                going.log(500)
                eventually(lambda: len(segments(going.waiting)) == 1, 60)
            assert len(segments(going.filed)) > 3
            going.end()
            eventually(lambda: not going.waiting.exists(), 60)
        assert (1, 0) == (counters["runs_verified"], counters["missing"])
        assert numbered(1500) == points(
            sqlite_uri, the_run(sqlite_uri, going.tracker.experiment_name).info.run_id, "loss"
        )

    def test_what_was_filed_behind_the_ledger_s_back_is_not_missing(
        self, going: Open, sqlite_uri: str, tmp_path: Path
    ) -> None:
        """Another machine has delivered some of it, or the ledger was set back; what nobody has filed is missing."""
        going.log(50)
        going.tracker.flush(0)
        with delivering(going.directory, sqlite_uri, SMALL) as counters:
            eventually(lambda: counters["delivered"] == 51, 60)
        shutil.copytree(going.directory.ledger, tmp_path / "before")
        with delivering(going.directory, sqlite_uri, SMALL) as counters:
            going.log(500)
            eventually(lambda: counters["delivered"] == 500 and len(segments(going.waiting)) == 1, 60)
        shutil.rmtree(going.directory.ledger)
        (tmp_path / "before").rename(going.directory.ledger)
        [held] = RunReader(going.filed).segments().values()
        lost = held[3].header.first_seq - held[2].header.first_seq
        held[2].path.unlink()
        with delivering(going.directory, sqlite_uri, SMALL) as counters:
            going.log(50)
            going.end()
            eventually(lambda: not going.waiting.exists(), 60)
        assert lost == counters["missing"]
        run = the_run(sqlite_uri, going.tracker.experiment_name)
        assert numbered(600) == points(sqlite_uri, run.info.run_id, "loss")

    def test_they_are_filed_while_there_is_more_to_send(
        self, going: Open, sqlite_uri: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A long backlog makes room from its beginning, not at its end."""
        going.log(3000)
        before = len(segments(going.waiting))
        seen = []
        original = upkeep.Upkeep.file

        def watched(self: upkeep.Upkeep, ledger: Ledger, turn: courier.Turn) -> float:
            seen.append((turn.progress, len(segments(going.filed))))
            return original(self, ledger, turn)

        monkeypatch.setattr(courier, "_TURN", 1)
        monkeypatch.setattr(upkeep, "_FILE", 0.0)
        monkeypatch.setattr(upkeep.Upkeep, "file", watched)
        with delivering(going.directory, sqlite_uri, dataclasses.replace(SMALL, batch_points=500)):
            eventually(lambda: len(segments(going.waiting)) == 1, 60)
        assert any(progress == "more" and 0 < number < before - 1 for progress, number in seen)

    def test_its_dead_letters_are_not_read_at_each_of_its_turns(
        self, going: Open, sqlite_uri: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A metric that MLflow never takes has one for each of its points: of 100,000 a turn took a second and more."""
        asked: list[str | None] = []
        original = Ledger.dead_letters

        def noted(self: Ledger, run_id: str | None = None) -> Iterator[DeadLetter]:
            asked.append(run_id)
            return original(self, run_id)

        with delivering(going.directory, sqlite_uri, SMALL) as counters:
            assert going.run.log_text("kept", "a.txt")
            for value in ("1", "2"):
                going.run.log_param("p", value)
            eventually(lambda: counters["dead_letters"] == 1, 60)
            eventually(lambda: not os.listdir(going.waiting / "files"), 60, "the copy is filed")
            monkeypatch.setattr(Ledger, "dead_letters", noted)

            def arrives(number: int) -> None:
                going.log(1)
                eventually(lambda: counters["delivered"] >= number, 60)

            delivered = counters["delivered"]
            for number in range(1, 11):
                arrives(delivered + number)
        assert [] == asked

    def test_one_of_its_programs_that_logs_without_a_pause_does_not_keep_back_the_others(
        self, experiment_name: str, sqlite_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """From one turn of the run to the next too; before each window more is logged than fits one."""
        going = Open(experiment_name, sqlite_uri, tmp_path / "outbox", QUICK)
        original = RunReader.window

        def overloaded(self: RunReader, *given: Any, **named: Any) -> Window:
            going.log(20)
            return original(self, *given, **named)

        monkeypatch.setattr(courier, "_TURN", 1)
        monkeypatch.setattr(RunReader, "window", overloaded)
        going.log(20)
        other = MLflowTracker(experiment_name, sqlite_uri, outbox_dir=tmp_path / "outbox", worker="none")
        second = other.start_run(run_id=going.run.run_id)
        assert second.log_metric("rank", 1.0)
        with delivering(going.directory, sqlite_uri, dataclasses.replace(QUICK, batch_points=10)) as counters:
            eventually(lambda: counters["delivered"] > 200, 60)
            assert 1 == stored(sqlite_uri, "rank")
        other.close(0)
        going.end()

    def test_what_mlflow_lacks_of_it_is_sent_again_from_its_beginning(self, going: Open, sqlite_uri: str) -> None:
        """A look at every point sees the filed segments too, and they are brought back to be sent."""
        settings = dataclasses.replace(SMALL, verify="full")
        with delivering(going.directory, sqlite_uri, settings) as counters:
            going.log(1000)
            eventually(lambda: len(segments(going.waiting)) == 1, 60)
            lose(sqlite_uri, 5)
            going.end()
            eventually(lambda: not going.waiting.exists(), 60)
        assert (1, 1) == (counters["verification_differences"], counters["runs_verified"])
        assert numbered(1000) == points(
            sqlite_uri, the_run(sqlite_uri, going.tracker.experiment_name).info.run_id, "loss"
        )

    @pytest.mark.parametrize("reclaimed", [False, True])
    def test_an_artifact_that_others_changed_stays_so_and_one_that_is_absent_comes_back_where_it_can(
        self, reclaimed: bool, going: Open, sqlite_uri: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Nothing is stored over another content, and neither parks the run; each is said."""
        with delivering(going.directory, sqlite_uri, SMALL) as counters:
            for path in ("config.txt", "checkpoints/1.bin", "checkpoints/2.bin"):
                assert going.run.log_text("as logged", path)
            going.log(1000)
            eventually(lambda: len(segments(going.waiting)) == 1, 60)
            place = artifact_place(sqlite_uri, going)
            (place / "config.txt").write_text("by an evaluation")
            (place / "checkpoints" / "1.bin").unlink()
            if reclaimed:
                (going.filed / segments(going.filed)[0]).unlink()
            going.end()
            eventually(lambda: not going.waiting.exists(), 60)
        assert (1, 2 if reclaimed else 1) == (counters["runs_verified"], counters["artifacts_altered"])
        assert (0 if reclaimed else 1, 0) == (counters["verification_differences"], counters["parked"])
        assert "by an evaluation" == (place / "config.txt").read_text()
        there = ["2.bin"] if reclaimed else ["1.bin", "2.bin"]
        assert there == sorted(path.name for path in (place / "checkpoints").iterdir())
        said = [text for text in caplog.messages if f"all artifacts of run {going.run.run_id}" in text]
        assert [True] == ["'config.txt' has 16" in text for text in said]
        with contextlib.closing(Ledger.open(going.directory.ledger, read_only=True)) as ledger:
            record = ledger.record(going.run.run_id)
        assert record is not None
        assert reclaimed == ("the artifact 'checkpoints/1.bin' is missing" in record.altered)

    def test_what_mlflow_lacks_is_sent_again_but_no_artifact_over_another(
        self, going: Open, sqlite_uri: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Absent ones come back with the lost point; what others have put there stays, until it is logged anew."""
        more = going.tracker.start_run(run_id=going.run.run_id)
        original = finish.bring_back

        def bring_back(*arguments: Any) -> None:
            assert more.log_text("logged anew", "b.txt")
            more.end()
            original(*arguments)

        monkeypatch.setattr(finish, "bring_back", bring_back)
        with delivering(going.directory, sqlite_uri, dataclasses.replace(SMALL, verify="full")) as counters:
            for text in ("first", "second"):
                for path in ("a.txt", "b.txt", "c.txt"):
                    assert going.run.log_text(text, path)
                going.log(1000)
            eventually(lambda: len(segments(going.waiting)) <= 2, 60)
            eventually(lambda: counters["delivered"] >= 2007, 60)
            place = artifact_place(sqlite_uri, going)
            for path in ("a.txt", "b.txt"):
                (place / path).write_text("by others")
            (place / "c.txt").unlink()
            lose(sqlite_uri, 5)
            going.end()
            eventually(lambda: not going.waiting.exists(), 60)
        assert (1, 1) == (counters["verification_differences"], counters["runs_verified"])
        assert ["by others", "logged anew", "second"] == [
            (place / path).read_text() for path in ("a.txt", "b.txt", "c.txt")
        ]
        assert numbered(2000) == points(
            sqlite_uri, the_run(sqlite_uri, going.tracker.experiment_name).info.run_id, "loss"
        )

    @pytest.mark.parametrize("lacks", [False, True])
    def test_it_is_read_back_and_replayed_also_when_its_beginning_was_reclaimed(
        self, lacks: bool, going: Open, sqlite_uri: str, tmp_path: Path
    ) -> None:
        """What is left of it is compared, and replayed if asked for; what MLflow lacks of it then needs a person."""
        with delivering(going.directory, sqlite_uri, dataclasses.replace(SMALL, verify="full")) as counters:
            going.log(1000)
            eventually(lambda: len(segments(going.waiting)) == 1, 60)
            gone = going.filed / segments(going.filed)[0]
            gone.unlink()
            if lacks:
                lose(sqlite_uri, 900)
            going.end()
            if lacks:
                eventually(lambda: counters["parked"], 60)
            else:
                eventually(lambda: not going.waiting.exists(), 60)
        assert (not lacks) == bool(counters["runs_verified"])
        other = (tmp_path / "other").as_uri()
        assert 1 == command("replay", going.directory.path, "--to", other)
        assert 0 == command("replay", going.directory.path, "--to", other, "--incomplete")
        copy = the_run(other, going.tracker.experiment_name)
        arrived = points(other, copy.info.run_id, "loss")
        assert "FINISHED" == copy.info.status
        assert 0 < len(arrived) < 1000
        assert numbered(1000) - numbered(1000 - len(arrived)) == arrived

    def test_its_segments_go_when_the_retention_time_is_over(
        self, going: Open, sqlite_uri: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Counted from when they were filed; the one that is being written stays."""
        monkeypatch.setattr(upkeep, "_RECLAIM", 0.05)
        with delivering(going.directory, sqlite_uri, dataclasses.replace(SMALL, retention=3600)):
            going.log(1000)
            eventually(lambda: len(segments(going.waiting)) == 1, 60)
            assert segments(going.filed)
        with delivering(going.directory, sqlite_uri, dataclasses.replace(SMALL, retention=0)):
            eventually(lambda: not segments(going.filed), 60)
            going.log(10)
            going.end()
            eventually(lambda: not going.waiting.exists(), 60)
        with client(sqlite_uri) as mlflow:
            held = the_run(sqlite_uri, going.tracker.experiment_name)
            assert 1010 == len(mlflow.get_metric_history(held.info.run_id, "loss"))


def names(folder: Path) -> list[str]:
    """Return the digests of the copies in a run's directory."""
    with contextlib.suppress(FileNotFoundError):
        return os.listdir(folder / "files")
    return []


class TestCopies:
    def test_those_that_are_delivered_give_way_at_the_cap(
        self, experiment_name: str, sqlite_uri: str, tmp_path: Path
    ) -> None:
        """A run that goes on logs checkpoints of many times what its outbox may hold."""
        most = 2_000_000
        settings = dataclasses.replace(QUICK, sync_interval=0.05, outbox_bytes=most)
        one = Open(experiment_name, sqlite_uri, tmp_path / "outbox", settings)
        with delivering(one.directory, sqlite_uri, settings) as counters:
            for number in range(10):
                (tmp_path / "checkpoint").write_bytes(os.urandom(600_000))
                eventually(
                    lambda number=number: one.run.log_artifact(tmp_path / "checkpoint", str(number)),  # type: ignore[misc]  # mypy infers no default
                    60,
                )
            eventually(lambda: names(one.waiting) == [], 60)
            eventually(lambda: used_bytes(one.directory) < most, 60)
            assert counters["reclaimed_early"] > 3
            eventually(one.run.end, 60)
            one.tracker.close(0)
            eventually(lambda: not one.waiting.exists(), 60)
        assert (1, 0, 0) == (counters["runs_verified"], counters["verification_differences"], counters["dead_letters"])
        held = the_run(sqlite_uri, experiment_name).info.run_id
        assert [f"{number}/checkpoint" for number in range(10)] == artifacts(sqlite_uri, held)

    def test_one_that_is_logged_again_is_there_for_its_event(
        self, going: Open, sqlite_uri: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The same content, while the copy of the call before is filed and deleted as fast as it goes."""
        monkeypatch.setattr(upkeep, "_FILE", 0.0)
        monkeypatch.setattr(upkeep, "_RECLAIM", 0.0)
        settings = dataclasses.replace(SMALL, retention=0, poll_interval=0.001)
        with delivering(going.directory, sqlite_uri, settings) as counters:
            for number in range(100):
                assert going.run.log_text("always the same", f"{number % 10}/{number}.txt")
            eventually(lambda: names(going.waiting) == names(going.filed) == [], 60)
            going.end()
            eventually(lambda: counters["runs_verified"], 60)
        assert (0, 0, {}) == (counters["dead_letters"], counters["run_errors"], going.tracker.counters)
        held = the_run(sqlite_uri, going.tracker.experiment_name).info.run_id
        assert 100 == sum(len(artifacts(sqlite_uri, held, str(folder))) for folder in range(10))

    def test_one_that_a_dead_letter_or_an_event_behind_the_cursors_names_stays(
        self, going: Open, sqlite_uri: str
    ) -> None:
        """Among others, which are filed; and when the ledger was lost nothing that is filed goes."""
        for number in range(3):
            assert going.run.log_text(str(number), f"{number}.txt")
        refused, waits, free = (hashlib.sha256(str(number).encode()).hexdigest() for number in range(3))
        cursors = RunReader(going.waiting).window({}).cursors
        assert going.run.log_text("1", "again.txt")
        letter = encode(Artifact("0.txt", refused, 1, 1))
        with contextlib.closing(Ledger.open(going.directory.ledger)) as ledger:
            record = RunRecord(going.run.run_id, remote_id="r", cursors=cursors)
            ledger.commit(record, dead=[DeadLetter(record.run_id, "r", letter, "no", "", 400, 1)])
            (going.waiting / "files" / ".draft-0").touch()
            assert file_passed(going.directory, ledger, record, [], Counters(), copies=True)
            assert sorted([refused, waits]) == sorted(names(going.waiting))
            assert [free] == names(going.filed) == [path.name for path, _ in filed_parts(going.directory, ledger)]
            ledger.forget(record.run_id)
            assert [] == filed_parts(going.directory, ledger)

    def test_files_that_were_given_back_are_no_dead_letters_when_the_ledger_is_lost(
        self, going: Open, sqlite_uri: str
    ) -> None:
        """All events are delivered again; what MLflow has is not asked for."""
        with delivering(going.directory, sqlite_uri, SMALL):
            assert going.run.log_text("x", "folder/x.txt")
            eventually(lambda: names(going.filed), 60)
        shutil.rmtree(going.filed)
        shutil.rmtree(going.directory.ledger)
        with delivering(going.directory, sqlite_uri, SMALL) as counters:
            going.end()
            eventually(lambda: counters["runs_verified"], 60)
        assert 0 == counters["dead_letters"]

    def test_files_that_were_given_back_are_not_sent_again(self, going: Open, sqlite_uri: str) -> None:
        """What MLflow lacks of the run needs a person then, and nothing becomes a dead letter."""
        with delivering(going.directory, sqlite_uri, dataclasses.replace(SMALL, verify="full")) as counters:
            going.log(10)
            assert going.run.log_text("x", "x.txt")
            eventually(lambda: names(going.filed), 60)
            # And no segment: one that is synced while the file is logged is left, and filed with the points in it.
            shutil.rmtree(going.filed / "files")
            lose(sqlite_uri, 5)
            going.end()
            eventually(
                lambda: counters["parked"], 60, lambda: f"parked: {counters}, {sorted(going.directory.path.rglob('*'))}"
            )
        assert 0 == counters["dead_letters"]


_KILLED = """
import os, signal, sys
from mlflow_outbox import MLflowTracker, Settings
tracker = MLflowTracker(sys.argv[1], sys.argv[2], outbox_dir=sys.argv[3], worker="none", settings=Settings())
run = tracker.start_run("killed")
run.log_metric("loss", 0.0, step=0)
run.log_text("x" * 100_000, "x.txt")
print(run.run_id, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_run_that_was_killed_is_read_back_filed_and_gone_on_with(
    experiment_name: str, sqlite_uri: str, tmp_path: Path
) -> None:
    """It is given back like one that has ended; MLflow shows it as running, and who resumes it finds all of it."""
    words = [sys.executable, "-c", _KILLED, experiment_name, sqlite_uri, str(tmp_path / "outbox")]
    run_id = subprocess.run(words, check=False, stdout=subprocess.PIPE, text=True).stdout.strip()
    directory = OutboxDirectory.open(outbox_of(tmp_path / "outbox"))
    with delivering(directory, sqlite_uri, QUICK) as counters:
        eventually(lambda: directory.run_ids() == [], 60)
        assert 1 == counters["runs_verified"]
        assert "RUNNING" == the_run(sqlite_uri, experiment_name).info.status
        tracker = MLflowTracker(
            experiment_name, sqlite_uri, outbox_dir=tmp_path / "outbox", worker="none", settings=QUICK
        )
        with tracker.start_run(run_id=run_id) as run:
            run.log_metric("loss", 0.5, step=1)
            eventually(lambda: counters["delivered"] >= 5, 60)
            assert directory.run_ids()
        eventually(lambda: directory.run_ids() == [], 60)
        tracker.close(0)
    held = the_run(sqlite_uri, experiment_name)
    assert "FINISHED" == held.info.status
    assert numbered(2) == points(sqlite_uri, held.info.run_id, "loss")
    assert 0 == command("gc", "--older-than", "0", "-d", tmp_path / "outbox")
    assert [] == directory.delivered_ids()


class TestTrouble:
    def test_a_run_that_cannot_be_deleted_holds_up_neither_delivery_nor_other_runs(
        self, experiment_name: str, sqlite_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is counted, said and tried again; by gc too, which deletes the others."""
        first, second = offline(tmp_path / "outbox", sqlite_uri, experiment=experiment_name, runs=2)
        directory = OutboxDirectory.open(outbox_of(tmp_path / "outbox"))
        with contextlib.closing(Ledger.open(directory.ledger)) as ledger:
            for run_id in (first, second):
                os.rename(directory.run(run_id), directory.delivered / run_id)
                ledger.commit(RunRecord(run_id, remote_id=run_id, state="done", ended=True, verified_at_ms=1))
        offline(tmp_path / "outbox", sqlite_uri, experiment=experiment_name)
        original, stuck = shutil.rmtree, min(first, second)

        def refuse(path: Path) -> None:
            if run_id_of(path) == stuck:
                raise PermissionError(errno.EPERM, "Operation not permitted", str(path))
            original(path)

        monkeypatch.setattr(shutil, "rmtree", refuse)
        with delivering(directory, sqlite_uri, QUICK) as counters:
            eventually(lambda: directory.run_ids() == [], 60)
            eventually(lambda: len(directory.delivered_ids()) == 1, 60)
            eventually(lambda: counters["reclaim_errors"] == 2, 60, "it is tried again")
        assert [stuck] == [run_id_of(path) for path in leftovers(directory)]
        assert (1, 0) == (counters["runs_verified"], counters["worker_errors"])
        assert ["FINISHED"] == [run.info.status for run in runs(sqlite_uri, experiment_name)]
        assert 1 == command("gc", "--older-than", "0", "-d", tmp_path / "outbox")
        assert [stuck] == [run_id_of(path) for path in leftovers(directory)]
        assert [] == directory.delivered_ids()

    def test_a_run_that_could_not_be_filed_is_filed_later(
        self, experiment_name: str, sqlite_uri: str, tmp_path: Path
    ) -> None:
        """Somebody reads the ledger meanwhile, which is no failure of the run."""
        offline(tmp_path / "outbox", sqlite_uri, experiment=experiment_name)
        directory = OutboxDirectory.open(outbox_of(tmp_path / "outbox"))
        Ledger.open(directory.ledger).close()
        with delivering(directory, sqlite_uri, QUICK) as counters:
            eventually((directory.ledger / "cache.db-shm").exists, 60)
            reader = sqlite3.connect(
                f"file:{directory.ledger / 'cache.db'}?mode=ro", uri=True, isolation_level=None, timeout=60
            )
            with contextlib.closing(reader):
                reader.execute("BEGIN")
                reader.execute("SELECT count(*) FROM Cache").fetchall()
                eventually(lambda: counters["runs_verified"], 60)
                assert 1 == len(directory.run_ids())
            eventually(lambda: directory.run_ids() == [], 60)
        assert 1 == len(directory.delivered_ids())
        assert (0, 0) == (counters["run_errors"], counters["filing_errors"])

    def test_a_file_that_cannot_be_moved_is_no_failure_of_delivery(
        self, going: Open, sqlite_uri: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is counted and said, and moved once that is possible again."""
        original = os.rename

        def refuse(source: Path, target: Path) -> None:
            raise PermissionError(errno.EPERM, "Operation not permitted", str(source))

        monkeypatch.setattr(os, "rename", refuse)
        with delivering(going.directory, sqlite_uri, SMALL) as counters:
            going.log(1000)
            eventually(lambda: counters["filing_errors"], 60)
            eventually(lambda: counters["delivered"] >= 1000, 60)
            monkeypatch.setattr(os, "rename", original)
            eventually(lambda: len(segments(going.waiting)) == 1, 60)
        assert 0 == counters["run_errors"]
