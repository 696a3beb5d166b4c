"""``mlflow-outbox runs`` and ``show``: runs as they are on disk, before, while and after they arrive."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest

from commands import NOBODY, Here, offline, outbox_of, start, withhold
from contents import QUICK
from mlflow_outbox import MLflowTracker
from mlflow_outbox.spool.directory import find_outboxes
from mlflow_outbox_worker.ledger import Ledger
from servers import MlflowServer, eventually
from terminals import Terminal


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Here:
    """Run commands in this process."""
    return Here(capsys, monkeypatch)


def test_an_offline_run_is_read_from_disk(here: Here, tmp_path: Path) -> None:
    """The list has name, status and what waits; show has params, last metrics and files."""
    tracker = MLflowTracker("experiment", NOBODY, outbox_dir=tmp_path, worker="none", settings=QUICK)
    with tracker.start_run("first") as one:
        one.log_params({"lr": 0.1, "depth": 3})
        for step in range(5):
            one.log_metric("loss", 1 / (step + 1), step=step)
        one.log_text("hello", "notes/a.txt")
    tracker.close()
    (entry,) = here("runs", "-d", tmp_path, "--json").data
    assert ("first", "FINISHED", "experiment", "waiting") == (
        entry["name"],
        entry["status"],
        entry["experiment"],
        entry["delivery"],
    )
    out = here("show", one.run_id[:6], "-d", tmp_path).out
    for words in ("first", "FINISHED", "lr     0.1", "notes/a.txt", "not there yet", "9 of its events wait"):
        assert words in out, out
    assert "loss 0.2 4 5" in " ".join(out.split())


def test_a_run_is_listed_by_the_name_that_it_was_given_last(here: Here, tmp_path: Path) -> None:
    """As MLflow will show it: by its tag, or the name with which it was gone on with."""
    tracker = MLflowTracker("experiment", NOBODY, outbox_dir=tmp_path, worker="none", settings=QUICK)
    run = tracker.start_run("first")
    names = [("tagged", lambda: run.set_tag("mlflow.runName", "tagged"))]
    names += [("renamed", lambda: tracker.start_run("renamed", run_id=run.run_id).end())]
    for name, call in names:
        call()
        (entry,) = here("runs", "-d", tmp_path, "--json").data
        (planned,) = here("replay", tmp_path, "--dry-run", "--json").data[0]["runs"]
        shown = " ".join(here("show", run.run_id, "-d", tmp_path).out.split())
        assert (name, name, True) == (entry["name"], planned["name"], f"name {name} experiment" in shown), shown
    tracker.close(0)


def test_events_as_json_lines(here: Here, tmp_path: Path) -> None:
    """Every event, in order, each line valid JSON, also where values are not finite."""
    tracker = MLflowTracker("experiment", NOBODY, outbox_dir=tmp_path, worker="none", settings=QUICK)
    with tracker.start_run() as one:
        one.log_metric("loss", math.inf)
        one.log_metrics({"a": math.nan, "b": 1.0}, step=3)
    tracker.close()

    def refuse(text: str) -> None:
        raise AssertionError(text)

    lines = here("show", one.run_id, "-d", tmp_path, "--json").out.splitlines()
    events = [json.loads(line, parse_constant=refuse) for line in lines]
    assert ["run_started", "metric", "metrics", "run_ended"] == [event["kind"] for event in events]
    assert ("Infinity", {"a": "NaN", "b": 1.0}) == (events[1]["value"], events[2]["values"])


def test_a_delivered_run_is_still_shown(
    here: Here, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Filed runs are read from where they were filed, and found by MLflow's id too."""
    tracker = MLflowTracker(experiment_name, mlflow_server.url, outbox_dir=tmp_path, settings=QUICK)
    with tracker.start_run("first") as one:
        one.log_metric("loss", 0.5, step=7)
    assert tracker.close(60)
    (entry,) = here("runs", "-d", tmp_path, "--json").data
    assert ("first", "FINISHED", 0) == (entry["name"], entry["status"], entry["pending"])
    shown = here("show", entry["mlflow_run_id"], "-d", tmp_path)
    assert one.run_id in shown.out
    assert "loss 0.5 7 1" in " ".join(shown.out.split())
    assert 3 == len(here("show", one.run_id, "-d", tmp_path, "--json").out.splitlines())


def test_following_goes_on_until_the_run_ends(tmp_path: Path) -> None:
    """Events appear as they are logged by another process; with the run the command ends by itself."""
    tracker = MLflowTracker("experiment", NOBODY, outbox_dir=tmp_path, worker="none", settings=QUICK)
    one = tracker.start_run("live")
    one.log_metric("loss", 1.0, step=0)
    following = start("show", one.run_id, "--json", "--follow", "-d", tmp_path)
    assert following.stdout is not None
    assert "run_started" in following.stdout.readline()
    assert '"step": 0' in following.stdout.readline()
    for step in range(1, 4):
        one.log_metric("loss", 1.0, step=step)
        assert f'"step": {step}' in following.stdout.readline()
    one.end()
    tracker.close()
    rest, _ = following.communicate(timeout=120)
    assert '"kind": "run_ended"' in rest
    assert 0 == following.returncode


