"""The ledger under damage, locks, full disks and tampering: fault rows F30 to F36 and F90."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diskcache
import pytest

from ledgers import letter, record, run, view
from mlflow_outbox.errors import LedgerUnavailable, OutboxUnusable
from mlflow_outbox_worker import dbconnection
from mlflow_outbox_worker.ledger import Ledger, LedgerCorrupt

FILES = ("cache.db", "cache.db-wal", "cache.db-shm")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Where the ledger is; not made yet."""
    return tmp_path / "delivery"


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ledger of twenty runs that was closed: one file, no log."""
    directory = tmp_path_factory.mktemp("clean") / "delivery"
    ledger = Ledger.open(directory)
    for index in range(20):
        ledger.commit(record(f"{index:02d}", index, f"r{index}"), view=view(), dead=[letter(f"{index:02d}")])
    ledger.close()
    return directory


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ledger whose writer died after commits 1 to 10 were checkpointed and 11 to 30 were not."""
    directory = tmp_path_factory.mktemp("crashed") / "delivery"
    run(
        """
ledger = Ledger.open(directory)
for seq in range(1, 31):
    refused = DeadLetter("a", "", b"", str(seq), "", 400, 0)
    ledger.commit(RunRecord("a", cursors={"w": Cursor(0, 100 * seq, seq)}), dead=[refused])
    if seq == 10:
        ledger.checkpoint()
os._exit(0)
""",
        directory,
    )
    return directory


def copy(source: Path, target: Path) -> None:
    """Copy a ledger that nobody has open."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    target.chmod(0o700)


def edit(directory: Path, sql: str, *arguments: Any) -> None:
    """Change the database behind the ledger's back."""
    connection = sqlite3.connect(directory / "cache.db", isolation_level=None)
    connection.execute(sql, arguments)
    connection.close()


def assert_works(ledger: Ledger) -> None:
    """A repaired ledger takes new commits and reads them back."""
    ledger.commit(record("new", 1, "rn"), view=view(), dead=[letter("new")])
    assert record("new", 1, "rn") == ledger.record("new")
    assert 1 == len(list(ledger.dead_letters("new")))
    assert "new" in {found.run_id for found in ledger.records()}
    assert ledger.checkpoint()


