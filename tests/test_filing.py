"""What is filed as delivered was delivered."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from contents import QUICK, artifact_text, points, the_run
from mlflow_outbox import MLflowTracker
from mlflow_outbox.counters import Counters
from mlflow_outbox.destination import resolve
from mlflow_outbox.settings import Settings
from mlflow_outbox.spool import frame, snapshot
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox.spool.events import Artifact, Metric, RunEnded, RunStarted
from mlflow_outbox.spool.identity import RunIdentity
from mlflow_outbox.spool.journal import Journal
from mlflow_outbox.spool.reader import RunReader
from mlflow_outbox.spool.snapshot import SnapshotStore
from mlflow_outbox.spool.window import Cursor, Window
from mlflow_outbox.testing import FailingDisk
from mlflow_outbox_worker import retention, upkeep
from mlflow_outbox_worker.ledger import Ledger
from mlflow_outbox_worker.records import RunRecord
from mlflow_outbox_worker.requeue import bring_back
from mlflow_outbox_worker.retention import file_run, filed_parts, passed_segments
from servers import eventually
from spools import RUN, Kit, header, make_journal, metric, packed, write_segment
from workers import delivering


def test_a_run_resumed_for_a_moment_while_it_is_filed_stays_where_it_is(tmp_path: Path) -> None:
    """Its new segment is closed already, so nobody writes it; but no cursor has passed it."""
    directory = OutboxDirectory.create(tmp_path / "outbox", resolve("http://127.0.0.1:9"), now_ms=0)
    journal = Journal(directory, RunIdentity("a" * 32, "experiment"), Settings(), Counters())
    journal.append(Metric("m", 1.0, 1, 1))
    journal.close()
    delivered = RunReader(directory.run("a" * 32)).window({}).cursors
    journal.append(Metric("m", 2.0, 2, 2))
    journal.close()
    ledger = Ledger.open(tmp_path / "ledger")
    try:
        assert not file_run(directory, ledger, "a" * 32, delivered, Counters())
        everything = RunReader(directory.run("a" * 32)).window({}).cursors
        assert file_run(directory, ledger, "a" * 32, everything, Counters())
    finally:
        ledger.close()
    assert [] == directory.run_ids()


@pytest.mark.parametrize("link", ["", "files"])
def test_nothing_is_filed_through_a_link(link: str, tmp_path: Path) -> None:
    """F90: whoever packed the outbox would have any file of the user's written, by any name."""
    kit = Kit(tmp_path / "outbox")
    kit.run.log_text("before", "before.txt")
    kit.run.end()
    (kit.outbox.run(RUN) / "files" / "authorized_keys").write_text("theirs")
    home, filed = tmp_path / "home", kit.outbox.delivered / RUN
    home.mkdir()
    (home / "authorized_keys").write_text("mine")
    if link:
        filed.mkdir(0o700)
    (filed / link).symlink_to(home)
    delivered = RunReader(kit.outbox.run(RUN)).window({}).cursors
    with contextlib.closing(Ledger.open(tmp_path / "ledger")) as ledger, pytest.raises(OSError, match="symbolic link"):
        file_run(kit.outbox, ledger, RUN, delivered, Counters())
    assert [("authorized_keys", "mine")] == [(path.name, path.read_text()) for path in home.iterdir()]


def test_nothing_is_moved_out_of_what_a_link_leads_to(tmp_path: Path) -> None:
    """F90: a run's own folder of copies may be one as well."""
    kit = Kit(tmp_path / "outbox")
    kit.run.log_text("before", "before.txt")
    kit.run.end()
    home, files = tmp_path / "home", kit.outbox.run(RUN) / "files"
    os.rename(files, home)
    (home / ".draft-0").touch()
    (home / "mine").touch()
    before = sorted(os.listdir(home))
    files.symlink_to(home)
    delivered = RunReader(kit.outbox.run(RUN)).window({}).cursors
    with contextlib.closing(Ledger.open(tmp_path / "ledger")) as ledger, pytest.raises(NotADirectoryError):
        file_run(kit.outbox, ledger, RUN, delivered, Counters())
    assert before == sorted(os.listdir(home))


