"""A file that a server can never store holds up neither its run nor the destination; an outage costs nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest

from contents import QUICK, artifact_text, numbered, points, runs
from mlflow_outbox import MLflowTracker
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox.spool.events import Artifact, decode
from mlflow_outbox.testing import faults
from mlflow_outbox.testing.proxy import FaultProxy
from mlflow_outbox_worker import obstacles
from mlflow_outbox_worker.ledger import Ledger
from mlflow_outbox_worker.letters import changed, send_again
from mlflow_outbox_worker.notes import destination_note
from mlflow_outbox_worker.obstacles import Obstacles, Upload
from mlflow_outbox_worker.sink import SinkError
from servers import MlflowServer, eventually

assert mlflow  # imported, so that deliveries are in this process, where the limits can be shrunk

FILE = Artifact("a", "0" * 64, 1, 1)
BROKEN = SinkError("PUT a: 500: Internal Server Error", kind="answer", status=500)


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is judged after three attempts, however quick they are."""
    monkeypatch.setattr(obstacles, "TRIES", 3)
    monkeypatch.setattr(obstacles, "SECONDS", 0.0)


def log_impossible(tracker: MLflowTracker) -> None:
    """Log a run with a path that is file and folder, and points behind it."""
    with tracker.start_run("impossible") as run:
        assert run.log_text("x", "model")
        assert run.log_text("y", "model/weights.txt")
        tracker.flush(0)
        for step in range(20):
            run.log_metric("loss", step / 2, step=step)


def log_sound(tracker: MLflowTracker) -> None:
    """Log a run with nothing wrong."""
    with tracker.start_run("sound") as run:
        for step in range(20):
            run.log_metric("loss", step / 2, step=step)
        run.log_text("z", "notes/text.txt")


def open_ledger(tracker: MLflowTracker) -> Ledger:
    """The ledger of a tracker's outbox, for a look."""
    assert tracker.outbox_path is not None
    return Ledger.open(OutboxDirectory.open(tracker.outbox_path).ledger, read_only=True)


def reasons(tracker: MLflowTracker) -> list[str]:
    """What the ledger says of the runs that do not go on, a sentence for each."""
    with contextlib.closing(open_ledger(tracker)) as ledger:
        return [record.reason for record in ledger.records() if record.reason]


