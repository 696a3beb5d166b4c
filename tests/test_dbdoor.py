"""A ledger that a killed process left is opened to write while the same process reads it."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

from mlflow_outbox.errors import LedgerUnavailable
from mlflow_outbox_worker import dbdoor
from mlflow_outbox_worker.dbdoor import door
from mlflow_outbox_worker.ledger import Ledger
from mlflow_outbox_worker.records import RunRecord
from servers import eventually

_RUNS = 20


def _write_and_die(directory: Path) -> None:
    ledger = Ledger.open(directory)
    for number in range(_RUNS):
        ledger.commit(RunRecord(f"{number:032x}"))
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def left(tmp_path: Path) -> Path:
    """Return the ledger of a process that was killed, with its log not yet in the main file."""
    directory = tmp_path / "left"
    process = multiprocessing.get_context("fork").Process(target=_write_and_die, args=(directory,))
    process.start()
    process.join()
    assert {"cache.db", "cache.db-wal", "cache.db-shm"} <= {path.name for path in directory.iterdir()}
    return directory


def test_a_reader_in_the_same_process_does_not_keep_the_writer_from_recovering(left: Path, tmp_path: Path) -> None:
    """Without the door the writer found a read-only database in seven of ten openings, or waited for 10 s."""
    for attempt in range(10):
        directory = tmp_path / f"ledger{attempt}"
        shutil.copytree(left, directory)
        seen: list[int] = []
        done = threading.Event()

        def read(directory: Path = directory, seen: list[int] = seen, done: threading.Event = done) -> None:
            reader = Ledger.open(directory, read_only=True)
            while not done.is_set():
                seen.append(len(list(reader.records())))

        readers = [threading.Thread(target=read) for _ in range(2)]
        for reader in readers:
            reader.start()
        try:
            eventually(lambda seen=seen: bool(seen))
            writer = Ledger.open(directory)
            writer.commit(RunRecord("f" * 32))
            eventually(lambda seen=seen: seen[-1] == _RUNS + 1)
            writer.close()
        finally:
            done.set()
            for reader in readers:
                reader.join()
        assert {_RUNS, _RUNS + 1} == set(seen)


def test_who_stands_at_the_door_too_long_is_told_so(tmp_path: Path) -> None:
    """Nothing waits without a bound."""
    path = tmp_path / "cache.db"
    with door(path, 1), pytest.raises(LedgerUnavailable, match="in use by another thread"), door(path, 0.05):
        pass


def test_who_writes_goes_before_readers_that_have_waited_for_longer(tmp_path: Path) -> None:
    """Only the writer makes readable what a killed process left; readers must not keep it out one after another."""
    path, came = tmp_path / "cache.db", list[str]()

    def enter(who: str, *, writing: bool) -> None:
        with door(path, 10, writing=writing):
            came.append(who)

    readers = [threading.Thread(target=enter, args=("reader",), kwargs={"writing": False}) for _ in range(3)]
    writer = threading.Thread(target=enter, args=("writer",), kwargs={"writing": True})
    with door(path, 1):
        for thread in (*readers, writer):
            thread.start()
        eventually(lambda: path in dbdoor._WAITING, message="the writer waits")
    for thread in (*readers, writer):
        thread.join()
    assert ["writer", "reader", "reader", "reader"] == came


def test_after_a_wait_in_vain_readers_do_not_wait_until_one_can_read(directory: Path, ledger: Ledger) -> None:
    """A program asks many times as it starts, and would wait each time."""
    ledger.commit(RunRecord("a"))
    reader = Ledger.open(directory, read_only=True, timeout=0.3)
    with door(directory / "cache.db", 1):
        started = time.monotonic()
        for _ in range(20):
            with pytest.raises(LedgerUnavailable):
                reader.record("a")
        assert 0.3 < time.monotonic() - started < 20 * 0.3, "they wait each time"
    assert reader.record("a") is not None
    with door(directory / "cache.db", 1), pytest.raises(LedgerUnavailable, match=r"for 0\.3 s"):
        reader.record("a")


def test_a_forked_child_has_doors_of_its_own(tmp_path: Path) -> None:
    """A fork beside a thread that reads waits for it, and the child never waits for a thread that it does not have."""
    path, inside, leave = tmp_path / "cache.db", threading.Event(), threading.Event()

    def read() -> None:
        with door(path, 1):
            inside.set()
            leave.wait()

    reader = threading.Thread(target=read)
    reader.start()
    inside.wait()
    pid = os.fork()
    if pid == 0:
        try:
            with door(path, 5):
                os._exit(0)
        finally:
            os._exit(1)
    leave.set()
    reader.join()
    assert 0 == os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
