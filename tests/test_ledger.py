"""The ledger: what it keeps, what one transaction covers, where its files are."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import threading
from pathlib import Path

import pytest

from ledgers import database, letter, record, run, view
from mlflow_outbox.errors import LedgerUnavailable
from mlflow_outbox_worker.ledger import Ledger
from spools import open_files


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
    with database(ledger).guarded() as cache:
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
    with database(ledger).guarded() as cache:
        cache._con.set_trace_callback(statements.append)
    assert [f"{index:05d}" for index in range(10_000)] == [found.run_id for found in ledger.records()]
    assert 21 == len(statements)


def test_records_and_views_of_many_runs_are_one_statement(ledger: Ledger) -> None:
    """A program that reads beside the worker opens and checks the file for each; a retired run has its ids."""
    ids = [f"{index:05d}" for index in range(298)]
    for index, run_id in enumerate(ids):
        ledger.commit(record(run_id, index), view=view() if index % 2 else None)
    done = record("gone", 1, "theirs")
    done.state, done.verified_at_ms = "done", 1
    ledger.commit(done, view=view())
    assert 1 == ledger.retire(["gone"], lambda _: True)
    wanted = [*ids, "gone", "nobody"]
    expected = {run_id: (ledger.record(run_id), ledger.view(run_id)) for run_id in wanted}
    ledger.set_meta("a", b"1")
    statements: list[str] = []
    with database(ledger).guarded() as cache:
        cache._con.set_trace_callback(statements.append)
    assert expected == ledger.held(wanted, views=True)
    assert 1 == len(statements)
    assert (None, None) == expected["nobody"]
    assert "theirs" == getattr(expected["gone"][0], "remote_id", "")
    assert {"a": b"1"} == ledger.metas(["a", "b"])


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
        with database(ledger).transaction() as cache:
            cache.query("UPDATE Cache SET value = ? WHERE key = 'next/dead'", (nonsense,))
        ledger.commit(record("a"), dead=[letter("a", "more")])
    assert ["1", "2", "more", "more", "more", "more"] == [found.reason for found in ledger.dead_letters()]


def test_a_dead_letter_is_settled_only_if_it_is_there(ledger: Ledger) -> None:
    """It leaves the queue, the others stay, and it is remembered once."""
    first = letter("a")
    ledger.commit(record("a"), dead=[first, letter("a", "second")])
    assert ledger.settle_dead_letter(first)
    assert ["second"] == [found.reason for found in ledger.dead_letters("a")]
    assert not ledger.settle_dead_letter(first)
    assert [first] == list(ledger.settled_letters("a"))


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
    assert open_files(directory)
    ledger.close()
    ledger.close()
    assert [] == open_files(directory)
    with pytest.raises(LedgerUnavailable, match="closed"):
        ledger.record("0")