def assert_set_aside(directory: Path, number: int = 1) -> Ledger:
    """Opening reports one thing, keeps the old file under its new name, and begins anew."""
    reports: list[str] = []
    ledger = Ledger.open(directory, report=reports.append)
    assert 1 == len(reports)
    assert f"cache.db.corrupt-{number}" in reports[0]
    assert [] == [*ledger.records(), *ledger.dead_letters()]
    assert_works(ledger)
    return ledger


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
            started, used = time.monotonic(), time.process_time()
            with pytest.raises(LedgerUnavailable, match="locked") as caught:
                write()
            assert 0.5 < time.monotonic() - started < 3
            assert 0.1 > time.process_time() - used
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

    @pytest.mark.parametrize("damage", ["zeroed", "cut", "random"])
    def test_damage_at_every_page_is_survived(self, clean: Path, directory: Path, damage: str) -> None:
        """Whichever page is zeroed, cut off or overwritten: records are as they were or gone, and the ledger works."""
        pages = os.path.getsize(clean / "cache.db") // 4096
        noise = random.Random(31)
        for page in range(pages):
            copy(clean, directory)
            path = directory / "cache.db"
            if damage == "cut":
                os.truncate(path, 4096 * page + 100)
            else:
                with path.open("r+b") as file:
                    file.seek(4096 * page)
                    file.write(bytes(4096) if damage == "zeroed" else noise.randbytes(4096))
            reports: list[str] = []
            ledger = Ledger.open(directory, report=reports.append)
            absent = 0
            for index in range(20):
                run_id = f"{index:02d}"
                found, seen = ledger.record(run_id), ledger.view(run_id)
                assert found in (None, record(run_id, index, f"r{index}"))
                assert seen in (None, view())
                absent += (found is None) + (seen is None)
            assert reports or absent == ledger.quarantined_rows
            assert len(reports) == (directory / "cache.db.corrupt-1").exists()
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

    def assert_one_of_the_past(self, directory: Path, reports: list[str]) -> int:
        """Return how far the reopened ledger has come."""
        ledger = Ledger.open(directory, report=reports.append)
        found = ledger.record("a")
        seq = 0 if found is None else found.cursors["w"].seq
        assert found is None or found.cursors["w"].offset == 100 * seq
        assert [str(index) for index in range(1, seq + 1)] == [x.reason for x in ledger.dead_letters()]
        assert_works(ledger)
        ledger.close()
        return seq

    def test_an_intact_log_is_read_to_its_end(self, crashed: Path, directory: Path) -> None:
        """The control: nothing damaged, nothing lost."""
        copy(crashed, directory)
        reports: list[str] = []
        assert (30, []) == (self.assert_one_of_the_past(directory, reports), reports)

    @pytest.mark.parametrize("lost", [("-wal",), ("-shm",), ("-wal", "-shm")])
    def test_a_missing_log_or_index_takes_no_more_than_the_log(
        self, crashed: Path, directory: Path, lost: tuple[str, ...]
    ) -> None:
        """What was checkpointed is there; the index is only an index."""
        copy(crashed, directory)
        for suffix in lost:
            (directory / f"cache.db{suffix}").unlink()
        reports: list[str] = []
        assert (10 if "-wal" in lost else 30, []) == (self.assert_one_of_the_past(directory, reports), reports)

    def test_a_flipped_bit_anywhere_in_the_log_gives_a_state_of_the_past(self, crashed: Path, directory: Path) -> None:
        """Sixty bits, spread over the log with a seed: never a state that was not committed."""
        noise = random.Random(32)
        size = os.path.getsize(crashed / "cache.db-wal")
        seen = set()
        for index in range(60):
            copy(crashed, directory)
            with (directory / "cache.db-wal").open("r+b") as file:
                file.seek(size * index // 60 + noise.randrange(size // 60))
                byte = file.read(1)[0]
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte ^ 1 << noise.randrange(8)]))
            (directory / "cache.db-shm").unlink()  # after a power cut there is none, and the log is read anew
            seen.add(self.assert_one_of_the_past(directory, []))
        assert seen <= {*range(10, 31)}
        assert len(seen) > 5

    def test_a_garbled_index_is_made_again(self, crashed: Path, directory: Path) -> None:
        """The -shm of a former life is not trusted."""
        copy(crashed, directory)
        (directory / "cache.db-shm").write_bytes(os.urandom(32768))
        reports: list[str] = []
        assert (30, []) == (self.assert_one_of_the_past(directory, reports), reports)

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


