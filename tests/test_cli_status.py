"""``mlflow-outbox status``: numbers that are right, for people and for programs, at any size and at any moment."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from commands import NOBODY, Here, environment, make_unreadable, offline, outbox_of, run, withhold_runs
from contents import QUICK
from mlflow_outbox import MLflowTracker
from mlflow_outbox.counters import Counters
from mlflow_outbox.settings import Settings
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox.spool.events import Metric, SegmentClosed, encode
from mlflow_outbox.spool.frame import SegmentHeader, pack, pack_header
from mlflow_outbox.spool.tally import Tally, refused
from mlflow_outbox_worker import thread
from mlflow_outbox_worker.ledger import Ledger
from mlflow_outbox_worker.notes import DestinationNote, Notes, Pace, destination_note, noted_pace
from mlflow_outbox_worker.records import DeadLetter, RunRecord
from mlflow_outbox_worker.survey import survey
from servers import MlflowServer, eventually
from terminals import Terminal
from workers import delivering


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Here:
    """Run commands in this process."""
    return Here(capsys, monkeypatch)


def test_an_offline_outbox_is_described(here: Here, tmp_path: Path) -> None:
    """Events, runs, experiment, age, and that nobody delivers; in words and as JSON."""
    (first, second) = offline(tmp_path, runs=2, points=10)
    data = here("status", "-d", tmp_path, "--json").data
    (outbox,) = data["outboxes"]
    assert 26 == data["pending"] == outbox["pending"]  # begin, param, ten points and end, twice
    assert (0, 0, None) == (outbox["parked"], outbox["dead"], outbox["worker"])
    assert {first, second} == {entry["run_id"] for entry in outbox["runs"]}
    assert {"experiment"} == {entry["experiment"] for entry in outbox["runs"]}
    assert 0 <= outbox["oldest_seconds"] < 60
    assert 26 * 20 < outbox["bytes"] < 26 * 200
    done = here("status", "-d", tmp_path)
    assert 0 == done.code
    assert "26 events wait" in done.out
    assert "nobody delivers; mlflow-outbox flush does" in done.out


def test_a_segment_that_cannot_be_read_is_named(here: Here, tmp_path: Path) -> None:
    """Nothing in it can be delivered, so a person has to know of it, and a monitor: what waits there nobody knows."""
    first, _ = offline(tmp_path, runs=2, points=10)
    (segment,) = (outbox_of(tmp_path) / "runs" / first).glob("*.log")
    make_unreadable(segment)
    assert 1 == here("status", "-d", tmp_path, "--json").data["outboxes"][0]["unreadable_segments"]
    done = here("status", "-d", tmp_path)
    assert "1 segment cannot be read, so that its events are not delivered; see: mlflow-outbox doctor" in done.out
    assert "13 events wait" in done.out
    assert 0 == done.code
    assert 1 == here("status", "-d", tmp_path, "--exit-code").code


def test_an_outbox_whose_runs_the_disk_does_not_list_is_shown_beside_the_others(
    here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is said of it, and something may wait there; what waits in the others is as important as before."""
    offline(tmp_path)
    MLflowTracker("other", "http://127.0.0.1:10", outbox_dir=tmp_path, worker="none").start_run("run").end()
    ill, well = sorted(path for path in tmp_path.iterdir() if path.is_dir())
    withhold_runs(monkeypatch, ill)
    found = {one["path"]: one for one in here("status", "-d", tmp_path, "--json").data["outboxes"]}
    assert (1, 1) == (found[str(ill)]["pending"], found[str(ill)]["unreadable_segments"])
    assert "Input/output error" in found[str(ill)]["disk_problem"]
    assert (None, 0) == (found[str(well)]["disk_problem"], found[str(well)]["unreadable_segments"])
    assert 2 <= found[str(well)]["pending"]
    assert "the disk does not tell which runs there are: OSError: [Errno 5]" in here("status", "-d", tmp_path).out
    assert 1 == here("status", "-d", tmp_path, "--exit-code").code


def test_exit_code_only_on_request(here: Here, tmp_path: Path) -> None:
    """A look is no failure; with --exit-code a monitor learns that something is left, and -q keeps it quiet."""
    offline(tmp_path)
    assert 0 == here("status", "-d", tmp_path).code
    assert (3, "", "") == here("status", "-d", tmp_path, "-q", "--exit-code")


