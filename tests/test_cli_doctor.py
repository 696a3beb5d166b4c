"""``mlflow-outbox doctor``: finds what is wrong, mends what is safe to mend, and changes nothing else."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from commands import NOBODY, Here, offline, outbox_of, withhold, withhold_runs
from mlflow_outbox import MLflowTracker, Settings
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox.spool.reader import RunReader
from mlflow_outbox.spool.window import Cursor
from mlflow_outbox_worker.ledger import Ledger
from mlflow_outbox_worker.records import RunRecord
from servers import MlflowServer


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Here:
    """Run commands in this process."""
    return Here(capsys, monkeypatch)


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file of an outbox that is not the ledger's or the lock."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix == ".log"
    }


def test_a_sound_outbox(here: Here, tmp_path: Path) -> None:
    """Code 0, and it says how much was read and compared."""
    offline(tmp_path, runs=2)
    done = here("doctor", "--offline", "-d", tmp_path)
    assert 0 == done.code, done
    assert "26 events in 2 segments of 2 runs are intact" in done.out


def test_a_run_that_is_being_written_is_sound(here: Here, tmp_path: Path) -> None:
    """Looking at a live outbox finds nothing wrong and disturbs nobody, --repair included."""
    tracker = MLflowTracker("experiment", NOBODY, outbox_dir=tmp_path, worker="none")
    one = tracker.start_run()
    one.log_metric("loss", 1.0)
    assert 0 == here("doctor", "--offline", "--repair", "-d", tmp_path).code
    assert one.log_metric("loss", 2.0)
    one.end()
    tracker.close()
    assert "4 events in" in here("doctor", "--offline", "-d", tmp_path).out


def test_the_destination_is_asked(here: Here, mlflow_server: MlflowServer, tmp_path: Path) -> None:
    """Answers: 0. Away: 3. Not there yet, but the first delivery makes it: 0."""
    offline(tmp_path / "up", mlflow_server.url)
    done = here("doctor", "-d", tmp_path / "up")
    assert 0 == done.code, done
    assert "answers" in done.out
    offline(tmp_path / "down")
    assert 3 == here("doctor", "-d", tmp_path / "down").code
    offline(tmp_path / "new", f"sqlite:///{tmp_path}/later/mlflow.db")
    done = here("doctor", "-d", tmp_path / "new")
    assert 0 == done.code, done
    assert "does not exist yet" in done.out
    assert not (tmp_path / "later").exists()


def test_a_store_that_is_gone_is_damage_where_something_was_delivered_to_it(
    here: Here, sqlite_uri: str, tmp_path: Path
) -> None:
    """It is told from one that the first delivery will make, with what to do about it."""
    offline(tmp_path / "box", sqlite_uri)
    assert 0 == here("flush", "-d", tmp_path / "box", "--timeout", "60").code
    assert 0 == here("doctor", "-d", tmp_path / "box").code
    database = Path(sqlite_uri.removeprefix("sqlite:///"))
    database.rename(tmp_path / "moved.db")
    done = here("doctor", "-d", tmp_path / "box")
    assert 1 == done.code
    assert f"{database} is gone, though 1 run was delivered to it; put it back" in done.out
    assert f"mlflow-outbox replay {outbox_of(tmp_path / 'box')} --again" in done.out
    assert not database.exists()


def test_damage_is_named_and_not_touched(here: Here, tmp_path: Path) -> None:
    """A flipped byte in the middle is damage, a cut end is what a crash leaves; both are shown, neither is changed."""
    first, second = offline(tmp_path, runs=2, points=100)
    outbox = OutboxDirectory.open(outbox_of(tmp_path))
    (flipped,) = outbox.run(first).glob("*.log")
    data = bytearray(flipped.read_bytes())
    data[len(data) // 2] ^= 0xFF
    flipped.write_bytes(data)
    (cut,) = outbox.run(second).glob("*.log")
    cut.write_bytes(cut.read_bytes()[:-20])
    before = contents(outbox.path)
    done = here("doctor", "--offline", "--repair", "-d", tmp_path)
    assert 1 == done.code
    assert f"{flipped}: bytes" in done.out
    assert "are damaged; delivery sets them aside" in done.out
    assert "are the beginning of an event whose writer died" in done.out
    assert "1 event must have existed and is not there" in done.out
    assert before == contents(outbox.path)


def test_a_damaged_header_and_a_lost_segment(here: Here, tmp_path: Path) -> None:
    """Both mean that events are missing, so both are code 1 with the file or the number named."""
    settings = Settings(segment_bytes=1024)
    tracker = MLflowTracker("experiment", NOBODY, outbox_dir=tmp_path, worker="none", settings=settings)
    with tracker.start_run() as one:
        for step in range(200):
            one.log_metric("loss", 1.0, step=step)
    tracker.close()
    outbox = OutboxDirectory.open(outbox_of(tmp_path))
    segments = sorted(outbox.run(one.run_id).glob("*.log"))
    reader = RunReader(outbox.run(one.run_id))
    (held,) = reader.segments().values()
    gap = held[2].header.first_seq - held[1].header.first_seq
    segments[1].unlink()
    done = here("doctor", "--offline", "-d", tmp_path)
    assert 1 == done.code
    assert f"{gap} events must have existed" in done.out
    segments[3].write_bytes(b"\0" * 2048)
    assert f"{segments[3]}: its beginning is damaged" in here("doctor", "--offline", "-d", tmp_path).out


def test_delivered_and_reclaimed_segments_are_no_gap(here: Here, tmp_path: Path) -> None:
    """A ledger that has passed them says that they were delivered."""
    settings = Settings(segment_bytes=1024)
    tracker = MLflowTracker("experiment", NOBODY, outbox_dir=tmp_path, worker="none", settings=settings)
    with tracker.start_run() as one:
        for step in range(200):
            one.log_metric("loss", 1.0, step=step)
    tracker.close()
    outbox = OutboxDirectory.open(outbox_of(tmp_path))
    ((writer, held),) = RunReader(outbox.run(one.run_id)).segments().items()
    held[0].path.unlink()
    assert 1 == here("doctor", "--offline", "-d", tmp_path).code
    ledger = Ledger.open(outbox.ledger)
    ledger.commit(RunRecord(one.run_id, cursors={writer: Cursor(1, 0, held[1].header.first_seq)}))
    ledger.close()
    assert 0 == here("doctor", "--offline", "-d", tmp_path).code


def test_a_segment_shorter_than_its_cursor(here: Here, tmp_path: Path) -> None:
    """What was delivered of it is not there any more: somebody has cut or replaced it."""
    (run_id,) = offline(tmp_path)
    outbox = OutboxDirectory.open(outbox_of(tmp_path))
    ((writer, _),) = RunReader(outbox.run(run_id)).segments().items()
    ledger = Ledger.open(outbox.ledger)
    ledger.commit(RunRecord(run_id, cursors={writer: Cursor(0, 10_000, 13)}))
    ledger.close()
    done = here("doctor", "--offline", "-d", tmp_path)
    assert 1 == done.code
    assert "is shorter than what was delivered of it" in done.out


def test_a_run_that_the_disk_does_not_give_is_named_and_the_others_are_read(
    here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every outbox."""
    withheld, _ = offline(tmp_path, runs=2)
    offline(tmp_path, "http://127.0.0.1:10")
    withhold(monkeypatch, withheld)
    done = here("doctor", "-d", tmp_path, "--offline", "--json")
    assert (1, 2) == (done.code, len(done.data)), done
    sound, bad = sorted(one["text"] for held in done.data.values() for one in held if one["about"] == "journals")
    assert "13 events in 1 segment of 1 run are intact" == sound
    assert f"run {withheld} cannot be read: [Errno 5] Input/output error" in bad