@pytest.mark.usefixtures("soon")
def test_a_path_that_a_server_can_never_store_is_a_dead_letter(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Everything around it arrives, nothing of the attempts is left at the server, and the letter can go elsewhere."""
    tracker = MLflowTracker(experiment_name, mlflow_server.url, outbox_dir=tmp_path, settings=QUICK)
    log_impossible(tracker)
    log_sound(tracker)
    result = tracker.flush(60)
    assert (0, 0, 1) == (result.pending, result.parked, result.dead)
    held = {run.info.run_name: run.info.run_id for run in runs(mlflow_server.url, experiment_name)}
    for name in ("impossible", "sound"):
        assert numbered(20) == points(mlflow_server.url, held[name], "loss")
    assert "x" == artifact_text(mlflow_server.url, held["impossible"], "model")
    assert "z" == artifact_text(mlflow_server.url, held["sound"], "notes/text.txt")
    client = mlflow.MlflowClient(mlflow_server.url)
    assert ["model"] == [file.path for file in client.list_artifacts(held["impossible"])]
    with contextlib.closing(open_ledger(tracker)) as ledger:
        (letter,) = ledger.dead_letters()
    event = decode(letter.payload)
    assert isinstance(event, Artifact)
    assert ("model/weights.txt", 500) == (event.path, letter.status)
    assert "under another name" in letter.reason
    assert tracker.outbox_path is not None
    directory = OutboxDirectory.open(tracker.outbox_path)
    with contextlib.closing(Ledger.open(directory.ledger)) as ledger:
        send_again(directory, ledger, QUICK, letter, changed(event, {"path": "weights.txt"}))
    assert tracker.close(60)
    assert "y" == artifact_text(mlflow_server.url, held["impossible"], "weights.txt")


def test_a_run_that_stands_at_a_file_holds_up_no_other(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it is judged too: other runs arrive whole, the destination counts as well, and the file is named."""
    monkeypatch.setattr(obstacles, "SECONDS", 3600.0)  # however slow the machine is
    tracker = MLflowTracker(experiment_name, mlflow_server.url, outbox_dir=tmp_path, settings=QUICK)
    log_impossible(tracker)
    eventually(lambda: tracker.counters.get("files_not_taken", 0) > 2, 60)
    log_sound(tracker)
    eventually(lambda: tracker.counters.get("runs_verified", 0) == 1, 60)
    with contextlib.closing(open_ledger(tracker)) as ledger:
        assert "ok" == destination_note(ledger).state
    # What is before the file is recorded by itself after a while, and until the next attempt no reason is.
    eventually(lambda: any("PUT model/weights.txt: 500" in reason for reason in reasons(tracker)), 60)
    assert 0 == tracker.close(0).dead
    assert sorted(["impossible", "sound"]) == sorted(
        run.info.run_name for run in runs(mlflow_server.url, experiment_name)
    )


@pytest.mark.usefixtures("soon")
def test_an_outage_of_a_servers_files_makes_no_dead_letter(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """All uploads are answered with 500, however often, while all else goes well; afterwards all arrives."""
    with FaultProxy(mlflow_server.url) as proxy:
        proxy.on(lambda method, _path: method == "PUT", faults.status(500), times=None)
        tracker = MLflowTracker(experiment_name, proxy.url, outbox_dir=tmp_path, settings=QUICK)
        log_sound(tracker)
        eventually(lambda: tracker.counters.get("retried", 0) > 10, 60)
        assert "files_not_taken" not in tracker.counters
        with contextlib.closing(open_ledger(tracker)) as ledger:
            assert "away" == destination_note(ledger).state
        proxy.clear()
        assert tracker.flush(60)
        assert 0 == tracker.close(60).dead
    (run,) = runs(mlflow_server.url, experiment_name)
    assert "z" == artifact_text(mlflow_server.url, run.info.run_id, "notes/text.txt")


@pytest.mark.usefixtures("soon")
def test_a_server_that_is_restarted_costs_nothing(
    own_mlflow_server: Callable[..., MlflowServer], experiment_name: str, tmp_path: Path
) -> None:
    """Its proxy says 502 for a while to this one file: counted, tried again, arrived."""
    server = own_mlflow_server()
    with FaultProxy(server.url) as proxy:
        proxy.on(lambda method, path: method == "PUT" and "notes" in path, faults.status(502), times=2)
        tracker = MLflowTracker(experiment_name, proxy.url, outbox_dir=tmp_path, settings=QUICK)
        log_sound(tracker)
        result = tracker.close(60)
    assert (0, 0, 0) == (result.pending, result.parked, result.dead)
    assert 2 == tracker.counters["files_not_taken"]


class Files:
    """A server of which a test says what it takes, and a clock."""

    def __init__(self) -> None:
        self.bytes_taken = self.content_taken = True
        self.fails: SinkError | None = BROKEN
        self.now = 0.0
        self.obstacles = Obstacles(self, lambda: self.now)  # type: ignore[arg-type] # of a sink, what is needed here

    def takes(self, _kind: str, _owner: str, file: Path | None) -> bool:
        """As a sink."""
        return self.bytes_taken if file is None else self.content_taken

    def attempt(self) -> None:
        """Upload the file itself."""
        if self.fails is not None:
            raise self.fails

    def meet(self, file: Artifact = FILE) -> str:
        """Try a file, and say what came of it."""
        failed = self.obstacles.upload(file, "run", Upload("run", "R", Path("copy"), self.attempt))
        if failed is None:
            return "stored"
        return "alone" if failed[1].alone else failed[1].kind

    def met(self, times: int, seconds: float) -> list[str]:
        """Try a file some times, so many seconds apart."""
        found = []
        for _ in range(times):
            found.append(self.meet())
            self.now += seconds
        return found


def test_files_before_it_that_are_sent_again_do_not_count_for_it() -> None:
    """A window is sent from its beginning each time."""
    files = Files()
    for _ in range(obstacles.TRIES - 1):
        files.fails = None
        assert "stored" == files.meet(Artifact("before", "0" * 64, 1, 1))
        files.fails = BROKEN
        assert ["alone"] == files.met(1, obstacles.SECONDS)
    assert "dead_letter" == files.meet()


def test_a_file_at_which_the_server_hangs_up_is_judged_likewise() -> None:
    """The answer to a large one is lost as a rule."""
    files = Files()
    files.fails = SinkError("reset", kind="connection")
    assert "dead_letter" == files.met(obstacles.TRIES, obstacles.SECONDS)[-1]


def test_a_file_is_judged_after_several_attempts_over_some_time() -> None:
    """Neither quick attempts in a row nor two slow ones are enough."""
    assert ["alone"] * 100 == Files().met(100, obstacles.SECONDS / 101)
    assert ["alone"] * (obstacles.TRIES - 1) == Files().met(obstacles.TRIES - 1, obstacles.SECONDS)
    assert "dead_letter" == Files().met(obstacles.TRIES, obstacles.SECONDS)[-1]


def test_a_content_that_is_not_taken_under_any_name_waits_for_a_person() -> None:
    """A server that is short of room takes a few bytes; it may have room again, which is seen at once."""
    files = Files()
    files.content_taken = False
    assert ["parked", "parked"] == files.met(obstacles.TRIES + 1, obstacles.SECONDS)[-2:]
    files.fails = None
    assert "stored" == files.meet()
    files.fails = BROKEN
    assert "alone" == files.meet()


def test_the_count_begins_again_with_an_outage_and_with_another_file() -> None:
    """What counts is one file, refused by a server that takes all else each time."""
    files = Files()
    files.met(obstacles.TRIES - 1, obstacles.SECONDS)
    files.bytes_taken = False
    assert "retry" == files.meet()
    files.bytes_taken = True
    assert "alone" == files.meet()
    files.met(obstacles.TRIES - 2, obstacles.SECONDS)
    assert "alone" == files.meet(Artifact("b", "0" * 64, 1, 1))


@pytest.mark.parametrize(
    "error",
    [
        SinkError("refused", kind="connection", sent=False),
        SinkError("late", kind="timeout"),
        SinkError("busy", kind="answer", status=429, retry_after=1.0),
    ],
)
def test_no_answer_about_a_file_is_none_against_it(error: SinkError) -> None:
    """Those are of the destination, and nothing else is asked."""
    files = Files()
    files.fails = error
    assert ["retry"] * 10 == files.met(10, obstacles.SECONDS)
