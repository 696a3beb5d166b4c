"""The ledger: what it keeps, what one transaction covers, who may use it at the same time."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ledgers import letter, open_descriptors, record, run, script, view
from mlflow_outbox.errors import LedgerUnavailable, OutboxError
from mlflow_outbox_worker.database import Database
from mlflow_outbox_worker.ledger import Ledger
from mlflow_outbox_worker.rows import put


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Where the ledger is; not made yet."""
    return tmp_path / "delivery"


@pytest.fixture
def ledger(directory: Path) -> Iterator[Ledger]:
    """A new ledger that must report nothing."""
    opened = Ledger.open(directory, timeout=5, report=pytest.fail)
    yield opened
    opened.close()


def test_what_was_committed_is_read_back_after_reopening(directory: Path) -> None:
    """Record, view, dead letters, reverse map and meta are all kept."""
    first = Ledger.open(directory, report=pytest.fail)
    letters = [letter("a"), letter("a", "again")]
    first.commit(record("a", 7, "ra"), view=view(), dead=letters)
    first.set_meta("since", b"1")
    first.close()

    second = Ledger.open(directory, report=pytest.fail)
    assert record("a", 7, "ra") == second.record("a")
    assert view() == second.view("a")
    assert letters == list(second.dead_letters("a"))
    assert "a" == second.local_id("ra")
    assert b"1" == second.meta("since")
    assert 0 == second.quarantined_rows
    second.close()


def test_what_is_not_there_is_none(ledger: Ledger) -> None:
    """Nothing is made up for an unknown run, id or name."""
    assert [None] * 5 == [
        ledger.record("a"),
        ledger.view("a"),
        ledger.local_id("r"),
        ledger.dead_letter("000000000001"),
        ledger.meta("m"),
    ]
    assert [] == [*ledger.records(), *ledger.dead_letters(), *ledger.dead_letters("a")]


def test_a_commit_without_a_view_leaves_the_view_as_it_is(ledger: Ledger) -> None:
    """The view is only replaced by a view."""
    ledger.commit(record("a", 1), view=view())
    ledger.commit(record("a", 2))
    assert view() == ledger.view("a")
    assert record("a", 2) == ledger.record("a")


def test_a_commit_that_fails_changes_nothing(ledger: Ledger) -> None:
    """A full database refuses the last row of a commit: the first ones are not there, and the letters have no id."""
    ledger.commit(record("a", 1, "ra"))
    with _database(ledger).guarded() as cache:
        ((pages,),) = cache.query("PRAGMA page_count")
        cache.query(f"PRAGMA max_page_count = {pages + 2}")
    big = letter("a", "x" * 100_000)
    with pytest.raises(LedgerUnavailable, match="full"):
        ledger.commit(record("a", 2, "rb"), view=view(), dead=[letter("a"), big])
    assert record("a", 1, "ra") == ledger.record("a")
    assert ledger.view("a") is None
    assert ("a", None) == (ledger.local_id("ra"), ledger.local_id("rb"))
    assert [] == list(ledger.dead_letters())
    assert "" == big.id

    ledger.commit(record("a", 2, "rb"), view=view(), dead=[letter("a"), big])
    assert record("a", 2, "rb") == ledger.record("a")
    assert 2 == len(list(ledger.dead_letters()))


def test_records_come_in_order_and_with_few_statements(ledger: Ledger) -> None:
    """Ten thousand runs are one scan of the index and twenty reads, not ten thousand."""
    for index in range(10_000):
        ledger.commit(record(f"{index:05d}", index))
    ledger.commit(record("00000", 0), view=view())
    statements: list[str] = []
    with _database(ledger).guarded() as cache:
        cache._con.set_trace_callback(statements.append)
    assert [f"{index:05d}" for index in range(10_000)] == [found.run_id for found in ledger.records()]
    assert 21 == len(statements)