def test_nothing_to_which_a_link_leads_is_taken_for_a_filed_copy(tmp_path: Path) -> None:
    """F90: it would be deleted after the retention time, and moved by a replay that sends everything once more."""
    kit = Kit(tmp_path / "outbox")
    assert kit.run.log_metric("loss", 1.0, step=1)
    home, filed = tmp_path / "home", kit.outbox.delivered / RUN
    for folder in (home, filed):
        folder.mkdir(0o700)
    for name in ("0" * 64, "notes.txt"):
        (home / name).write_text("mine")
    (filed / "files").symlink_to(home)
    with contextlib.closing(Ledger.open(kit.outbox.ledger)) as ledger:
        ledger.commit(RunRecord(RUN, remote_id=RUN))
        assert [] == filed_parts(kit.outbox, ledger)
    with pytest.raises(OSError, match="symbolic link"):
        bring_back(kit.outbox, RUN)
    assert ["0" * 64, "notes.txt"] == sorted(path.name for path in home.iterdir())


def test_a_run_is_not_filed_while_a_file_is_logged_to_it(tmp_path: Path) -> None:
    """Its event comes next; a draft is left alone until its writer is gone."""
    kit = Kit(tmp_path / "outbox")
    kit.run.log_text("before", "before.txt")
    kit.run.end()
    store = SnapshotStore(kit.outbox.run(RUN))
    delivered = RunReader(kit.outbox.run(RUN)).window({}).cursors
    with contextlib.closing(Ledger.open(tmp_path / "ledger")) as ledger:
        with store.held():
            draft = store.path / ".draft-0"
            draft.touch()
            assert not file_run(kit.outbox, ledger, RUN, delivered, Counters())
            assert draft.exists()
        assert file_run(kit.outbox, ledger, RUN, delivered, Counters())
    assert [] == kit.outbox.run_ids()
    assert 1 == len(list((kit.outbox.delivered / RUN / "files").iterdir()))


def test_a_file_that_is_logged_after_the_end_is_kept_while_its_run_is_filed(tmp_path: Path) -> None:
    """As an autopilot session logs its plots after its summary: nothing is refused, and no event lacks its file."""
    kit = Kit(tmp_path / "outbox")
    opened, ended = threading.Event(), threading.Event()

    def file() -> None:
        with contextlib.closing(Ledger.open(tmp_path / "ledger")) as ledger:
            opened.set()
            while not ended.is_set():
                with contextlib.suppress(FileNotFoundError):
                    delivered = RunReader(kit.outbox.run(RUN)).window({}).cursors
                    file_run(kit.outbox, ledger, RUN, delivered, Counters())

    with ThreadPoolExecutor() as pool:
        filing = pool.submit(file)
        assert opened.wait(60)  # which a slow disk makes longer than all that follows
        try:
            for number in range(200):
                assert kit.run.log_text(str(number), f"{number}.txt"), kit.counters.snapshot()
                kit.run.end()
                if number == 100:
                    assert eventually(kit.outbox.delivered_ids)
        finally:
            ended.set()
        filing.result()
    reader = RunReader(kit.outbox.run(RUN), kit.outbox.delivered / RUN)
    named = [event.sha256 for _, event in reader.each(Artifact, {})]
    assert 200 == len(named) == sum(reader.file(digest).is_file() for digest in named)