class TestSettings:
    """F35: a database with other settings would delete rows, keep files beside it, or worse."""

    def test_a_directory_made_with_diskcaches_defaults_is_set_aside(self, directory: Path) -> None:
        """Its rows are kept in the file set aside, and the new one does not evict."""
        directory.mkdir(0o700)
        cache = diskcache.Cache(str(directory), size_limit=200_000)
        cache.set("run/a", b"x")
        cache.close()
        ledger = assert_set_aside(directory)
        for index in range(100):
            ledger.commit(record(str(index)), view=view())
        assert 101 == len(list(ledger.records()))
        assert ("none", 0) == (ledger._source._cache.eviction_policy, ledger._source._cache.cull_limit)  # type: ignore[union-attr]
        ledger.close()

    @pytest.mark.parametrize(
        "sql",
        [
            "UPDATE Settings SET value = 'least-recently-stored' WHERE key = 'eviction_policy'",
            "UPDATE Settings SET value = 10 WHERE key = 'cull_limit'",
            "UPDATE Settings SET value = 67108864 WHERE key = 'sqlite_mmap_size'",
            "UPDATE Settings SET value = '0' WHERE key = 'cull_limit'",
            "DELETE FROM Settings WHERE key = 'cull_limit'",
            "INSERT INTO Settings VALUES ('sqlite_synchronous = 0; --', 1)",
            "INSERT INTO Settings VALUES ('disk_evil', 1)",
            "CREATE TRIGGER evil AFTER INSERT ON Cache BEGIN DELETE FROM Cache; END",
            "CREATE VIEW evil AS WITH RECURSIVE x(n) AS (SELECT 1 UNION ALL SELECT n FROM x) SELECT n FROM x",
            "DROP TRIGGER Settings_count_insert",
            "DROP TABLE Settings",
        ],
    )
    def test_any_other_setting_or_table_is_set_aside(self, clean: Path, directory: Path, sql: str) -> None:
        """Nothing of it reaches diskcache; a reader says that it is damaged and changes nothing."""
        copy(clean, directory)
        edit(directory, sql)
        with pytest.raises(LedgerCorrupt):
            Ledger.open(directory, read_only=True).record("00")
        assert ["cache.db", "reserve"] == sorted(os.listdir(directory))
        assert_set_aside(directory).close()

    def test_the_settings_in_force_are_those_written_here(self, directory: Path) -> None:
        """The same dictionary is what diskcache stored and what SQLite does."""
        ledger = Ledger.open(directory)
        stored = dict(ledger._source.query("SELECT key, value FROM Settings"))
        assert dbconnection.SETTINGS == {
            key: stored[key] for key in stored if key not in {"count", "size", "hits", "misses"}
        }
        for key, value in dbconnection.SETTINGS.items():
            if key.startswith("sqlite_"):
                assert [(value,)] == ledger._source.query(f"PRAGMA {key.removeprefix('sqlite_')}")
        ledger.close()