@pytest.mark.parametrize("words", [(), ("--repair",)])
def test_an_outbox_whose_runs_the_disk_does_not_list_is_a_finding_beside_the_others(
    words: tuple[str, ...], here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All the others are looked at, whichever comes first."""
    offline(tmp_path)
    offline(tmp_path, "http://127.0.0.1:10")
    ill, well = sorted(path for path in tmp_path.iterdir() if path.is_dir())
    withhold_runs(monkeypatch, ill)
    done = here("doctor", "-d", tmp_path, "--offline", "--json", *words)
    assert 1 == done.code, done
    assert [("bad", "directory")] == [(one["level"], one["about"]) for one in done.data[str(ill)]][-1:]
    assert "Input/output error" in done.data[str(ill)][-1]["text"]
    assert "13 events in 1 segment of 1 run are intact" in [one["text"] for one in done.data[str(well)]]


def test_a_segment_that_the_disk_does_not_give_is_not_called_damaged(
    here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A person might take it away for that; it is read once the disk gives it again."""
    offline(tmp_path)
    (segment,) = outbox_of(tmp_path).glob("runs/*/*.log")
    opened = os.open

    def failing(path: Any, *arguments: Any, **named: Any) -> int:
        if os.fspath(path) == str(segment):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(segment))
        return opened(path, *arguments, **named)

    monkeypatch.setattr(os, "open", failing)
    done = here("doctor", "-d", tmp_path, "--offline")
    said = f"{segment}: the disk does not give it ([Errno 13] Permission denied"
    assert (1, True, False) == (done.code, said in done.out, "damaged" in done.out), done