def test_a_file_is_kept_that_is_logged_while_thousands_are_filed_slowly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rename takes its time on a file system of the network: all of them together longer than a call waits."""
    kit = Kit(tmp_path / "outbox")
    for number in range(60):
        kit.run.log_text(str(number), f"{number}.txt")
    kit.run.end()
    delivered = RunReader(kit.outbox.run(RUN)).window({}).cursors
    rename = os.rename

    def slow(source: Path, target: Path) -> None:
        time.sleep(0.05)
        rename(source, target)

    def file() -> bool:
        with contextlib.closing(Ledger.open(tmp_path / "ledger")) as ledger:
            return file_run(kit.outbox, ledger, RUN, delivered, Counters())

    monkeypatch.setattr(snapshot, "_PATIENCE", 1.0)
    monkeypatch.setattr(retention, "_HELD", 0.1)
    with ThreadPoolExecutor() as pool, monkeypatch.context() as patch:
        patch.setattr(os, "rename", slow)
        filing = pool.submit(file)
        assert eventually((kit.outbox.delivered / RUN / "files").exists)
        assert kit.run.log_text("later", "later.txt"), kit.counters.snapshot()
        assert not filing.result()
    kit.run.end()
    delivered = RunReader(kit.outbox.run(RUN)).window({}).cursors
    assert file()
    assert 61 == len(list((kit.outbox.delivered / RUN / "files").iterdir()))


def test_a_copy_that_was_filed_before_the_ledger_was_lost_is_found(
    sqlite_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """A worker killed while filing has moved the files and not the segments; without its ledger all is sent again."""
    offline = MLflowTracker(experiment_name, sqlite_uri, outbox_dir=tmp_path / "o", worker="none", settings=QUICK)
    with offline.start_run("filed in part") as run:
        run.log_text("content", "notes.txt")
    assert offline.outbox_path is not None
    filed = offline.outbox_path / "delivered" / run.run_id
    filed.mkdir(mode=0o700)
    (offline.outbox_path / "runs" / run.run_id / "files").rename(filed / "files")
    with MLflowTracker(experiment_name, sqlite_uri, outbox_dir=tmp_path / "o", settings=QUICK) as tracker:
        result = tracker.flush(60)
    assert (0, 0, 0) == (result.pending, result.parked, result.dead)
    assert "content" == artifact_text(sqlite_uri, the_run(sqlite_uri, experiment_name).info.run_id, "notes.txt")


class Rewritten:
    """A run whose first segment could not be synced: its events lie in segment 2 too, which is read before segment 1.

    Attributes:
        folder: its directory.
        logged: how many metrics were acknowledged.
    """

    def __init__(self, outbox: OutboxDirectory) -> None:
        disk = FailingDisk()
        self.journal = make_journal(outbox, disk, segment_bytes=4096)
        self.folder = outbox.run(RUN)
        self.logged = 0
        self.journal.append(RunStarted(1_700_000_000_000, "r", "me", {}, False))
        self.log(20)
        with disk.held("datasync", error=errno.EIO) as entered:
            background = threading.Thread(target=self.journal.sync)
            background.start()
            assert entered.wait(30)
            while len(list(self.folder.glob("*.log"))) < 2:
                self.log(1)
        background.join(30)
        self.log(15)
        assert 3 == len(list(self.folder.glob("*.log")))

    def log(self, number: int) -> None:
        """Log some metrics."""
        for step in range(self.logged, self.logged + number):
            assert self.journal.append(metric(step))
        self.logged += number

    def end(self) -> None:
        """End the run in order."""
        self.journal.append(RunEnded("FINISHED", 1_700_000_100_000))
        self.journal.close()
        self.journal.sync()

    def lose_power(self) -> None:
        """Take what was never synced, and leave the rest to a worker of the next boot."""
        self.journal.sync()
        first = next(self.folder.glob("*-000000.log"))
        os.truncate(first, frame.unpack_header(first.read_bytes())[1])
        self.journal.close()


def steps(uri: str) -> list[int]:
    """Return the steps of the only run's metric in MLflow, each as often as it is there."""
    return sorted(step for step, _ in points(uri, the_run(uri, "exp").info.run_id, "loss").elements())