def test_ten_million_events_are_counted_quickly(here: Here, tmp_path: Path) -> None:
    """By numbers and heads: only the last segment of a writer is looked into, however many there are."""
    (run_id,) = offline(tmp_path, points=1)
    directory = OutboxDirectory.open(outbox_of(tmp_path))
    folder = directory.run(run_id)
    writer, total, per_segment = "ab" * 8, 10_000_000, 220_000
    event = encode(Metric("loss", 0.5, 1_700_000_000_000, 1))
    alone = 0.0
    for ordinal, first in reversed([*enumerate(range(0, total, per_segment))]):
        header = SegmentHeader(run_id, "experiment", writer, ordinal, first, 7, 1_700_000_000_000)
        last = first + per_segment >= total
        # Segments that nobody reads need no frames; the last one is as a writer leaves it.
        frames = [pack(event, seq, 7) for seq in range(first, total)] if last else []
        end = pack(encode(SegmentClosed(not last)), min(first + per_segment, total), 7)
        (folder / f"{writer}-{ordinal:06d}.log").write_bytes(b"".join([pack_header(header), *frames, end]))
        if last:
            survey(directory, Settings())  # the first time it imports what it needs
            started = time.thread_time()
            survey(directory, Settings())
            alone = time.thread_time() - started
    started = time.thread_time()
    found = survey(directory, Settings())
    spent = time.thread_time() - started
    assert total + 4 == found.pending
    assert spent < 2 * alone + 0.1, f"{spent:.3f} s of CPU, {alone:.3f} s with the last segment alone"


def test_it_counts_while_a_program_logs(here: Here, tmp_path: Path) -> None:
    """A live segment is counted to its last whole event, and reading disturbs the writer in nothing."""
    tracker = MLflowTracker("experiment", NOBODY, outbox_dir=tmp_path, worker="none", settings=QUICK)
    one = tracker.start_run()
    seen = []
    for step in range(50):
        one.log_metric("loss", 1.0, step=step)
        seen.append(here("status", "-d", tmp_path, "--json").data["pending"])
    assert list(range(2, 52)) == seen
    assert {} == {name: number for name, number in tracker.counters.items() if name.startswith("refused")}
    one.end()
    tracker.close()