def test_following_at_a_terminal_ends_with_ctrl_c(tmp_path: Path) -> None:
    """The run as it is, then a line for each event that comes; ctrl-C ends it with 130 and one sentence."""
    tracker = MLflowTracker("experiment", NOBODY, outbox_dir=tmp_path, worker="none", settings=QUICK)
    one = tracker.start_run("live")
    one.log_param("note", "x" * 200)
    with Terminal(60, "show", one.run_id, "--follow", "-d", tmp_path) as terminal:
        terminal.until("note +x+…")
        for step in range(3):
            one.log_metric("loss", 1.0, step=step)
            terminal.until(f"metric loss = 1 at step {step}")
        terminal.type("\x03")
        assert 130 == terminal.end()
    assert all(len(line) <= 60 or len(line.split()) == 1 for line in terminal.lines), terminal.lines
    assert any(line.startswith("mlflow-outbox: error: interrupted") for line in terminal.lines)
    assert "Traceback" not in terminal.written
    assert one.log_metric("loss", 1.0, step=3), "the writer was not disturbed"
    one.end()
    tracker.close()


def test_following_ends_with_its_writer(tmp_path: Path) -> None:
    """A writer that was killed will not end its run: it is said, and a script that follows does not hang."""
    child = os.fork()
    if child == 0:
        tracker = MLflowTracker("experiment", NOBODY, outbox_dir=tmp_path, worker="none", settings=QUICK)
        tracker.start_run("dies").log_metric("loss", 0.0)
        signal.pause()
    try:
        (segment,) = eventually(lambda: list(tmp_path.glob("*/runs/*/*.log")))
        following = start("show", segment.parent.name, "--json", "--follow", "-d", tmp_path)
        assert following.stdout is not None
        assert "run_started" in following.stdout.readline()
        assert following.poll() is None
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    rest, _ = following.communicate(timeout=120)
    assert "nobody writes to this run any more, although it has not ended" in rest
    assert 0 == following.returncode


def test_hostile_keys_are_escaped(here: Here, tmp_path: Path) -> None:
    """Names and values of a run cannot move the cursor, clear the screen or pass for markup."""
    tracker = MLflowTracker("exp\x1b[2Jeriment", NOBODY, outbox_dir=tmp_path, worker="none", settings=QUICK)
    with tracker.start_run("na\x1b]0;owned\x07me [red]x[/red]") as one:
        one.log_param("lr", "a\x1b[31m\nb\u202e")
    tracker.close()
    for words in (["runs"], ["show", one.run_id], ["status"]):
        out = here(*words, "-d", tmp_path).out
        assert out, words
        assert all(character == "\n" or character.isprintable() for character in out), (words, out)
    assert "[red]x[/red]" in here("runs", "-d", tmp_path).out


def test_an_unclear_name_is_asked_about(here: Here, tmp_path: Path) -> None:
    """Several runs that begin alike, or none: code 2, and a sentence that says what to do."""
    offline(tmp_path, runs=20)
    Ledger.open(outbox_of(tmp_path) / "delivery", report=pytest.fail).close()  # which is asked too, in UTF-8
    many = here("show", "", "-d", tmp_path)
    assert 2 == many.code
    assert "20 runs begin with" in many.err
    for name in ("nothing", "no id", "\udcff"):
        none = here("show", name, "-d", tmp_path)
        assert 2 == none.code
        assert "mlflow-outbox runs lists" in none.err


def test_a_run_is_found_by_the_beginning_of_its_id_where_the_ledger_is_damaged(here: Here, tmp_path: Path) -> None:
    """It is on disk, and needs no ledger to be read; what is not there may be known to the ledger."""
    (run_id,) = offline(tmp_path)
    delivery = outbox_of(tmp_path) / "delivery"
    delivery.joinpath("cache.db").write_bytes(b"no database" * 1000)
    shown = here("show", run_id[:6], "-d", tmp_path)
    assert (0, True) == (shown.code, "13 of its events wait" in shown.out), shown
    other = here("show", "f" * 32, "-d", tmp_path)
    assert (1, True) == (other.code, "ledger" in other.err), other


def test_a_run_is_found_beside_an_outbox_whose_ledger_is_not_safe_to_use(here: Here, tmp_path: Path) -> None:
    """By the beginning of its id, in the outbox behind that one."""
    (run_id,) = offline(tmp_path)
    offline(tmp_path, "http://127.0.0.0:9")
    (first, other) = find_outboxes(tmp_path)
    assert (other / "runs" / run_id).is_dir()
    shutil.rmtree(first / "delivery")
    (first / "delivery").symlink_to(tmp_path)
    shown = here("show", run_id[:31], "-d", tmp_path)
    assert (0, True) == (shown.code, "13 of its events wait" in shown.out), shown


def test_a_run_that_the_disk_does_not_give_keeps_nobody_from_the_others(
    here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is named, and the exit code says so; so is a ledger without which nobody knows what was delivered."""
    withheld, other = offline(tmp_path, runs=2)
    with monkeypatch.context() as patch:
        withhold(patch, withheld)
        done = here("runs", "-d", tmp_path, "--json")
        assert (1, [other]) == (done.code, [entry["run_id"] for entry in done.data])
        assert f"the run {withheld} cannot be read" in done.err
    ledger = outbox_of(tmp_path) / "delivery"
    Ledger.open(ledger).close()
    (ledger / "cache.db").write_bytes(bytes(range(256)) * 40)
    done = here("runs", "-d", tmp_path, "--json")
    assert (1, 2, True) == (done.code, len(done.data), "is damaged" in done.err), done


def test_a_huge_backlog_is_listed_without_being_read(
    here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond a number of events the list counts them and says that it did not look inside."""
    monkeypatch.setattr("mlflow_outbox_worker.cli.runs._READ", 5)
    offline(tmp_path, points=50)
    (entry,) = here("runs", "-d", tmp_path, "--json").data
    assert (53, None) == (entry["pending"], entry["status"])