class TestEventsThatWereWrittenAgain:
    """After a failed sync they lie in a segment of a later ordinal, and are read before those that came after them."""

    def test_they_arrive_after_a_power_cut_and_are_not_filed_unread(
        self, sqlite_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A turn of the worker ends within them; segment 1, which has a lower ordinal, is still to be read."""
        monkeypatch.setattr(upkeep, "_FILE", 0.0)
        outbox = OutboxDirectory.create(tmp_path / "outbox", resolve(sqlite_uri), now_ms=1)
        run = Rewritten(outbox)
        run.lose_power()
        with delivering(outbox, sqlite_uri, Settings(batch_points=5, poll_interval=0.02)) as counters:
            eventually(lambda: counters["delivered"] >= run.logged, 60)
            eventually(lambda: 1 == len(list(run.folder.glob("*.log"))), 60, "what was read is filed")
        assert list(range(run.logged)) == steps(sqlite_uri)
        assert 0 == counters["missing"]

    def test_a_run_with_such_a_segment_is_filed(self, sqlite_uri: str, tmp_path: Path) -> None:
        """So it is reclaimed in time, as any other."""
        outbox = OutboxDirectory.create(tmp_path / "outbox", resolve(sqlite_uri), now_ms=1)
        run = Rewritten(outbox)
        run.end()
        with delivering(outbox, sqlite_uri, QUICK) as counters:
            eventually(lambda: not run.folder.exists(), 60)
        assert list(range(run.logged)) == steps(sqlite_uri)
        assert (1, 0) == (counters["runs_verified"], counters["missing"])


class Segments:
    """A run's segments of one writer that is gone, and a ledger for filing them; nothing is sent."""

    def __init__(self, path: Path) -> None:
        self.outbox = OutboxDirectory.create(path / "outbox", resolve("http://127.0.0.1:9"), now_ms=0)
        self.folder = self.outbox.run(RUN)
        self._ledger = path / "ledger"

    def write(self, ordinal: int, first: int, number: int) -> Path:
        """Write a segment of so many events, the first of which has a number."""
        head = header(ordinal=ordinal, first_seq=first & frame.SEQUENCE_MASK)
        frames = [packed([metric(first + at)], head, (first + at) & frame.SEQUENCE_MASK)[0] for at in range(number)]
        path = write_segment(self.folder, head, frames)
        os.utime(path, (1, 1))
        return path

    def read(self, points: int = 1000) -> Window:
        """Read from the beginning, so many points at most."""
        return RunReader(self.folder).window({}, points=points)

    def passed(self, cursors: dict[str, Cursor]) -> list[Path]:
        """Return the segments that the cursors have passed."""
        return passed_segments(RunReader(self.folder), cursors)

    def file(self, cursors: dict[str, Cursor]) -> bool:
        """File the run."""
        with contextlib.closing(Ledger.open(self._ledger)) as ledger:
            return file_run(self.outbox, ledger, RUN, cursors, Counters())


@pytest.fixture
def segments(tmp_path: Path) -> Segments:
    """A run without a segment yet."""
    return Segments(tmp_path)


@pytest.mark.parametrize("error", [errno.EDQUOT, errno.ENOSPC])
def test_what_is_delivered_is_deleted_where_there_is_no_name_left_to_file_it_under(
    error: int, segments: Segments, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clusters limit the files of a user, and the disk has terabytes free: what it holds would never give way."""
    mkdir = os.mkdir

    def full(path: Path, mode: int = 0o777) -> None:  # a quota is nothing that a test can set
        if segments.outbox.delivered in Path(path).parents:
            raise OSError(error, os.strerror(error), str(path))
        mkdir(path, mode)

    segments.write(0, 0, 5)
    cursors = segments.read().cursors
    monkeypatch.setattr(os, "mkdir", full)
    assert segments.file(cursors)
    assert ([], []) == (segments.outbox.run_ids(), segments.outbox.delivered_ids())


class TestPlaceInReadingOrder:
    """What was passed is told by where a segment is read, not by what its file is called."""

    def test_numbers_that_wrap_do_not_turn_the_order_round(self, segments: Segments) -> None:
        """The later segment's first number is the smaller one."""
        first = segments.write(0, (1 << 32) - 5, 5)
        segments.write(1, 1 << 32, 5)
        window = segments.read()
        assert (10, 0) == (len(window.events), window.missing)
        assert [first] == segments.passed(window.cursors)
        assert segments.file(window.cursors)

    def test_a_segment_written_again_of_which_only_the_header_is_left_is_passed_in_its_place(
        self, segments: Segments
    ) -> None:
        """What it held is missing, which is counted; then the run can be filed."""
        first, torn = segments.write(0, 0, 5), segments.write(2, 5, 0)
        segments.write(1, 9, 5)
        part, window = segments.read(points=5), segments.read()
        assert [] == segments.passed(part.cursors)
        assert (4, 10) == (window.missing, len(window.events))
        assert [first, torn] == segments.passed(window.cursors)
        assert segments.file(window.cursors)

    def test_an_empty_segment_at_the_end_does_not_keep_a_run_from_being_filed(self, segments: Segments) -> None:
        """Its writer was killed between the header and the first event."""
        first = segments.write(0, 0, 5)
        segments.write(1, 5, 0)
        window = segments.read()
        assert [first] == segments.passed(window.cursors)
        assert window.cursors == RunReader(segments.folder).window(window.cursors).cursors
        assert segments.file(window.cursors)
        assert not segments.folder.exists()

    def test_a_kill_between_the_moves_leaves_a_run_that_is_filed_the_next_time(self, segments: Segments) -> None:
        """The first segments in reading order are moved already."""
        moved = [segments.write(0, 0, 5), segments.write(2, 3, 2)]
        segments.write(1, 5, 5)
        window = segments.read()
        target = segments.outbox.delivered / RUN
        target.mkdir(mode=0o700)
        for path in moved:
            path.rename(target / path.name)
        again = RunReader(segments.folder).window(window.cursors)
        assert ([], 0, window.cursors) == (again.events, again.missing, again.cursors)
        assert segments.file(window.cursors)

    def test_nothing_is_passed_while_the_segment_that_was_read_last_is_not_there(self, segments: Segments) -> None:
        """What is left is read once more, and what was sent of it is told by its numbers."""
        first, last = segments.write(0, 0, 5), segments.write(1, 5, 5)
        cursors = segments.read(points=7).cursors
        last.unlink()
        segments.write(2, 5, 5)
        assert [] == segments.passed(cursors)
        assert not segments.file(cursors)
        window = RunReader(segments.folder).window(cursors)
        assert ([7.0, 8.0, 9.0], 0) == ([event.value for _, event in window.events], window.missing)
        assert [first] == segments.passed(window.cursors)