def test_a_run_forgotten_while_records_are_read_is_left_out(ledger: Ledger) -> None:
    """Reading in pages goes on beside writing."""
    for index in range(1_200):
        ledger.commit(record(f"{index:05d}"))
    found = ledger.records()
    assert "00000" == next(found).run_id
    ledger.forget("01100")
    ledger.commit(record("02000"))
    assert 1_198 == sum(1 for _ in found)


def test_the_reverse_map_follows_the_record(ledger: Ledger) -> None:
    """A run created again in MLflow is found by its new id only."""
    ledger.commit(record("a", 1, "r1"))
    ledger.commit(record("a", 2, "r2"))
    assert (None, "a") == (ledger.local_id("r1"), ledger.local_id("r2"))
    ledger.commit(record("a", 3))
    assert ledger.local_id("r2") is None


def test_a_remote_id_that_another_run_took_over_stays_with_it(ledger: Ledger) -> None:
    """Forgetting a run does not remove what leads to another one."""
    ledger.commit(record("a", 1, "r"))
    ledger.commit(record("b", 1, "r"))
    ledger.forget("a")
    assert "b" == ledger.local_id("r")


def test_forgetting_a_run_keeps_its_dead_letters(ledger: Ledger) -> None:
    """Record, view and reverse map go together; dead letters wait for a person."""
    ledger.commit(record("a", 1, "r"), view=view(), dead=[letter("a")])
    ledger.commit(record("b", 1, "s"))
    ledger.forget("a")
    ledger.forget("never seen")
    assert (None, None, None) == (ledger.record("a"), ledger.view("a"), ledger.local_id("r"))
    assert ["b"] == [found.run_id for found in ledger.records()]
    assert 1 == len(list(ledger.dead_letters("a")))


def test_dead_letters_are_numbered_once_and_for_all(ledger: Ledger) -> None:
    """Ids are in the order of storing, and the id of a dropped letter is not given again."""
    for index in range(40):
        ledger.commit(record("ab"[index % 2]), dead=[letter("ab"[index % 2], str(index))])
    assert [str(index) for index in range(40)] == [found.reason for found in ledger.dead_letters()]
    assert [str(index) for index in range(1, 40, 2)] == [found.reason for found in ledger.dead_letters("b")]
    last = list(ledger.dead_letters())[-1]
    assert ledger.drop_dead_letter(last.id)
    assert not ledger.drop_dead_letter(last.id)
    another = letter("a")
    ledger.commit(record("a"), dead=[another])
    assert another.id > last.id
    assert another == ledger.dead_letter(another.id)


def test_a_lost_counter_never_overwrites_a_dead_letter(ledger: Ledger) -> None:
    """Numbers in use are passed over, whatever the counter says."""
    ledger.commit(record("a"), dead=[letter("a", "1"), letter("a", "2")])
    for nonsense in (b"", b"-5", "text", 7):
        with _database(ledger).transaction() as cache:
            cache.query("UPDATE Cache SET value = ? WHERE key = 'next/dead'", (nonsense,))
        ledger.commit(record("a"), dead=[letter("a", "more")])
    assert ["1", "2", "more", "more", "more", "more"] == [found.reason for found in ledger.dead_letters()]


def test_a_dead_letter_is_replaced_only_if_it_is_there(ledger: Ledger) -> None:
    """Replacing keeps id, place and run."""
    first = letter("a")
    ledger.commit(record("a"), dead=[first, letter("a", "second")])
    first.reason = "still no"
    assert ledger.replace_dead_letter(first)
    assert ["still no", "second"] == [found.reason for found in ledger.dead_letters("a")]
    ledger.drop_dead_letter(first.id)
    assert not ledger.replace_dead_letter(first)
    assert ["second"] == [found.reason for found in ledger.dead_letters()]


