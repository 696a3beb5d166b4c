"""The ledger under damage, locks and full disks: fault rows F30 to F34."""

from __future__ import annotations

import os
import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from ledgers import FILES, assert_one_of_the_past, assert_set_aside, assert_works, copy, edit, record, run
from mlflow_outbox.errors import LedgerUnavailable
from mlflow_outbox_worker.ledger import Ledger, LedgerCorrupt


class TestLocked:
    """F30: another process holds the database."""

    @pytest.fixture
    def holder(self, directory: Path) -> Iterator[sqlite3.Connection]:
        """Another connection that holds the write lock of an existing ledger."""
        Ledger.open(directory).close()
        other = sqlite3.connect(directory / "cache.db", isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        yield other
        other.close()

    def test_writing_gives_up_in_time_without_a_busy_loop(self, directory: Path, holder: sqlite3.Connection) -> None:
        """The call says "locked" after its time-out, uses hardly any processor, and works once the lock is gone."""
        holder.execute("ROLLBACK")
        ledger = Ledger.open(directory, timeout=0.6)
        holder.execute("BEGIN EXCLUSIVE")
        for write in (
            lambda: ledger.commit(record("a")),
            lambda: ledger.set_meta("m", b""),
            lambda: ledger.forget("a"),
        ):
            started, used = time.monotonic(), time.thread_time()
            with pytest.raises(LedgerUnavailable, match="locked") as caught:
                write()
            assert 0.5 < time.monotonic() - started < 3
            assert 0.1 > time.thread_time() - used
            assert not isinstance(caught.value, LedgerCorrupt)
        assert ledger.record("a") is None
        holder.execute("ROLLBACK")
        assert_works(ledger)
        ledger.close()

    def test_opening_gives_up_in_time(self, directory: Path, holder: sqlite3.Connection) -> None:
        """Diskcache itself would try for a minute at each of its statements."""
        started = time.monotonic()
        with pytest.raises(LedgerUnavailable, match="locked"):
            Ledger.open(directory, timeout=0.3, report=pytest.fail)
        assert 3 > time.monotonic() - started
        holder.execute("ROLLBACK")
        Ledger.open(directory, timeout=0.3, report=pytest.fail).close()

    def test_a_thread_does_not_wait_for_another_one_without_a_bound(
        self, directory: Path, holder: sqlite3.Connection
    ) -> None:
        """While one thread waits for the lock, another one's call ends in time, too."""
        output = run(
            """
import sqlite3, time
ledger = Ledger.open(directory, timeout=0.5)
ledger._source._lock.acquire()
def call():
    start = time.monotonic()
    try:
        ledger.record("a")
    except LedgerUnavailable as error:
        print("another thread" in str(error), 0.4 < time.monotonic() - start < 3)
thread = threading.Thread(target=call)
thread.start()
thread.join()
""",
            _unlocked(holder, directory),
        )
        assert "True True\n" == output


def _unlocked(holder: sqlite3.Connection, directory: Path) -> Path:
    holder.execute("ROLLBACK")
    return directory


class TestDamagedFile:
    """F31: whatever the main file has become, the ledger opens, nothing is deleted, and nothing false is believed."""

    @pytest.mark.parametrize(
        "content",
        [b"SQLite format 3\x00", b"garbage" * 1000, b"\x00" * 8192, b"x"],
        ids=["short", "garbage", "zeros", "byte"],
    )
    def test_a_file_that_is_no_database_is_set_aside(self, directory: Path, content: bytes) -> None:
        """The bytes are kept under another name."""
        directory.mkdir(0o700)
        (directory / "cache.db").write_bytes(content)
        assert_set_aside(directory).close()
        assert content == (directory / "cache.db.corrupt-1").read_bytes()

    def test_a_directory_in_its_place_is_set_aside(self, directory: Path) -> None:
        """It is renamed with what is in it."""
        (directory / "cache.db" / "inside").mkdir(parents=True)
        directory.chmod(0o700)
        assert_set_aside(directory).close()
        assert ["inside"] == os.listdir(directory / "cache.db.corrupt-1")

    def test_an_empty_file_is_reported_and_used(self, directory: Path) -> None:
        """There is nothing to keep; a full disk that refuses the first write does not leave file after file."""
        directory.mkdir(0o700)
        (directory / "cache.db").touch(0o600)
        reports: list[str] = []
        ledger = Ledger.open(directory, report=reports.append)
        assert ["was empty"] == [words for words in ("was empty",) if words in "".join(reports)]
        assert_works(ledger)
        ledger.close()
        assert ["cache.db", "reserve"] == sorted(os.listdir(directory))

    def test_an_emptied_file_keeps_its_log(self, crashed: Path, directory: Path) -> None:
        """SQLite would delete the log of an empty database; it is set aside first."""
        copy(crashed, directory)
        log = (directory / "cache.db-wal").read_bytes()
        os.truncate(directory / "cache.db", 0)
        assert_set_aside(directory).close()
        assert log == (directory / "cache.db.corrupt-1-wal").read_bytes()

    def test_a_log_without_a_database_is_kept(self, crashed: Path, directory: Path) -> None:
        """It is not taken for the log of the new database."""
        copy(crashed, directory)
        log = (directory / "cache.db-wal").read_bytes()
        (directory / "cache.db").unlink()
        assert_set_aside(directory).close()
        assert log == (directory / "cache.db.corrupt-1-wal").read_bytes()

    def test_files_set_aside_are_numbered(self, directory: Path) -> None:
        """Nothing that was set aside is ever replaced."""
        directory.mkdir(0o700)
        for number in (1, 2, 3):
            (directory / "cache.db").write_bytes(b"garbage %d" % number)
            assert_set_aside(directory, number).close()
        assert b"garbage 1" == (directory / "cache.db.corrupt-1").read_bytes()
        assert b"garbage 3" == (directory / "cache.db.corrupt-3").read_bytes()

    def test_what_was_set_aside_can_be_opened_by_sqlite(self, crashed: Path, directory: Path) -> None:
        """Database and log are renamed together, so that a person can look for dead letters."""
        copy(crashed, directory)
        edit(directory, "CREATE TABLE foreign_table(x)")
        assert_set_aside(directory).close()
        connection = sqlite3.connect(directory / "cache.db.corrupt-1")
        assert [(30,)] == connection.execute("SELECT count(*) FROM Cache WHERE key GLOB 'dead/*'").fetchall()
        connection.close()

    def test_an_index_older_than_its_table_is_damage(self, directory: Path) -> None:
        """A checkpoint was cut off in the middle and the log lost: each page is whole, but rows are not found."""
        ledger = Ledger.open(directory)
        ledger.commit(record("a", 1))
        assert ledger.checkpoint()
        path = directory / "cache.db"
        before = path.read_bytes()
        for number in range(3):
            ledger.commit(record(f"later{number}", 1))
        assert ledger.checkpoint()
        ledger.close()
        with closing(sqlite3.connect(path)) as connection:
            [(root,)] = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'Cache_key_raw'").fetchall()
            [(size,)] = connection.execute("PRAGMA page_size").fetchall()
        torn = bytearray(path.read_bytes())
        torn[(root - 1) * size : root * size] = before[(root - 1) * size : root * size]
        path.write_bytes(torn)
        with closing(sqlite3.connect(path)) as connection:
            assert [("ok",)] == connection.execute("PRAGMA quick_check").fetchall()
        assert_set_aside(directory).close()

    def test_a_schema_in_which_a_bit_is_flipped_is_damage(self, clean: Path, directory: Path) -> None:
        """No check of SQLite's sees most of it; columns, triggers and keys would not be what they are taken for."""
        whole = (clean / "cache.db").read_bytes()
        begin, end = whole.index(b"CREATE "), whole.index(b"CREATE TABLE Settings")
        for place in range(begin, end, 17):
            copy(clean, directory)
            data = bytearray(whole)
            data[place] ^= 1 << (place % 8)
            (directory / "cache.db").write_bytes(data)
            assert_set_aside(directory).close()

    @pytest.mark.parametrize("bit", [0, 2, 3, 4, 5, 6, 7])
    def test_a_header_that_a_flipped_bit_has_made_read_only_is_damage(
        self, bit: int, clean: Path, directory: Path
    ) -> None:
        """SQLite says of it what it says of a file without the right to write, which would be waited for for ever."""
        copy(clean, directory)
        path = directory / "cache.db"
        data = bytearray(path.read_bytes())
        data[18] ^= 1 << bit
        path.write_bytes(data)
        assert_set_aside(directory).close()

    def test_damage_that_opening_does_not_see_is_believed_where_it_was_met(self, clean: Path, directory: Path) -> None:
        """In the first use, which is part of the opening, and in a later one: it is set aside, not tried for ever."""
        for statement in ("filename TO filenama", "access_count TO access_counu"):
            copy(clean, directory)
            edit(directory, f"ALTER TABLE Cache RENAME COLUMN {statement}")
            edit(directory, "PRAGMA user_version = 0")  # and so whole, as far as its opening can tell
            reports: list[str] = []
            ledger = Ledger.open(directory, report=reports.append)
            if not reports:
                with pytest.raises(LedgerCorrupt):
                    ledger.commit(record("a"))
                ledger.close()
                ledger = Ledger.open(directory, report=reports.append)
            assert 1 == len(reports)
            assert "cache.db.corrupt-1" in reports[0]
            assert_works(ledger)
            ledger.close()

    def test_damage_in_use_is_reported_and_repaired_by_opening_again(self, directory: Path) -> None:
        """The caller gets LedgerCorrupt, not a crash: with a memory map this would be SIGBUS."""
        output = run(
            """
import subprocess
ledger = Ledger.open(directory)
for index in range(3000):
    ledger.commit(RunRecord(f"{index:05d}", reason="x" * 1000))
assert ledger.checkpoint()
records = ledger.records()
next(records)
subprocess.run([sys.executable, "-c", "import os, sys; os.truncate(sys.argv[1], 40960)", directory / "cache.db"])
try:
    print(len(list(records)))
except LedgerCorrupt as error:
    print("malformed" in str(error))
ledger.close()
reports = []
ledger = Ledger.open(directory, report=reports.append)
ledger.commit(RunRecord("a"))
print(len(reports), ledger.record("a").run_id, (directory / "cache.db.corrupt-1").exists())
""",
            directory,
        )
        assert "True\n1 a True\n" == output

    def test_a_file_removed_in_use_is_made_again_by_opening_again(self, directory: Path) -> None:
        """SQLite alone would go on writing to the removed file."""
        ledger = Ledger.open(directory)
        for name in FILES:
            (directory / name).unlink()
        with pytest.raises(LedgerCorrupt, match="gone"):
            ledger.commit(record("a"))
        ledger.close()
        ledger = Ledger.open(directory, report=pytest.fail)
        assert_works(ledger)
        ledger.close()

    def test_a_file_that_was_moved_away_in_use_and_comes_back_is_used_again(self, directory: Path) -> None:
        """It was not there, which says nothing about what is in it."""
        ledger = Ledger.open(directory)
        ledger.commit(record("a", 1))
        away = directory.with_name("away")
        directory.rename(away)
        with pytest.raises(LedgerCorrupt, match="gone"):
            ledger.commit(record("a", 2))
        ledger.close()
        away.rename(directory)
        ledger = Ledger.open(directory, report=pytest.fail)
        assert record("a", 1) == ledger.record("a")
        assert_works(ledger)
        ledger.close()

    def test_tables_dropped_in_use_are_damage(self, directory: Path) -> None:
        """Waiting would not bring them back."""
        ledger = Ledger.open(directory)
        edit(directory, "DROP TABLE Cache")
        with pytest.raises(LedgerCorrupt):
            ledger.record("a")
        ledger.close()
        assert_set_aside(directory).close()


class TestDamagedLog:
    """F32: SQLite cuts a damaged log silently; the ledger may be older, but it is one that once was."""

    def test_an_intact_log_is_read_to_its_end(self, crashed: Path, directory: Path) -> None:
        """The control: nothing damaged, nothing lost."""
        copy(crashed, directory)
        reports: list[str] = []
        assert (30, []) == (assert_one_of_the_past(directory, reports), reports)

    @pytest.mark.parametrize("lost", [("-wal",), ("-shm",), ("-wal", "-shm")])
    def test_a_missing_log_or_index_takes_no_more_than_the_log(
        self, crashed: Path, directory: Path, lost: tuple[str, ...]
    ) -> None:
        """What was checkpointed is there; the index is only an index."""
        copy(crashed, directory)
        for suffix in lost:
            (directory / f"cache.db{suffix}").unlink()
        reports: list[str] = []
        assert (10 if "-wal" in lost else 30, []) == (assert_one_of_the_past(directory, reports), reports)

    def test_a_garbled_index_is_made_again(self, crashed: Path, directory: Path) -> None:
        """The -shm of a former life is not trusted."""
        copy(crashed, directory)
        (directory / "cache.db-shm").write_bytes(os.urandom(32768))
        reports: list[str] = []
        assert (30, []) == (assert_one_of_the_past(directory, reports), reports)

    def test_the_log_of_another_database_is_seen_or_harmless(self, crashed: Path, clean: Path, directory: Path) -> None:
        """The two do not fit together: set aside, or a state that one of them had."""
        copy(clean, directory)
        shutil.copy(crashed / "cache.db-wal", directory)
        reports: list[str] = []
        ledger = Ledger.open(directory, report=reports.append)
        for found in ledger.records():
            assert found.run_id == "a" or found == record(found.run_id, int(found.run_id), f"r{int(found.run_id)}")
        assert_works(ledger)
        ledger.close()
        assert len(reports) == (directory / "cache.db.corrupt-1").exists()


class TestDiskRefuses:
    """The disk is full or a file may not grow: an error to wait for, not to give up the ledger for."""

    def test_a_full_disk_is_reported_and_waited_for(self, directory: Path) -> None:
        """Under a limit of file sizes commits fail whole; when it is lifted they go on, in the same process."""
        output = run(
            """
import resource
ledger = Ledger.open(directory)
ledger.commit(RunRecord("a", delivered=1))
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
done = 1
while True:
    try:
        ledger.commit(RunRecord("a", delivered=done + 1, reason="x" * 3000))
    except LedgerCorrupt:
        raise
    except LedgerUnavailable as error:
        print("disk" in str(error))
        break
    done += 1
print(ledger.record("a").delivered == done)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
ledger.commit(RunRecord("a", delivered=-1))
print(ledger.record("a").delivered, ledger._source.query("PRAGMA integrity_check"))
""",
            directory,
        )
        assert "True\nTrue\n-1 [('ok',)]\n" == output

    def test_a_full_disk_at_the_making_leaves_no_litter(self, directory: Path) -> None:
        """However often it is tried, there is one file, and it is used once there is space."""
        output = run(
            """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
for attempt in range(3):
    try:
        Ledger.open(directory, report=sys.exit)
    except LedgerCorrupt:
        raise
    except LedgerUnavailable:
        print([name for name in os.listdir(directory) if "corrupt" in name])
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
ledger = Ledger.open(directory, report=lambda _: None)
ledger.commit(RunRecord("a"))
print(ledger.record("a").run_id)
""",
            directory,
        )
        assert "[]\n[]\n[]\na\n" == output