def test_modes_are_mended_only_when_asked(here: Here, tmp_path: Path) -> None:
    """An outbox that others can enter is refused by every other command; --repair takes their rights away."""
    offline(tmp_path)
    outbox = outbox_of(tmp_path)
    outbox.chmod(0o755)
    (segment,) = outbox.rglob("*.log")
    segment.chmod(0o644)
    assert 1 == here("status", "-d", tmp_path).code
    done = here("doctor", "--offline", "-d", tmp_path)
    assert 1 == done.code
    assert "mend it with --repair" in done.out
    assert 0o755 == stat.S_IMODE(outbox.stat().st_mode)
    assert 0 == here("doctor", "--offline", "--repair", "-d", tmp_path).code
    assert (0o700, 0o600) == (stat.S_IMODE(outbox.stat().st_mode), stat.S_IMODE(segment.stat().st_mode))
    assert 0 == here("status", "-d", tmp_path).code


@pytest.mark.parametrize("answer", ["says nothing", "refuses"])
def test_modes_that_a_file_system_does_not_keep_are_not_called_mended(
    answer: str, here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a stick, on which everything stays open to everybody: its runs can be sent all the same."""
    offline(tmp_path)
    outbox = outbox_of(tmp_path)
    outbox.chmod(0o755)

    def fchmod(_fd: int, _mode: int) -> None:
        if answer == "refuses":
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "fchmod", fchmod)
    done = here("doctor", "--offline", "--repair", "-d", tmp_path)
    assert (1, False) == (done.code, "any more" in done.out), done
    assert f"whatever mode is set there; mlflow-outbox replay {outbox} sends its runs" in done.out


def test_a_symbolic_link_is_never_followed(here: Here, tmp_path: Path) -> None:
    """It is named, and what it leads to keeps its mode."""
    offline(tmp_path / "a")
    victim = tmp_path / "victim"
    victim.write_text("x")
    victim.chmod(0o644)
    (outbox_of(tmp_path / "a") / "link").symlink_to(victim)
    done = here("doctor", "--offline", "--repair", "-d", tmp_path / "a")
    assert 1 == done.code
    assert "is a symbolic link" in done.out
    assert 0o644 == stat.S_IMODE(victim.stat().st_mode)


def test_stale_drafts_are_removed_and_fresh_ones_are_not(here: Here, tmp_path: Path) -> None:
    """A draft of an hour ago is a dead program's; one that is being written is somebody's work."""
    (run_id,) = offline(tmp_path)
    files = OutboxDirectory.open(outbox_of(tmp_path)).run(run_id) / "files"
    files.mkdir(0o700)
    stale, fresh = files / ".draft-aa", files / ".draft-bb"
    for path in (stale, fresh):
        path.touch(0o600)
    os.utime(stale, (1, 1))
    assert "1 draft left" in here("doctor", "--offline", "-d", tmp_path).out
    assert 0 == here("doctor", "--offline", "--repair", "-d", tmp_path).code
    assert (False, True) == (stale.exists(), fresh.exists())


def test_a_damaged_ledger_is_rebuilt(here: Here, tmp_path: Path) -> None:
    """It is named; --repair sets it aside and begins a new one, which a worker fills again; the old one is kept."""
    (run_id,) = offline(tmp_path)
    path = outbox_of(tmp_path) / "delivery"
    ledger = Ledger.open(path)
    ledger.commit(RunRecord(run_id))
    assert ledger.checkpoint()
    ledger.close()
    database = path / "cache.db"
    data = database.read_bytes()
    database.write_bytes(data[:4096] + b"\xff" * (len(data) - 4096))
    done = here("doctor", "--offline", "-d", tmp_path)
    assert 1 == done.code, done
    assert "ledger" in done.out
    here("doctor", "--offline", "--repair", "-d", tmp_path)
    again = here("doctor", "--offline", "-d", tmp_path)
    assert 0 == again.code, again
    assert "cache.db.corrupt-1" in again.out


def test_findings_as_json(here: Here, tmp_path: Path) -> None:
    """By outbox, with a level and what it is about."""
    offline(tmp_path)
    ((path, findings),) = here("doctor", "--offline", "--json", "-d", tmp_path).data.items()
    assert str(outbox_of(tmp_path)) == path
    assert {"ok"} == {finding["level"] for finding in findings}
    assert {"directory", "worker", "ledger", "journals"} == {finding["about"] for finding in findings}


def test_a_directory_that_is_no_outbox(here: Here, tmp_path: Path) -> None:
    """outbox.json is damaged: code 1, and the sentence says what to do."""
    offline(tmp_path)
    (outbox_of(tmp_path) / "outbox.json").write_text("{")
    done = here("doctor", "--offline", "-d", tmp_path)
    assert 1 == done.code
    assert "is damaged" in done.out