def test_a_checkpoint_brings_everything_into_the_main_file(ledger: Ledger, directory: Path, tmp_path: Path) -> None:
    """After True the main file alone, without its log, holds every commit."""
    ledger.commit(record("a", 1), view=view())
    copy = tmp_path / "copy"
    copy.mkdir(0o700)
    assert ledger.checkpoint()
    # By another process: opening and closing the file in this one would drop SQLite's locks.
    subprocess.run(["cp", directory / "cache.db", copy], check=True)
    found = Ledger.open(copy, report=pytest.fail)
    assert record("a", 1) == found.record("a")
    found.close()


def test_a_checkpoint_says_when_a_reader_is_in_the_way(ledger: Ledger, directory: Path) -> None:
    """Commits behind a reader's snapshot are not in the main file, and nobody is told that they are."""
    ledger.commit(record("a", 1))
    reader = sqlite3.connect(directory / "cache.db", isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM Cache").fetchall()
    assert ledger.checkpoint()
    ledger.commit(record("a", 2))
    assert not ledger.checkpoint()
    reader.execute("ROLLBACK")
    assert ledger.checkpoint()
    reader.close()


def test_checkpoints_give_space_back(ledger: Ledger, directory: Path) -> None:
    """The file of an outbox whose runs were reclaimed does not stay large."""
    for index in range(300):
        ledger.commit(record(str(index)), view=view())
    assert ledger.checkpoint()
    large = os.lstat(directory / "cache.db").st_size
    for index in range(300):
        ledger.forget(str(index))
    assert ledger.checkpoint()
    assert large / 4 > os.lstat(directory / "cache.db").st_size


@pytest.mark.parametrize("name", ["$HOME", "~root", "~", "${PATH}", "a b%20#?;", "caf\udce9", "file:x"])
def test_a_directory_of_any_name_is_used_as_it_is(tmp_path: Path, name: str) -> None:
    """Nothing in a path is expanded, quoted or decoded."""
    opened = Ledger.open(Path(name), report=pytest.fail)  # relative to the working directory, which is tmp_path
    opened.commit(record("a"))
    assert opened.checkpoint()
    assert [os.fsencode(name)] == os.listdir(os.fsencode(tmp_path))
    assert record("a") == Ledger.open(tmp_path / name, read_only=True).record("a")
    opened.close()
    assert ["cache.db", "reserve"] == sorted(os.listdir(tmp_path / name))


def test_only_the_user_can_read_the_ledger(directory: Path) -> None:
    """Directory 0700, files 0600, however generous the umask."""
    output = run(
        """
os.umask(0)
ledger = Ledger.open(directory)
ledger.commit(RunRecord("a"))
print({path.name: oct(path.lstat().st_mode & 0o777) for path in [directory, *sorted(directory.iterdir())]})
""",
        directory,
    )
    names = ("cache.db", "cache.db-shm", "cache.db-wal", "reserve")
    files = {"delivery": "0o700", **dict.fromkeys(names, "0o600")}
    assert f"{files}\n" == output


def test_nothing_is_open_after_closing(directory: Path) -> None:
    """Closing gives back every descriptor, also those of other threads' use, and closing twice is harmless."""
    ledger = Ledger.open(directory)
    threads = [threading.Thread(target=ledger.commit, args=(record(str(index)),)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert open_descriptors(directory)
    ledger.close()
    ledger.close()
    assert [] == open_descriptors(directory)
    with pytest.raises(LedgerUnavailable, match="closed"):
        ledger.record("0")


def test_threads_commit_and_read_side_by_side(ledger: Ledger) -> None:
    """Eight threads write their runs and read all runs; nothing is lost and nobody fails."""
    failures: list[BaseException] = []

    def work(name: str) -> None:
        try:
            for seq in range(1, 51):
                ledger.commit(record(name, seq), view=view(), dead=[letter(name, str(seq))])
                assert record(name, seq) == ledger.record(name)
                assert all(found.cursors["w"].seq for found in ledger.records())
        except BaseException as error:  # noqa: BLE001 - the main thread asserts that there is none
            failures.append(error)

    threads = [threading.Thread(target=work, args=(f"run{index}",)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [] == failures
    assert 400 == len({found.id for found in ledger.dead_letters()})
    assert [50] * 8 == [found.cursors["w"].seq for found in ledger.records()]


def test_a_killed_process_loses_no_commit_that_had_returned(directory: Path) -> None:
    """F01: after SIGKILL the record is the last one acknowledged, or the next, with the letters of the same commit."""
    for round_ in range(5):
        with subprocess.Popen(
            script(
                """
ledger = Ledger.open(directory)
found = ledger.record("a")
seq = found.cursors["w"].seq if found else 0
while True:
    seq += 1
    refused = DeadLetter("a", "", b"", str(seq), "", 400, 0)
    ledger.commit(RunRecord("a", cursors={"w": Cursor(0, 0, seq)}), dead=[refused])
    print(seq, flush=True)
""",
                directory,
            ),
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            for _ in range(20 + 7 * round_):
                acknowledged = int(process.stdout.readline())
            process.kill()
            acknowledged = max([acknowledged, *map(int, process.stdout.read().split())])
        ledger = Ledger.open(directory, report=pytest.fail)
        found = ledger.record("a")
        assert found is not None
        assert found.cursors["w"].seq in {acknowledged, acknowledged + 1}
        assert [str(seq) for seq in range(1, found.cursors["w"].seq + 1)] == [x.reason for x in ledger.dead_letters()]
        ledger.close()


def test_a_process_killed_while_it_makes_the_ledger_leaves_one_that_opens(tmp_path: Path) -> None:
    """A kill at any statement of the making is repaired without a word, or with one when the file is empty."""
    for statement in range(1, 200, 7):
        directory = tmp_path / str(statement)
        done = subprocess.run(
            script(
                """
import sqlite3
from mlflow_outbox_worker import dbconnection
left = int(sys.argv[2])
def count(sql):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
connect = dbconnection.connect
def traced(*args):
    connection = connect(*args)
    connection.set_trace_callback(count)
    return connection
dbconnection.connect = traced
Ledger.open(directory)
""",
                directory,
                statement,
            ),
            check=False,
        )
        reports: list[str] = []
        ledger = Ledger.open(directory, report=reports.append)
        ledger.commit(record("a"))
        assert record("a") == ledger.record("a")
        ledger.close()
        assert ["cache.db", "reserve"] == sorted(os.listdir(directory))
        assert all(report.endswith("was empty; a new one is begun") for report in reports)
        if done.returncode == 0:
            break
    assert 0 == done.returncode
    assert 20 < statement


class TestReadingBesideAWriter:
    """``read_only`` is for the tracking process, while the worker process writes."""

    def test_no_ledger_reads_as_an_empty_one(self, directory: Path, tmp_path: Path) -> None:
        """Nothing is made, neither the directory nor the file."""
        reader = Ledger.open(directory, read_only=True)
        assert [] == [*reader.records(), *reader.dead_letters()]
        assert (None, None, 0) == (reader.record("a"), reader.local_id("r"), reader.quarantined_rows)
        assert [] == list(tmp_path.iterdir())
        directory.mkdir(0o700)
        assert reader.record("a") is None
        (directory / "cache.db").touch(0o600)
        assert reader.record("a") is None
        assert ["cache.db"] == os.listdir(directory)
        assert 0 == os.lstat(directory / "cache.db").st_size

    def test_each_commit_is_seen_at_once(self, directory: Path, ledger: Ledger) -> None:
        """A reader holds no old snapshot, also across checkpoints, closing and reopening."""
        reader = Ledger.open(directory, read_only=True)
        for seq in range(1, 30):
            ledger.commit(record("a", seq, "r"), view=view(), dead=[letter("a")])
            if seq % 3 == 0:
                assert ledger.checkpoint()
            assert record("a", seq, "r") == reader.record("a")
            assert [record("a", seq, "r")] == list(reader.records())
            assert seq == len(list(reader.dead_letters("a")))
        assert (view(), "a") == (reader.view("a"), reader.local_id("r"))

    def test_a_clean_ledger_is_read_without_making_files(self, directory: Path, ledger: Ledger) -> None:
        """No -wal or -shm is left behind by reading a database that nobody has open."""
        ledger.commit(record("a", 1))
        ledger.close()
        before = (directory / "cache.db").read_bytes()
        reader = Ledger.open(directory, read_only=True)
        assert record("a", 1) == reader.record("a")
        assert ["cache.db", "reserve"] == sorted(os.listdir(directory))
        assert before == (directory / "cache.db").read_bytes()

    def test_the_ledger_of_a_killed_worker_is_read_and_not_repaired(self, directory: Path) -> None:
        """Commits that are only in the -wal are seen, and the -wal stays for the worker to come."""
        # Held by a name: a connection that is let go of closes its database, which is the end of its -wal.
        run("ledger = Ledger.open(directory)\nledger.commit(RunRecord('a', reason='last'))\nos._exit(0)", directory)
        before = {path.name: path.read_bytes() for path in directory.iterdir()}
        assert {"cache.db", "cache.db-wal", "cache.db-shm", "reserve"} == set(before)
        found = Ledger.open(directory, read_only=True).record("a")
        assert found is not None
        assert "last" == found.reason
        assert before["cache.db"] == (directory / "cache.db").read_bytes()
        assert before["cache.db-wal"] == (directory / "cache.db-wal").read_bytes()

    def test_a_log_without_its_index_is_left_to_the_worker(self, directory: Path) -> None:
        """Reading it would mean making the index; the reader says that it cannot, and changes nothing."""
        run("ledger = Ledger.open(directory)\nledger.commit(RunRecord('a'))\nos._exit(0)", directory)
        (directory / "cache.db-shm").unlink()
        with pytest.raises(LedgerUnavailable, match="before the worker"):
            Ledger.open(directory, read_only=True).record("a")
        assert ["cache.db", "cache.db-wal", "reserve"] == sorted(os.listdir(directory))

    def test_a_locked_ledger_can_be_read_and_a_read_one_written(self, directory: Path, ledger: Ledger) -> None:
        """Neither waits for the other."""
        ledger.commit(record("a", 1))
        reader = Ledger.open(directory, read_only=True, timeout=0.0)
        records = reader.records()
        with _database(ledger).transaction() as cache:
            put(cache, "meta/x", b"1")
            assert record("a", 1) == reader.record("a") == next(records)
            assert reader.meta("x") is None
        assert b"1" == reader.meta("x")

    def test_it_refuses_to_write(self, directory: Path) -> None:
        """A caller that should not write is told so, and nothing is made."""
        reader = Ledger.open(directory, read_only=True)
        for write in (
            lambda: reader.commit(record("a")),
            lambda: reader.forget("a"),
            lambda: reader.set_meta("m", b""),
            lambda: reader.drop_dead_letter("1"),
            lambda: reader.replace_dead_letter(letter("a")),
            reader.checkpoint,
        ):
            with pytest.raises(OutboxError, match="read-only"):
                write()
        reader.close()
        assert not directory.exists()

    def test_it_keeps_reading_while_workers_come_and_go(self, directory: Path) -> None:
        """Opening, committing, checkpointing and closing in another process never fails a reader or turns time back."""
        with subprocess.Popen(
            script(
                """
for seq in range(1, 101):
    ledger = Ledger.open(directory)
    ledger.commit(RunRecord("a", cursors={"w": Cursor(0, 0, seq)}))
    ledger.checkpoint()
    ledger.close()
""",
                directory,
            )
        ) as process:
            reader = Ledger.open(directory, read_only=True)
            seen = 0
            while process.poll() is None:
                found = reader.record("a")
                if found is not None:
                    assert seen <= found.cursors["w"].seq
                    seen = found.cursors["w"].seq
        assert 0 == process.returncode
        assert 0 < seen
        assert record("a", 100).cursors["w"].seq == reader.record("a").cursors["w"].seq  # type: ignore[union-attr]


class TestFork:
    """F05: the experiment forks whenever it likes, with a worker thread in the middle of anything."""

    def test_a_child_has_a_connection_of_its_own(self, directory: Path) -> None:
        """Parent and child go on with the same object; both their commits are kept, whoever ends first and however."""
        for ending in ("os._exit(0)", "sys.exit(0)"):
            output = run(
                f"""
ledger = Ledger.open(directory, report=sys.exit)
ledger.commit(RunRecord("before"))
read, write = os.pipe()
inherited = ledger._source._cache._held
child = os.fork()
if child == 0:
    assert ledger.record("before") == RunRecord("before")
    assert ledger._source._cache._held is not inherited
    ledger.commit(RunRecord("child"))
    os.read(read, 1)
    ledger.commit(RunRecord("child later"))
    {ending}
ledger.commit(RunRecord("parent"))
assert ledger.checkpoint()
ledger.close()
os.write(write, b"x")
_, status = os.waitpid(child, 0)
assert status == 0, status
ledger = Ledger.open(directory, report=sys.exit)
print(*[record.run_id for record in ledger.records()], sep=",")
print(ledger._source.query("PRAGMA integrity_check"))
""",
                directory,
            )
            assert "before,child,child later,parent\n[('ok',)]\n" == output

    def test_forking_in_the_middle_of_commits_hurts_nobody(self, directory: Path) -> None:
        """Three threads commit while the main thread forks fifty children, which use the ledger and end."""
        output = run(
            """
ledger = Ledger.open(directory, report=sys.exit)
stop = threading.Event()
counts = [0, 0, 0]
def work(number):
    while not stop.is_set():
        counts[number] += 1
        ledger.commit(RunRecord(f"thread{number}", delivered=counts[number]))
threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
for thread in threads: thread.start()
for index in range(50):
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # a deadlock ends by signal
        if index % 2:
            ledger.commit(RunRecord(f"child{index}"))
            assert ledger.record(f"child{index}")
        if index % 3:
            os._exit(0)
        break
    _, status = os.waitpid(child, 0)
    assert status == 0, status
else:
    stop.set()
    for thread in threads: thread.join()
    found = {record.run_id: record.delivered for record in ledger.records()}
    assert [found.pop(f"thread{number}") for number in range(3)] == counts
    assert len(found) == 25, found
    print(ledger._source.query("PRAGMA integrity_check"), ledger.quarantined_rows)
""",
            directory,
        )
        assert "[('ok',)] 0\n" == output

    def test_a_fork_waits_a_bounded_time_for_a_ledger_that_is_stuck(self, directory: Path) -> None:
        """While a thread waits for a lock, a fork goes ahead after a second, and the child leaves the ledger alone."""
        output = run(
            """
import sqlite3, time
ledger = Ledger.open(directory, timeout=30)
other = sqlite3.connect(directory / "cache.db", isolation_level=None)
other.execute("BEGIN EXCLUSIVE")
thread = threading.Thread(target=ledger.commit, args=(RunRecord("a"),))
thread.start()
while ledger._source._lock.acquire(blocking=False):
    ledger._source._lock.release()
start = time.monotonic()
child = os.fork()
if child == 0:
    try:
        ledger.record("a")
    except LedgerUnavailable as error:
        os._exit(7 if "forked" in str(error) else 1)
    os._exit(2)
print(0.9 < time.monotonic() - start < 5, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
other.execute("ROLLBACK")
thread.join()
print(ledger.record("a") == RunRecord("a"))
""",
            directory,
        )
        assert "True 7\nTrue\n" == output


def _database(ledger: Ledger) -> Database:
    assert isinstance(ledger._source, Database)
    return ledger._source