def test_who_delivers_and_why_nothing_arrives(here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the experiment's worker meets a server that is down, status names the worker and the error."""
    monkeypatch.setattr(thread, "is_mlflow_imported", lambda: True)  # so that this process delivers, and no child
    tracker = MLflowTracker("experiment", NOBODY, outbox_dir=tmp_path, settings=QUICK)
    tracker.start_run().log_metric("loss", 1.0)

    def noted() -> bool:
        return bool(here("status", "-d", tmp_path, "--json").data["outboxes"][0]["destination_state"] == "away")

    eventually(noted)
    (outbox,) = here("status", "-d", tmp_path, "--json").data["outboxes"]
    assert {"kind": "thread", "pid": os.getpid()}.items() <= outbox["worker"].items()
    assert "refused" in outbox["last_error"]
    out = here("status", "-d", tmp_path).out
    assert "a worker (thread" in out
    assert "the destination has not taken events for " in out
    tracker.close(0)


def test_since_when_the_destination_is_away_is_known_to_the_next_worker(tmp_path: Path) -> None:
    """As every flush is one: it does not begin to count anew."""
    offline(tmp_path)
    directory = OutboxDirectory.open(outbox_of(tmp_path))

    def noted() -> DestinationNote:
        with contextlib.closing(Ledger.open(directory.ledger, read_only=True)) as ledger:
            return destination_note(ledger)

    with delivering(directory, NOBODY, QUICK):
        first = eventually(lambda: (note := noted()).state == "away" and note, 60)
    assert first
    with delivering(directory, NOBODY, QUICK):
        eventually(lambda: noted().tried_ms > first.tried_ms, 60)
    assert (first.since_ms, "away") == (noted().since_ms, noted().state)


def test_delivered_is_nothing_left(
    here: Here, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """After delivery nothing waits, and the exit code says so."""
    tracker = MLflowTracker(experiment_name, mlflow_server.url, outbox_dir=tmp_path, settings=QUICK)
    with tracker.start_run() as one:
        one.log_metric("loss", 1.0)
    assert tracker.close(60)
    done = here("status", "-d", tmp_path, "--exit-code")
    assert 0 == done.code
    assert "nothing waits" in done.out


def test_dead_letters_and_parked_runs_are_counted(here: Here, tmp_path: Path) -> None:
    """Parked before left over before dead, in the exit code as in the words."""
    first, second = offline(tmp_path, runs=2)
    directory = OutboxDirectory.open(outbox_of(tmp_path))
    ledger = Ledger.open(directory.ledger)
    letter = DeadLetter(first, "", encode(Metric("x", 1.0, 1, 1)), "no", "", 400, 1)
    ledger.commit(RunRecord(first), dead=[letter])
    assert 3 == here("status", "-d", tmp_path, "--exit-code").code
    ledger.commit(RunRecord(second, state="parked", reason="the run is gone", failed_at_ms=1))
    ledger.close()
    done = here("status", "-d", tmp_path, "--exit-code")
    assert 4 == done.code
    assert "13 events parked: a person is needed" in done.out
    assert "the run is gone" in done.out
    assert "1 dead letter; see: mlflow-outbox dead list" in done.out


def test_what_programs_refused_is_known_outside_of_them(here: Here, tmp_path: Path) -> None:
    """Bad input and a full disk, counted by reason over all programs, forked ones too, also after their end."""
    tracker = MLflowTracker("experiment", NOBODY, outbox_dir=tmp_path, worker="none", settings=QUICK)
    one = tracker.start_run()
    one.log_metric("loss", 1.0)
    assert {} == here("status", "-d", tmp_path, "--json").data["outboxes"][0]["refused"]
    assert not one.log_metric("loss", "high")  # type: ignore[arg-type]  # bad input
    refused = sum(number for reason, number in tracker.counters.items() if reason.startswith("refused"))
    tracker.close()
    (told,) = here("status", "-d", tmp_path, "--json").data["outboxes"]
    assert refused == sum(told["refused"].values()) == 1
    code = "import sys; from mlflow_outbox import *; t = MLflowTracker('e', sys.argv[1], outbox_dir='.', worker='none')"
    code += "; t.start_run().log_metric('loss', 1.0); t.close()"
    full = environment(MLFLOW_OUTBOX_OUTBOX_BYTES="1")
    subprocess.run([sys.executable, "-c", code, NOBODY], check=True, env=full, capture_output=True)
    assert "programs refused events, which are nowhere: 1 refused_" in here("status", "-d", tmp_path).out


def test_a_forked_child_counts_its_own_refusals_only(tmp_path: Path) -> None:
    """It has its parent's counters; and what cannot be written now is written later."""
    counters = Counters()
    tally = Tally(tmp_path, counters)
    tally.note()
    assert [] == list(tmp_path.iterdir()), "who refuses nothing writes nothing"
    (tmp_path / "refused").touch()
    counters.add("refused_full", 3)
    tally.note()
    (tmp_path / "refused").unlink()
    tally.note()
    assert {"refused_full": 3} == refused(tmp_path)
    counters.add("refused_full", 4)
    child = os.fork()
    if child == 0:
        counters.add("refused_full", 2)
        tally.note()
        os._exit(0)
    os.waitpid(child, 0)
    counters.add("lost_in_memory")
    tally.note()
    assert {"refused_full": 9, "lost_in_memory": 1} == refused(tmp_path)


def test_watching_ends_with_the_interrupt(tmp_path: Path) -> None:
    """--watch prints again and again; ctrl-C ends it with 130 and one sentence."""
    import signal

    from commands import start

    offline(tmp_path)
    process = start("status", "-d", tmp_path, "--watch", "--interval", "0.1", "--json")
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(2)]
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=120)
    assert all('"pending": 13' in line for line in lines)
    assert 130 == process.returncode
    assert "Traceback" not in rest


def test_watching_draws_over_what_it_drew_and_sees_new_outboxes(tmp_path: Path) -> None:
    """Nothing is cleared, so nothing flickers; an outbox that is made meanwhile appears."""
    offline(tmp_path)
    with Terminal(80, "status", "--watch", "--interval", "0.1", "-d", tmp_path) as terminal:
        terminal.until("13 events wait")
        offline(tmp_path, "http://127.0.0.1:10")
        terminal.until("all 2 outboxes: 26 events waiting")
        terminal.type("\x03")
        assert 130 == terminal.end()
    assert "\x1b[2J" not in terminal.written
    assert "\x1b[H" in terminal.written