class Evil:
    """Unpickling it makes a file called ``executed``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (str(self.path), "w")


class TestTamperedRow:
    """F36: a row that the ledger would not write is moved out of the way, unread, and counted."""

    @pytest.fixture
    def victim(self, tmp_path: Path) -> Path:
        """A file outside the ledger's directory that no row may read or remove."""
        path = tmp_path / "victim"
        path.write_bytes(b"\x80")
        return path

    @pytest.mark.parametrize("when", ["before opening", "in use", "read-only"])
    @pytest.mark.parametrize(
        "change",
        [
            "mode = 4, value = :evil",
            "raw = 0, key = :evil",
            "raw = 0",
            "raw = NULL",
            "mode = 2, filename = '../victim', value = NULL",
            "mode = 3, filename = '../victim', value = NULL",
            "mode = 4, filename = '../victim', value = NULL",
            "filename = '../victim'",
            "value = 'text'",
            "value = 1",
            "value = NULL",
            "value = CAST(x'ff' AS TEXT)",
            "expire_time = 1.0",
            "expire_time = 1e300",
            "value = x''",
            "value = x'c1'",
            "value = x'80'",
            "value = (SELECT value FROM Cache WHERE key = 'run/b')",
        ],
    )
    def test_it_is_absent_and_counted(
        self, directory: Path, tmp_path: Path, victim: Path, change: str, when: str
    ) -> None:
        """Nothing is executed, nothing outside is read or removed, and the run's next commit goes through."""
        executed = tmp_path / "executed"
        ledger = Ledger.open(directory)
        ledger.commit(record("a", 1, "ra"))
        ledger.commit(record("b", 1, "rb"))
        if when == "before opening":
            ledger.close()
        values = {"evil": pickle.dumps(Evil(executed))}
        connection = sqlite3.connect(directory / "cache.db", isolation_level=None)
        connection.execute(f"UPDATE Cache SET {change} WHERE key = 'run/a'", values)
        connection.close()
        if when == "before opening":
            ledger = Ledger.open(directory, report=lambda _: None)
        reader = Ledger.open(directory, read_only=True) if when == "read-only" else ledger

        assert reader.record("a") is None
        assert ["b"] == [found.run_id for found in reader.records()]
        assert reader.record("a") is None
        moved_key = ":evil" in change and "key" in change and when != "before opening"  # no longer among the runs
        assert (0 if moved_key else 1) == reader.quarantined_rows
        ledger.commit(record("a", 2, "ra"))
        assert record("a", 2, "ra") == ledger.record("a")
        ledger.close()
        again = Ledger.open(directory)
        assert record("a", 2, "ra") == again.record("a")
        assert (
            when != "read-only" or (not change.startswith("value = x") and "SELECT" not in change)
        ) == again.quarantined_rows
        again.close()
        assert not executed.exists()
        assert b"\x80" == victim.read_bytes()

    def test_overwriting_and_removing_such_a_row_touches_no_file(self, directory: Path, victim: Path) -> None:
        """Diskcache removes the file of a row that it overwrites or deletes; here the row is moved first."""
        ledger = Ledger.open(directory)
        ledger.commit(record("a", 1, "ra"), view=view(), dead=[letter("a")])
        edit(directory, "UPDATE Cache SET filename = '../victim', mode = 2")
        assert not ledger.drop_dead_letter("000000000001")
        ledger.forget("a")
        ledger.commit(record("a", 2, "ra"), view=view(), dead=[letter("a")])
        ledger.set_meta("m", b"1")
        assert record("a", 2, "ra") == ledger.record("a")
        assert ["000000000002"] == [found.id for found in ledger.dead_letters()]
        assert 5 == ledger.quarantined_rows
        assert victim.exists()
        ledger.close()

    def test_what_it_was_is_kept_for_a_person(self, directory: Path) -> None:
        """The quarantined row has the value, and its former columns in words."""
        ledger = Ledger.open(directory)
        ledger.commit(record("a"))
        edit(directory, "UPDATE Cache SET mode = 4, value = 'v' WHERE key = 'run/a'")
        assert ledger.record("a") is None
        ((tag, value),) = ledger._source.query("SELECT tag, value FROM Cache WHERE key GLOB 'bad/*'")
        assert "key='run/a' raw=1 mode=4 filename=NULL expire_time=NULL type=text" == tag
        assert b"v" == value
        ledger.close()

    def test_a_bad_dead_letter_view_or_map_is_absent(self, directory: Path) -> None:
        """Each kind of row is judged, not only records."""
        ledger = Ledger.open(directory)
        ledger.commit(record("a", 1, "ra"), view=view(), dead=[letter("a"), letter("a", "second")])
        ledger.set_meta("m", b"1")
        edit(directory, "UPDATE Cache SET value = x'ff' WHERE key IN ('view/a', 'remote/ra', 'dead/000000000001')")
        edit(directory, "UPDATE Cache SET value = 1 WHERE key = 'meta/m'")
        assert (None, None, None) == (ledger.view("a"), ledger.local_id("ra"), ledger.meta("m"))
        assert ["second"] == [found.reason for found in ledger.dead_letters()]
        assert 4 == ledger.quarantined_rows
        ledger.commit(record("a", 2, "ra"))
        assert "a" == ledger.local_id("ra")
        ledger.close()

    def test_a_key_that_is_no_text_does_not_stop_a_scan(self, directory: Path) -> None:
        """Invalid UTF-8 in a key is quarantined like any other row."""
        ledger = Ledger.open(directory)
        for index in range(3):
            ledger.commit(record(str(index)))
        edit(directory, "UPDATE Cache SET key = CAST(x'72756e2fff' AS TEXT) WHERE key = 'run/1'")
        assert ["0", "2"] == [found.run_id for found in ledger.records()]
        assert 1 == ledger.quarantined_rows
        ledger.close()


