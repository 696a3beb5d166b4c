"""``mlflow-outbox gc``: frees what is delivered and read back, and nothing else, whatever interrupts it."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from commands import NOBODY, Here, offline, outbox_of
from mlflow_outbox import MLflowTracker, Settings
from mlflow_outbox.counters import Counters
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox.spool.events import Metric, encode
from mlflow_outbox.spool.reader import RunReader
from mlflow_outbox_worker.cli.exits import CommandFailed
from mlflow_outbox_worker.cli.gc import seconds_of
from mlflow_outbox_worker.lease import Lease
from mlflow_outbox_worker.ledger import Ledger
from mlflow_outbox_worker.records import DeadLetter, RunRecord
from mlflow_outbox_worker.room import Room
from mlflow_outbox_worker.sources import find_runs
from mlflow_outbox_worker.upkeep import Upkeep
from replays import run_with_kills


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Here:
    """Run commands in this process."""
    return Here(capsys, monkeypatch)


def delivered(root: Path, number: int, *, days_ago: float = 8.0, files: int = 0) -> list[str]:
    """Make an outbox with runs that were delivered, read back and filed some time ago."""
    ids = offline(root, runs=number)
    outbox = OutboxDirectory.open(outbox_of(root))
    ledger = Ledger.open(outbox.ledger)
    for run_id in ids:
        os.rename(outbox.run(run_id), outbox.delivered / run_id)
        for name in range(files):
            (outbox.delivered / run_id / f"{name:064x}").touch(0o600)
        verified = int((time.time() - days_ago * 86_400) * 1000)
        ledger.commit(RunRecord(run_id, remote_id=run_id, state="done", ended=True, verified_at_ms=verified))
    ledger.close()
    return ids


def test_runs_past_retention_go(here: Here, tmp_path: Path) -> None:
    """--dry-run only says so; the real one says the same and does it."""
    delivered(tmp_path, 3)
    outbox = OutboxDirectory.open(outbox_of(tmp_path))
    dry = here("gc", "--dry-run", "-d", tmp_path)
    assert 0 == dry.code
    assert "would free" in dry.out
    assert "3 runs; 0 delivered runs kept" in dry.out
    assert 3 == len(outbox.delivered_ids())
    (told,) = here("gc", "-d", tmp_path, "--json", "--dry-run").data
    assert (sorted(outbox.delivered_ids()), 0, True) == (sorted(told["runs"]), told["kept"], told["dry_run"])
    assert "of 3 runs; 0 delivered runs kept" in here("gc", "-d", tmp_path).out
    assert [] == outbox.delivered_ids()


def test_nothing_outside_goes_because_an_outbox_of_somebody_else_s_says_so(here: Here, tmp_path: Path) -> None:
    """F90: its ledger calls a directory a delivered run, and a link leads to where there is one of that name."""
    (run_id,) = delivered(tmp_path / "given", 1)
    path, home = outbox_of(tmp_path / "given"), tmp_path / "home"
    (path / "delivered").rename(home)
    (path / "delivered").symlink_to(home)
    done = here("gc", "-d", path)
    assert (True, True) == (done.code != 0, "symbolic link" in done.out + done.err), done
    assert here("flush", "--timeout", "5", "-d", path).code != 0
    assert (home / run_id).is_dir()


def test_what_must_stay_stays(here: Here, tmp_path: Path) -> None:
    """Too young, not read back, unknown to the ledger, going on, or with a dead letter: all kept."""
    young, unread, unknown, resumed, refused, old = delivered(tmp_path, 6)
    outbox = OutboxDirectory.open(outbox_of(tmp_path))
    ledger = Ledger.open(outbox.ledger)
    now = int(time.time() * 1000)
    ledger.commit(RunRecord(young, remote_id=young, state="done", verified_at_ms=now))
    ledger.commit(RunRecord(unread, remote_id=unread, state="active", verified_at_ms=0))
    ledger.forget(unknown)
    outbox.run(resumed).mkdir(0o700)
    record = ledger.record(refused)
    assert record is not None
    ledger.commit(record, dead=[DeadLetter(refused, "", encode(Metric("x", 1.0, 1, 1)), "no", "", 400, 1)])
    ledger.close()
    assert 0 == here("gc", "-d", tmp_path).code
    assert sorted([young, unread, unknown, resumed, refused]) == outbox.delivered_ids()
    assert old not in outbox.delivered_ids()
    assert 0 == here("gc", "--older-than", "0", "-d", tmp_path).code
    assert sorted([unread, unknown, resumed, refused]) == outbox.delivered_ids()


def test_it_leaves_the_outbox_to_another_worker(here: Here, tmp_path: Path) -> None:
    """Which reclaims by itself: code 6, and nothing is touched; a dry run is harmless and works."""
    delivered(tmp_path, 1)
    outbox = OutboxDirectory.open(outbox_of(tmp_path))
    lease = Lease(outbox.lock, "process")
    assert lease.acquire()
    done = here("gc", "-d", tmp_path)
    assert 6 == done.code
    assert "a worker (process" in done.err
    told = here("gc", "-d", tmp_path, "--json")
    assert (6, True) == (told.code, "a worker (process" in told.data[0]["reason"]), "programs are told why too"
    assert 1 == len(outbox.delivered_ids())
    assert 0 == here("gc", "--dry-run", "-d", tmp_path).code
    lease.release()


def test_an_outbox_that_cannot_be_locked_keeps_nobody_from_the_others(here: Here, tmp_path: Path) -> None:
    """On a disk that is read-only, for instance: it is named, with code 1, and programs are told why too."""
    delivered(tmp_path / "other", 1)
    delivered(tmp_path, 1)
    outbox_of(tmp_path / "other").rename(tmp_path / "0-first")
    (tmp_path / "0-first" / "worker.lock").unlink(missing_ok=True)
    (tmp_path / "0-first" / "worker.lock").mkdir()
    done = here("gc", "-d", tmp_path, "--json")
    assert (1, [0, 1]) == (done.code, [len(one["runs"]) for one in done.data])
    assert "worker.lock" in done.err
    assert "worker.lock" in done.data[0]["reason"]


def test_killed_at_any_moment_it_is_finished_by_the_next(here: Here, tmp_path: Path) -> None:
    """SIGKILL in the middle of deleting: what is left is found and deleted by the next, nothing else is harmed."""
    delivered(tmp_path, 60, files=60)
    (waiting,) = offline(tmp_path)
    outbox = OutboxDirectory.open(outbox_of(tmp_path))
    killed, code = run_with_kills("gc", "-d", tmp_path, least=0.005, most=0.06, kills=20, mlflow=False)
    assert (True, 0) == (killed > 0, code)
    assert ([], [waiting]) == (os.listdir(outbox.delivered), outbox.run_ids())
    assert 13 == here("status", "-d", tmp_path, "--json").data["pending"]


@pytest.mark.parametrize("by", ["gc", "room", "worker"])
def test_a_run_that_is_deleted_in_part_when_a_kill_comes_is_no_run_any_more(
    by: str, here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of one would be sent to another place as a whole one; what is left of it goes in the next round."""
    delivered(tmp_path, 1)
    outbox = OutboxDirectory.open(outbox_of(tmp_path))
    died = OSError("killed here")

    def die(path: Path) -> None:
        assert 1 == len(list(Path(path).glob("*.log")))
        raise died

    def reclaim() -> None:
        with contextlib.closing(Ledger.open(outbox.ledger)) as ledger:
            if by == "room":
                Room(outbox, Settings(free_bytes=10**17), Counters()).look(ledger)
            elif by == "worker":
                room = Room(outbox, Settings(), Counters())
                clocks: dict[str, Any] = {"now_ms": lambda: time.time_ns() // 1_000_000, "clock": time.monotonic}
                Upkeep(outbox, Settings(), Counters(), room, **clocks).reclaim(ledger)
            else:
                here("gc", "-d", tmp_path)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", die)
        reclaim()
    assert ([], {}) == (outbox.delivered_ids(), find_runs(outbox.path).runs)
    assert 1 == len(os.listdir(outbox.delivered))
    reclaim()
    assert [] == os.listdir(outbox.delivered)


def test_what_is_delivered_of_a_run_without_an_end_goes_too(here: Here, tmp_path: Path) -> None:
    """No worker has filed it. What waits stays; doctor says what may go before gc does."""
    tracker = MLflowTracker("experiment", NOBODY, outbox_dir=tmp_path, worker="none", settings=Settings(sync="os"))
    run = tracker.start_run("left")
    run.log_text("x" * 100_000, "x.txt")
    outbox = OutboxDirectory.open(outbox_of(tmp_path))
    files = outbox.run(run.run_id) / "files"
    with contextlib.closing(Ledger.open(outbox.ledger)) as ledger:
        cursors = RunReader(outbox.run(run.run_id)).window({}).cursors
        ledger.commit(RunRecord(run.run_id, remote_id="r", cursors=cursors))
    run.log_text("y" * 1000, "y.txt")
    assert 2 == len(list(files.iterdir()))
    told = here("gc", "--older-than", "0", "--dry-run", "-d", tmp_path)
    assert 2 == len(list(files.iterdir()))
    assert "would free 100 kB of 0 runs and of runs that go on" in told.out
    assert 0 == here("gc", "-d", tmp_path).code, "filed, and kept for the retention time"
    assert "100 kB of it are delivered" in here("doctor", "--offline", "-d", tmp_path).out
    (done,) = here("gc", "--older-than", "0", "-d", tmp_path, "--json").data
    assert 100_000 == done["bytes"]
    assert ["y" * 1000] == [path.read_text() for path in files.iterdir()]
    assert [] == list((outbox.delivered / run.run_id / "files").iterdir())
    tracker.close(0)


def test_a_run_that_was_read_back_and_not_filed_goes_too(here: Here, tmp_path: Path) -> None:
    """The worker ended before it could: one of the run's writers had not left it, and nothing has been logged since."""
    (run_id,) = offline(tmp_path, runs=1)
    outbox = OutboxDirectory.open(outbox_of(tmp_path))
    verified = int((time.time() - 8 * 86_400) * 1000)
    with contextlib.closing(Ledger.open(outbox.ledger)) as ledger:
        cursors = RunReader(outbox.run(run_id)).window({}).cursors
        ledger.commit(
            RunRecord(run_id, remote_id="r", cursors=cursors, state="done", ended=True, verified_at_ms=verified)
        )
    assert 0 == here("gc", "--dry-run", "-d", tmp_path).code
    assert [run_id] == outbox.run_ids()
    (done,) = here("gc", "-d", tmp_path, "--json").data
    assert ([run_id], 0) == (done["runs"], done["kept"])
    assert ([], []) == (outbox.run_ids(), outbox.delivered_ids())


@pytest.mark.parametrize(
    ("text", "seconds"), [("0", 0.0), ("90s", 90.0), ("1.5h", 5400.0), ("15 min", 900.0), ("7d", 604_800.0)]
)
def test_time_spans(text: str, seconds: float) -> None:
    """A number with a unit, or 0."""
    assert seconds == seconds_of(text)


@pytest.mark.parametrize("text", ["5", "1.5"])
def test_a_number_without_a_unit_is_asked_for_one(text: str, here: Here, tmp_path: Path) -> None:
    """As seconds it would delete what was meant to be kept for days."""
    delivered(tmp_path, 1)
    done = here("gc", "--older-than", text, "-d", tmp_path)
    assert 2 == done.code
    assert f"'{text}' has no unit; write {text}s, {text}min, {text}h or {text}d" in " ".join(done.err.split())
    assert 1 == len(OutboxDirectory.open(outbox_of(tmp_path)).delivered_ids())


@pytest.mark.parametrize("text", ["9" * 400 + "d", "9" * 400, "1000001d", "9" * 300 + "h"])
def test_a_span_that_is_no_time_any_more_is_bad_usage(text: str, here: Here, tmp_path: Path) -> None:
    """Said in one sentence that is shorter than the number; a million days is a time."""
    delivered(tmp_path, 1)
    done = here("gc", "--older-than", text, "-d", tmp_path)
    assert (2, True) == (done.code, "give 1000000d at most" in done.err), done
    assert len(done.err) < 200
    assert 0 == here("gc", "--older-than", "1000000d", "-d", tmp_path).code
    assert 1 == len(OutboxDirectory.open(outbox_of(tmp_path)).delivered_ids())


@pytest.mark.parametrize("text", ["", "-1", "d", "1w", "1 2"])
def test_no_time_spans(text: str) -> None:
    """Anything else is bad usage, with examples."""
    with pytest.raises(CommandFailed, match="7d"):
        seconds_of(text)