def test_two_outboxes_and_none(here: Here, tmp_path: Path) -> None:
    """Several are shown with a total; where there is none the sentence says how to name one, and the code is 2."""
    offline(tmp_path / "two")
    offline(tmp_path / "two", "http://127.0.0.1:10")
    done = here("status", "-d", tmp_path / "two")
    assert "all 2 outboxes: 26 events waiting" in done.out
    missing = here("status", "-d", tmp_path / "none")
    assert 2 == missing.code
    assert "--outbox-dir" in missing.err


def test_the_real_command_in_a_pipe(tmp_path: Path) -> None:
    """Plain lines, whole ids, no escape sequences, also where the environment asks for colours."""
    (run_id,) = offline(tmp_path)
    done = run("status", FORCE_COLOR="1", TERM="xterm-256color", COLUMNS="40", MLFLOW_OUTBOX_DIR=str(tmp_path))
    assert 0 == done.code, done.err
    assert "\x1b" not in done.out
    assert run_id in done.out


class TestNotes:
    def test_an_attempt_is_noted_again_after_a_hurry(self, tmp_path: Path) -> None:
        """The same twice is one note; the first that begins after a hurry is noted, and since when stays."""
        ledger = Ledger.open(tmp_path / "ledger")
        notes = Notes(0.0)
        notes.destination(ledger, "away", "refused", 1000, 900)
        notes.destination(ledger, "away", "refused", 2000, 1900)
        assert DestinationNote("away", "refused", 1000, 900) == destination_note(ledger)
        notes.hurried(2500)
        notes.destination(ledger, "away", "it was under way", 3000, 2400)
        assert DestinationNote("away", "refused", 1000, 900) == destination_note(ledger)
        notes.destination(ledger, "away", "reset", 3500, 3000)
        assert DestinationNote("away", "reset", 1000, 3000) == destination_note(ledger)
        notes.destination(ledger, "ok", "", 4000, 3900)
        assert DestinationNote("ok", "", 4000, 3900) == destination_note(ledger)
        ledger.close()

    def test_another_reason_is_noted_and_since_when_stays(self, tmp_path: Path) -> None:
        """A server that refused connections is up again, and its database is not: who looks is told of that."""
        ledger = Ledger.open(tmp_path / "ledger")
        notes = Notes(0.0)
        notes.destination(ledger, "away", "refused", 1000, 900)
        notes.destination(ledger, "away", "503: the database is read-only", 2000, 1900)
        assert DestinationNote("away", "503: the database is read-only", 1000, 1900) == destination_note(ledger)
        ledger.close()

    def test_what_another_worker_has_noted_since_is_not_left_there(self, tmp_path: Path) -> None:
        """One that delivers again after another one, or with a new ledger, says how it stands, no news or not."""
        ledger = Ledger.open(tmp_path / "ledger")
        first, second = Notes(0.0), Notes(0.0)
        first.destination(ledger, "ok", "", 1000, 900)
        second.destination(ledger, "parked", "401", 2000, 1900)
        first.begin()
        first.destination(ledger, "ok", "", 3000, 2900)
        assert DestinationNote("ok", "", 3000, 2900) == destination_note(ledger)
        ledger.close()
        anew = Ledger.open(tmp_path / "anew")
        second.begin()
        second.destination(anew, "parked", "401", 4000, 3900)
        assert DestinationNote("parked", "401", 4000, 3900) == destination_note(anew)
        anew.close()

    def test_the_pace_is_that_of_the_last_seconds(self, tmp_path: Path) -> None:
        """It is noted every few seconds while events arrive, and forgotten when that was long ago."""
        ledger = Ledger.open(tmp_path / "ledger")
        notes = Notes(100.0)
        notes.pace(ledger, 50, 101.0, 0)
        assert noted_pace(ledger) is None
        notes.pace(ledger, 500, 105.0, 5000)
        pace = noted_pace(ledger)
        assert Pace(500, 5.0, 5000) == pace
        assert pace is not None
        assert 100.0 == pace.rate(6000)
        assert 0.0 == pace.rate(60_000)
        ledger.close()