class TestUnsafeFiles:
    """F90: files that somebody else could have put there are refused, with the reason, and left as they are."""

    @pytest.mark.parametrize("read_only", [False, True])
    @pytest.mark.parametrize("name", FILES)
    @pytest.mark.parametrize("kind", ["symbolic link", "hard link", "pipe", "dangling link"])
    def test_a_link_or_pipe_in_place_of_a_file_is_refused(
        self, clean: Path, directory: Path, tmp_path: Path, *, kind: str, name: str, read_only: bool
    ) -> None:
        """Nothing is opened through it, and opening does not hang."""
        copy(clean, directory)
        elsewhere = tmp_path / "elsewhere"
        path = directory / name
        path.unlink(missing_ok=True)
        if kind == "pipe":
            os.mkfifo(path)
        else:
            if kind != "dangling link":
                elsewhere.write_bytes(b"precious")
            (os.link if kind == "hard link" else os.symlink)(elsewhere, path)
        with pytest.raises(OutboxUnusable, match="left untouched"):
            Ledger.open(directory, read_only=read_only, report=pytest.fail).record("00")
        assert os.path.lexists(path)
        assert kind in {"pipe", "dangling link"} or b"precious" == elsewhere.read_bytes()
        assert kind != "dangling link" or not elsewhere.exists()

    @pytest.mark.parametrize("read_only", [False, True])
    @pytest.mark.parametrize("mode", [0o755, 0o701, 0o720, 0o777])
    def test_a_directory_open_to_others_is_refused(self, directory: Path, mode: int, *, read_only: bool) -> None:
        """The message names the mode."""
        directory.mkdir()
        directory.chmod(mode)
        (directory / "cache.db").touch(0o600)
        with pytest.raises(OutboxUnusable, match=f"{mode:04o}"):
            Ledger.open(directory, read_only=read_only).record("a")
        assert 0 == os.lstat(directory / "cache.db").st_size

    @pytest.mark.parametrize("target", ["directory", "file", "nothing"])
    def test_a_directory_that_is_a_link_or_a_file_is_refused(
        self, clean: Path, directory: Path, tmp_path: Path, target: str
    ) -> None:
        """Also when what it leads to would be fine."""
        if target == "directory":
            directory.symlink_to(clean)
        elif target == "nothing":
            directory.symlink_to(tmp_path / "nothing")
        else:
            directory.write_bytes(b"")
        for read_only in (False, True):
            with pytest.raises(OutboxUnusable):
                Ledger.open(directory, read_only=read_only).record("00")
        assert not (tmp_path / "nothing").exists()

    @pytest.mark.parametrize("what", ["directory", "database"])
    def test_files_of_another_user_are_refused(
        self, clean: Path, directory: Path, monkeypatch: pytest.MonkeyPatch, what: str
    ) -> None:
        """The check is on the owner, not on whether we could open it."""
        copy(clean, directory)
        owners = iter([os.geteuid()] if what == "database" else [])
        ours = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: next(owners, ours + 1))
        with pytest.raises(OutboxUnusable, match="belongs to user"):
            Ledger.open(directory)

    def test_a_place_where_no_directory_can_be_made_is_refused(self, tmp_path: Path) -> None:
        """A file in the way is no passing trouble."""
        (tmp_path / "file").touch()
        with pytest.raises(OutboxUnusable):
            Ledger.open(tmp_path / "file" / "delivery")

    def test_a_link_put_there_while_the_ledger_is_in_use_is_refused(self, directory: Path, tmp_path: Path) -> None:
        """A connection that has to be opened anew checks again."""
        ledger = Ledger.open(directory)
        ledger.commit(record("a"))
        with pytest.raises(TypeError):
            ledger.set_meta("m", "no bytes")  # type: ignore[arg-type]
        shutil.move(directory / "cache.db", tmp_path / "moved")
        (directory / "cache.db").symlink_to(tmp_path / "moved")
        with pytest.raises(OutboxUnusable, match="symbolic link"):
            ledger.commit(record("a"))
        ledger.close()
