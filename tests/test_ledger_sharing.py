"""The ledger in use by several: threads, processes that are killed, readers beside the writer, forks."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from pathlib import Path

import pytest

from ledgers import assert_works, database, letter, record, run, script, view
from mlflow_outbox.errors import LedgerUnavailable, OutboxError
from mlflow_outbox_worker.ledger import Ledger
from mlflow_outbox_worker.rows import put


def test_threads_commit_and_read_side_by_side(directory: Path) -> None:
    """Eight threads write their runs and read all runs; nothing is lost and nobody fails."""
    # Each of them waits for the others, who wait for the disk.
    ledger = Ledger.open(directory, timeout=60, report=pytest.fail)
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
    ledger.close()


def test_a_second_opening_in_a_process_leaves_the_locks_of_the_first_alone(directory: Path, ledger: Ledger) -> None:
    """The kernel gives up all of a process's locks on a file with any descriptor of it that is closed."""
    ledger.commit(record("a", 1))
    Ledger.open(directory).close()
    assert "" == run("Ledger.open(directory).close()", directory)  # the last to close it would remove the log
    assert (directory / "cache.db-wal").stat().st_size
    ledger.commit(record("a", 2))
    assert record("a", 2) == ledger.record("a")


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


def _begin_log(directory: Path) -> None:
    """Leave a ledger as a process that was killed after the first sync of its log: with no more than a header there."""
    run("ledger = Ledger.open(directory)\nledger.commit(RunRecord('b'))\nos._exit(0)", directory)
    header = (directory / "cache.db-wal").read_bytes()[:32]
    ledger = Ledger.open(directory)
    ledger.commit(record("a", 1))
    ledger.close()
    for suffix, content in (("-wal", header), ("-shm", bytes(32768))):
        (directory / f"cache.db{suffix}").write_bytes(content)
        (directory / f"cache.db{suffix}").chmod(0o600)


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

    def test_a_log_of_which_there_is_only_the_header_is_read_as_none(self, directory: Path) -> None:
        """As a kill between its first sync and its first frame leaves it; SQLite would try for ten seconds and fail."""
        _begin_log(directory)
        before = {path.name: path.read_bytes() for path in directory.iterdir()}
        started = time.monotonic()
        assert record("a", 1) == Ledger.open(directory, read_only=True).record("a")
        assert 8 > time.monotonic() - started
        assert before == {path.name: path.read_bytes() for path in directory.iterdir()}
        ledger = Ledger.open(directory, report=pytest.fail)
        assert_works(ledger)
        ledger.close()

    def test_reading_a_log_that_was_begun_leaves_the_locks_of_this_process_alone(self, directory: Path) -> None:
        """A writer of this process has it open: whoever opens and closes the file beside it takes its locks away."""
        _begin_log(directory)
        header = (directory / "cache.db-wal").read_bytes()
        ledger = Ledger.open(directory)
        ledger.checkpoint()
        (directory / "cache.db-wal").write_bytes(header)
        assert record("a", 1) == Ledger.open(directory, read_only=True).record("a")
        asks = "import fcntl; fcntl.lockf(open(directory / 'cache.db', 'rb+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        done = subprocess.run(script(asks, directory), capture_output=True, text=True, timeout=120, check=False)
        assert "BlockingIOError" in done.stderr
        ledger.close()

    def test_a_locked_ledger_can_be_read_and_a_read_one_written(self, directory: Path, ledger: Ledger) -> None:
        """Neither waits for the other."""
        ledger.commit(record("a", 1))
        reader = Ledger.open(directory, read_only=True, timeout=0.0)
        records = reader.records()
        with database(ledger).transaction() as cache:
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
            lambda: reader.settle_dead_letter(letter("a")),
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
        assert record("a", 100).cursors["w"].seq == reader.record("a").cursors["w"].seq  # type: ignore[union-attr]  # it is there


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
from mlflow_outbox_worker import database, dbdoor
database.FORK_PATIENCE = dbdoor.FORK_PATIENCE = 60.0  # the threads wait for a disk that may be busy
ledger = Ledger.open(directory, timeout=60, report=sys.exit)
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
        signal.alarm(100)  # a deadlock ends by signal
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
def busy():  # seconds in which this thread has computed, or could not because the processors had others
    return sum(map(int, Path("/proc/thread-self/schedstat").read_text().split()[:2])) / 1e9
start, before = time.monotonic(), busy()
child = os.fork()
if child == 0:
    try:
        ledger.record("a")
    except LedgerUnavailable as error:
        os._exit(7 if "forked" in str(error) else 1)
    os._exit(2)
took = time.monotonic() - start
print(0.9 < took and took - (busy() - before) < 5, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
other.execute("ROLLBACK")
thread.join()
print(ledger.record("a") == RunRecord("a"))
""",
            directory,
        )
        assert "True 7\nTrue\n" == output
