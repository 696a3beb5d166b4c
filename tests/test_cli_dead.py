"""``mlflow-outbox dead``: no letter is lost, whatever is done with it and whoever else is at work."""

from __future__ import annotations

import contextlib
import errno
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from commands import Here, closing, command, environment, offline, outbox_of
from contents import QUICK, artifact_text, artifacts, the_run
from mlflow_outbox import MLflowTracker, Settings
from mlflow_outbox.errors import InvalidEvent
from mlflow_outbox.spool.directory import OutboxDirectory, find_outboxes
from mlflow_outbox.spool.events import Artifact, Event, Metric, Params, RunEnded, Tags, encode
from mlflow_outbox.spool.reader import RunReader
from mlflow_outbox.testing.disk import FailingDisk
from mlflow_outbox.testing.faults import status
from mlflow_outbox.testing.proxy import FaultProxy
from mlflow_outbox_worker.ledger import Ledger
from mlflow_outbox_worker.letters import LetterRefused, changed, fields_of, send_again
from mlflow_outbox_worker.records import DeadLetter, RunRecord
from servers import MlflowServer, eventually


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Here:
    """Run commands in this process."""
    return Here(capsys, monkeypatch)


def with_letters(root: Path, *events: Event) -> str:
    """Make an outbox whose one run has these dead letters; return the run's id."""
    (run_id,) = offline(root)
    ledger = Ledger.open(outbox_of(root) / "delivery")
    letters = [DeadLetter(run_id, "ab" * 16, encode(event), "it was refused", "BAD", 400, 1000) for event in events]
    ledger.commit(RunRecord(run_id), dead=letters)
    ledger.close()
    return run_id


def conflict(here: Here, uri: str, experiment: str, root: Path) -> None:
    """Deliver a run with two values of one param: the second becomes a dead letter."""
    tracker = MLflowTracker(experiment, uri, outbox_dir=root, worker="none")
    with tracker.start_run() as one:
        one.log_param("depth", 3)
        one.log_param("depth", 5)
    tracker.close()
    assert 5 == here("flush", "-d", root, "--timeout", 60).code


def written(root: Path, run_id: str) -> list[Event]:
    """Return the events that wait in the journals of a run."""
    reader = RunReader(OutboxDirectory.open(outbox_of(root)).run(run_id))
    return [event for _, event in reader.window({}).events]


def test_list_and_show_say_what_and_why(here: Here, tmp_path: Path) -> None:
    """In words and as JSON: the event, MLflow's answer, and what can be edited."""
    run_id = with_letters(tmp_path, Params({"lr": "0.1"}, 5), Metric("loss", float("nan"), 6, 7))
    out = here("dead", "list", "-d", tmp_path).out
    assert "param lr = 0.1" in out
    assert "metric loss = nan at step 7" in out
    first, second = here("dead", "list", "-d", tmp_path, "--json").data
    assert ("1", run_id, "it was refused", 400) == (first["id"], first["run_id"], first["reason"], first["status"])
    assert {"kind": "metric", "key": "loss", "value": "NaN", "time_ms": 6, "step": 7} == second["event"]
    shown = here("dead", "show", "2", "-d", tmp_path)
    assert "key, value, step, time_ms" in shown.out
    assert here("dead", "show", "000000000002", "-d", tmp_path).out == shown.out


def test_a_letter_of_no_run_of_the_outbox_is_written_nowhere(here: Here, tmp_path: Path) -> None:
    """F90: the ledger of an outbox that somebody else has packed may name any place for it."""
    offline(tmp_path / "given")
    with contextlib.closing(Ledger.open(outbox_of(tmp_path / "given") / "delivery")) as ledger:
        letter = DeadLetter("../../../home", "ab" * 16, encode(Params({"lr": "0.1"}, 5)), "no", "BAD", 400, 1000)
        ledger.commit(RunRecord("../../../home", remote_id="ab" * 16), dead=[letter])
    done = here("dead", "retry", "--all", "-d", tmp_path / "given")
    assert (1, True) == (done.code, "no run of this outbox" in done.err), done
    assert not (tmp_path / "home").exists()


def test_letters_of_several_outboxes_are_listed_with_the_name_of_each(here: Here, tmp_path: Path) -> None:
    """Their numbers are the same ones; of one outbox alone the name would only take room."""
    with_letters(tmp_path / "a", Params({"lr": "0.1"}, 5))
    assert "outbox" not in here("dead", "list", "-d", tmp_path / "a").out
    with_letters(tmp_path / "b", Params({"lr": "0.2"}, 5))
    for name in ("a", "b"):
        (found,) = (tmp_path / name).iterdir()
        found.rename(tmp_path / f"{name}-{found.name}")
        (tmp_path / name).rmdir()
    listed = here("dead", "list", "-d", tmp_path).out
    for name, value in (("a-", "0.1"), ("b-", "0.2")):
        (line,) = [line for line in listed.splitlines() if f"lr = {value}" in line]
        assert name in line
        assert ["1"] == line.split()[:1]


def test_a_letter_is_found_beside_an_outbox_whose_ledger_is_damaged(here: Here, tmp_path: Path) -> None:
    """It is one of those that are listed; where it is not, the damage is what is said."""
    with_letters(tmp_path, Params({"lr": "0.1"}, 5))
    offline(tmp_path, "http://127.0.0.1:10")
    (bad,) = [path for path in tmp_path.iterdir() if "127-0-0-1-10-" in path.name]
    Ledger.open(bad / "delivery").close()
    (bad / "delivery" / "cache.db").write_bytes(bytes(range(256)) * 40)
    listed = here("dead", "list", "-d", tmp_path)
    assert (1, True) == (listed.code, "param lr = 0.1" in listed.out)
    shown = here("dead", "show", "1", "-d", tmp_path)
    assert (0, True) == (shown.code, "it was refused" in shown.out)
    none = here("dead", "show", "2", "-d", tmp_path)
    assert (1, True) == (none.code, "is damaged" in none.err)


def test_a_dropped_letter_is_printed_and_gone(here: Here, tmp_path: Path) -> None:
    """Only with --yes where nobody can be asked; what is dropped was printed first."""
    with_letters(tmp_path, Params({"lr": "0.1"}, 5))
    refused = here("dead", "drop", "1", "-d", tmp_path)
    assert 1 == refused.code
    assert "--yes" in refused.err
    assert 1 == len(here("dead", "list", "-d", tmp_path, "--json").data)
    dropped = here("dead", "drop", "1", "-d", tmp_path, "--yes")
    assert 0 == dropped.code
    assert {"lr": "0.1"} == dropped.data["event"]["values"]
    assert [] == here("dead", "list", "-d", tmp_path, "--json").data


@pytest.mark.parametrize("keys", [1, 10_000])
def test_a_letter_that_cannot_be_printed_is_not_dropped(keys: int, here: Here, tmp_path: Path) -> None:
    """Standard output is a file on a full disk, which a buffer hides for a while, or closed: the letter stays."""
    with_letters(tmp_path, Params({f"p{number}": "0.1" for number in range(keys)}, 5))
    words = command("dead", "drop", "1", "-d", tmp_path, "--yes")
    env = environment(PYTHONUNBUFFERED="")
    with open("/dev/full", "w") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, env=env, check=False)
    assert 1 == done.returncode
    assert "nothing was dropped" in done.stderr
    assert "No space left on device" in done.stderr
    assert 1 == len(done.stderr.splitlines()), done.stderr
    closed = subprocess.run(closing(">&-", *words), stderr=subprocess.PIPE, text=True, env=env, check=False)
    assert (1, True) == (closed.returncode, "nothing was dropped" in closed.stderr), closed
    assert ["1"] == [letter["id"] for letter in here("dead", "list", "-d", tmp_path, "--json").data]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["show", "9"], 2),
        (["show", "../x"], 2),
        (["retry"], 2),
        (["retry", "1", "--all"], 2),
        (["retry", "1", "9"], 2),
        (["edit", "1", "--set", "key"], 2),
        (["edit", "1", "--set", "value"], 2),
        (["edit", "1", "--set", "stem=1"], 2),
        (["edit", "1", "--set", "key=a\x1b[2J"], 1),
        (["edit", "1"], 2),
    ],
)
def test_wrong_words_change_nothing(here: Here, tmp_path: Path, words: list[str], code: int) -> None:
    """One sentence, no traceback, no control characters, and the letter is where it was."""
    run_id = with_letters(tmp_path, Params({"lr": "0.1"}, 5))
    before = written(tmp_path, run_id)
    done = here("dead", *words, "-d", tmp_path)
    assert code == done.code, done
    assert "\x1b" not in done.out + done.err
    assert "Traceback" not in done.err
    assert 1 == len(here("dead", "list", "-d", tmp_path, "--json").data)
    assert before == written(tmp_path, run_id)


def test_a_letter_that_cannot_be_sent_keeps_no_other_back(here: Here, tmp_path: Path) -> None:
    """The copy of its file is gone; it stays, is named by its number, and both counts are given with code 1."""
    lost = Artifact("model.bin", "0" * 64, 1, 5)
    run_id = with_letters(tmp_path, Params({"a": "1"}, 5), lost, Params({"b": "2"}, 5))
    done = here("dead", "retry", "--all", "-d", tmp_path)
    assert 1 == done.code
    assert "2 events will be sent again; mlflow-outbox flush does it now; 1 dead letter cannot be sent\n" == done.out
    assert "the file of the dead letter 2 is not in the outbox any more; drop the letter" in done.err
    assert [Params({"a": "1"}, 5), Params({"b": "2"}, 5)] == written(tmp_path, run_id)[-2:]
    assert ["2"] == [letter["id"] for letter in here("dead", "list", "-d", tmp_path, "--json").data]


def test_many_letters_of_a_run_are_sent_by_one_writer(here: Here, tmp_path: Path) -> None:
    """Each writer is one more that all later ones look at: thousands would take the better part of an hour."""
    many = [Params({f"p{number}": "1"}, 5) for number in range(100)]
    run_id = with_letters(tmp_path, *many)
    before = len(RunReader(OutboxDirectory.open(outbox_of(tmp_path)).run(run_id)).segments())
    done = here("dead", "retry", "--all", "-d", tmp_path)
    assert (0, True) == (done.code, done.out.startswith("100 events will be sent again")), done
    assert many == written(tmp_path, run_id)[-100:]
    assert before + 1 == len(RunReader(OutboxDirectory.open(outbox_of(tmp_path)).run(run_id)).segments())
    assert [] == here("dead", "list", "-d", tmp_path, "--json").data


def test_a_ledger_that_cannot_be_used_keeps_no_other_outbox_s_letters_from_being_sent(
    here: Here, tmp_path: Path
) -> None:
    """It is named, with code 1; the letters of the outboxes behind it are sent."""
    run_id = with_letters(tmp_path, Params({"a": "1"}, 5))
    path = outbox_of(tmp_path)
    offline(tmp_path, "http://127.0.0.0:9")
    (first, _) = find_outboxes(tmp_path)
    assert first != path
    shutil.rmtree(first / "delivery")
    (first / "delivery").symlink_to(tmp_path)
    done = here("dead", "retry", "--all", "-d", tmp_path)
    assert (1, True) == (done.code, done.out.startswith("1 event will be sent again")), done
    assert "symbolic link" in done.err
    events = RunReader(OutboxDirectory.open(path).run(run_id)).window({}).events
    assert Params({"a": "1"}, 5) == events[-1][1]


@pytest.mark.parametrize("words", [["1", "01"], ["0000000000000001", "1", "1"]])
def test_a_letter_named_twice_is_sent_once(words: list[str], here: Here, tmp_path: Path) -> None:
    """However many zeros it is written with."""
    run_id = with_letters(tmp_path, Params({"a": "1"}, 5), Params({"b": "2"}, 5))
    before = written(tmp_path, run_id)
    done = here("dead", "retry", *words, "-d", tmp_path)
    assert (0, True) == (done.code, done.out.startswith("1 event will be sent again")), done
    assert [*before, Params({"a": "1"}, 5)] == written(tmp_path, run_id)


def test_a_retried_letter_arrives(
    here: Here, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """A server with narrower limits refused it; since they are wider, retry and flush deliver it and all is well."""
    with FaultProxy(mlflow_server.url) as proxy:
        proxy.on(
            "log-batch",
            status(400, body='{"error_code": "INVALID_PARAMETER_VALUE", "message": "too long"}'),
            times=None,
        )
        tracker = MLflowTracker(experiment_name, proxy.url, outbox_dir=tmp_path, worker="none")
        with tracker.start_run() as one:
            one.log_param("depth", 3)
            one.log_metric("loss", 0.5, step=1)
        tracker.close()
        assert 5 == here("flush", "-d", tmp_path, "--timeout", 60).code
        assert 0 < len(here("dead", "list", "-d", tmp_path, "--json").data)
        proxy.clear()
        assert 0 == here("dead", "retry", "--all", "-d", tmp_path).code
        done = here("flush", "-d", tmp_path, "--timeout", 60)
    assert 0 == done.code, done
    held = the_run(mlflow_server.url, experiment_name)
    assert ({"depth": "3"}, {"loss": 0.5}) == (held.data.params, held.data.metrics)
    assert [] == OutboxDirectory.open(outbox_of(tmp_path)).run_ids(), "filed again"


def test_an_edited_tag_is_not_older_than_what_was_refused(
    here: Here, sqlite_uri: str, experiment_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was set some time after its run began, in one batch with what that began with; it arrives all the same."""
    root = tmp_path / "outbox"
    monkeypatch.setenv("MLFLOW_TRUNCATE_LONG_VALUES", "false")
    tracker = MLflowTracker(experiment_name, sqlite_uri, outbox_dir=root, worker="none")
    with tracker.start_run(tags={"team": "vision"}) as one:
        began = time.time_ns() // 1_000_000
        eventually(lambda: time.time_ns() // 1_000_000 > began + 5)
        one.set_tag("notes", "long" * 2001)
    tracker.close()
    assert 5 == here("flush", "-d", root, "--timeout", 60).code
    assert 0 == here("dead", "edit", "1", "--set", "value=short", "-d", root).code
    done = here("flush", "-d", root, "--timeout", 60)
    assert 0 == done.code, done
    assert "short" == the_run(sqlite_uri, experiment_name).data.tags.get("notes")


def test_a_retried_content_does_not_take_the_place_of_a_later_one(
    here: Here, sqlite_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """A file stood where its folder had to be; a person removed it, and the program had logged on meanwhile."""
    root = tmp_path / "outbox"
    tracker = MLflowTracker(experiment_name, sqlite_uri, outbox_dir=root, worker="none", settings=QUICK)
    one = tracker.start_run()
    one.log_metric("loss", 1.0)
    assert 0 == here("flush", "-d", root, "--timeout", 60).code
    held = the_run(sqlite_uri, experiment_name)
    place = Path(held.info.artifact_uri.removeprefix("file://"), "notes")
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("in the way")
    one.log_text("the first", "notes/report.txt")
    assert 5 == here("flush", "-d", root, "--timeout", 60).code
    place.unlink()
    one.log_text("the second", "notes/report.txt")
    one.end()
    tracker.close(0)
    assert 5 == here("flush", "-d", root, "--timeout", 60).code
    assert 0 == here("dead", "retry", "--all", "-d", root).code
    assert 0 == here("flush", "-d", root, "--timeout", 60).code
    assert "the second" == artifact_text(sqlite_uri, held.info.run_id, "notes/report.txt")


def test_a_letter_refused_again_comes_back(
    here: Here, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """The param has another value in MLflow for good: after a retry the letter is in the queue again, once."""
    conflict(here, mlflow_server.url, experiment_name, tmp_path)
    assert 0 == here("dead", "retry", "1", "-d", tmp_path).code
    assert 5 == here("flush", "-d", tmp_path, "--timeout", 60).code
    (letter,) = here("dead", "list", "-d", tmp_path, "--json").data
    assert ("2", {"depth": "5"}) == (letter["id"], letter["event"]["values"])


def test_an_edited_letter_arrives_under_its_new_key(
    here: Here, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """And reading back expects the replacement, not what was logged: the run is verified, nothing is parked."""
    conflict(here, mlflow_server.url, experiment_name, tmp_path)
    done = here("dead", "edit", "1", "--set", "key=depth_2", "-d", tmp_path)
    assert (0, "will be sent: param depth_2 = 5\n") == (done.code, done.out)
    flushed = here("flush", "-d", tmp_path, "--timeout", 60)
    assert 0 == flushed.code, flushed
    assert {"depth": "3", "depth_2": "5"} == the_run(mlflow_server.url, experiment_name).data.params


def test_a_run_goes_on_after_its_letter_was_dropped(
    here: Here, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """A resumed run is verified anew: the param that MLflow never took and a person dropped is no difference."""
    first = MLflowTracker(experiment_name, mlflow_server.url, outbox_dir=tmp_path, settings=QUICK)
    with first.start_run() as one:
        one.log_param("depth", 3)
    assert first.close(60)
    remote = the_run(mlflow_server.url, experiment_name).info.run_id
    other = MLflowTracker(experiment_name, mlflow_server.url, outbox_dir=tmp_path / "b", settings=QUICK)
    with other.start_run(run_id=remote) as again:
        again.log_param("depth", 5)
    assert 1 == other.close(60).dead
    assert 0 == here("dead", "drop", "1", "--yes", "-d", tmp_path / "b").code
    with other.start_run(run_id=remote) as once_more:
        once_more.log_metric("loss", 1.0)
    result = other.close(60)
    assert result, result
    done = here("flush", "-d", tmp_path / "b", "--timeout", 60)
    assert 0 == done.code, done


def test_a_filed_artifact_is_brought_back(
    here: Here, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Its copy was filed with the run; a retry finds it, sends it, and leaves no run behind in runs/."""
    with FaultProxy(mlflow_server.url) as proxy:
        proxy.on("artifacts", status(400, body='{"error_code": "BAD_REQUEST", "message": "no"}'), times=None)
        tracker = MLflowTracker(experiment_name, proxy.url, outbox_dir=tmp_path, worker="none")
        with tracker.start_run() as one:
            one.log_text("weights", "model.txt")
        tracker.close()
        assert 5 == here("flush", "-d", tmp_path, "--timeout", 60).code
        assert 0 == here("gc", "--older-than", "0", "-d", tmp_path).code
        assert 1 == len(OutboxDirectory.open(outbox_of(tmp_path)).delivered_ids()), "its letter still needs the file"
        proxy.clear()
        assert 0 == here("dead", "retry", "1", "-d", tmp_path).code
        done = here("flush", "-d", tmp_path, "--timeout", 60)
    assert 0 == done.code, done
    held = the_run(mlflow_server.url, experiment_name)
    assert ["model.txt"] == artifacts(mlflow_server.url, held.info.run_id)
    assert [] == OutboxDirectory.open(outbox_of(tmp_path)).run_ids()


def test_it_works_beside_a_running_worker(
    here: Here, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """The experiment goes on logging and its worker delivering while a letter is edited and sent again."""
    tracker = MLflowTracker(experiment_name, mlflow_server.url, outbox_dir=tmp_path, settings=QUICK)
    one = tracker.start_run()
    one.log_param("depth", 3)
    assert tracker.flush(60)
    one.log_param("depth", 5)
    assert 1 == tracker.flush(60).dead
    assert 0 == here("dead", "edit", "1", "--set", "key=depth_2", "-d", tmp_path).code
    one.log_metric("loss", 1.0)
    done = tracker.flush(60)
    assert (True, 0) == (bool(done), done.dead), "a letter that was dealt with is none"
    held = the_run(mlflow_server.url, experiment_name)
    assert ({"depth": "3", "depth_2": "5"}, {"loss": 1.0}) == (held.data.params, held.data.metrics)
    one.end()
    assert tracker.close(60)


def test_killed_in_a_retry_every_letter_is_somewhere(tmp_path: Path) -> None:
    """SIGKILL at random moments: each event is in the queue or in the journal afterwards, or in both; never nowhere."""
    number = 60
    run_id = with_letters(tmp_path, *(Params({f"p{n}": str(n)}, 5) for n in range(number)))
    ledger_path = outbox_of(tmp_path) / "delivery"
    seen = 0
    for _ in range(3):
        process = subprocess.Popen(
            command("dead", "retry", "--all", "-d", tmp_path), env=environment(), stdout=subprocess.DEVNULL
        )
        while process.poll() is None and len(written(tmp_path, run_id)) <= 13 + seen + 3:
            pass
        process.kill()
        process.wait()
        journal = {key for event in written(tmp_path, run_id) if isinstance(event, Params) for key in event.values}
        ledger = Ledger.open(ledger_path, read_only=True)
        queue = {key for letter in ledger.dead_letters() for key in _params(letter)}
        assert {f"p{n}" for n in range(number)} <= journal | queue
        seen = len(journal)
    assert seen > 3


def _params(letter: DeadLetter) -> set[str]:
    from mlflow_outbox_worker.letters import event_of

    event = event_of(letter)
    assert isinstance(event, Params)
    return set(event.values)


@pytest.mark.parametrize(
    ("event", "fields", "expected"),
    [
        (Metric("a", 1.0, 5, 2), {"value": "0.5"}, Metric("a", 0.5, 5, 2)),
        (Metric("a", 1.0, 5, 2), {"key": "b", "step": "3", "time_ms": "9"}, Metric("b", 1.0, 9, 3)),
        (Metric("a", 1.0, 5, 2), {"value": "nan", "step": "9007199254740993"}, None),
        (Params({"a": "1"}, 5), {"value": "2=3"}, Params({"a": "2=3"}, 5)),
        (Tags({"a": "1"}, 5), {"key": "b"}, Tags({"b": "1"}, 5)),
        (Artifact("x/y.txt", "0" * 64, 1, 5), {"path": "x/z.txt"}, Artifact("x/z.txt", "0" * 64, 1, 5)),
        (RunEnded("DONE", 5), {"status": "finished"}, RunEnded("FINISHED", 5)),
    ],
)
def test_what_an_edit_makes_of_an_event(event: Event, fields: dict[str, str], expected: Event | None) -> None:
    """The named fields change, all others stay; numbers keep their precision."""
    result = changed(event, fields)
    if expected is not None:
        assert expected == result
    else:
        assert isinstance(result, Metric)
        assert 9007199254740993 == result.step


@pytest.mark.parametrize(
    ("event", "fields", "error"),
    [
        (Metric("a", 1.0, 5, 2), {"value": "many"}, InvalidEvent),
        (Metric("a", 1.0, 5, 2), {"step": "1.5"}, InvalidEvent),
        (Metric("a", 1.0, 5, 2), {"key": "a$"}, InvalidEvent),
        (Artifact("x", "0" * 64, 1, 5), {"path": "../x"}, InvalidEvent),
        (RunEnded("DONE", 5), {"status": "OVER"}, InvalidEvent),
        (Params({"a": "1", "b": "2"}, 5), {"key": "c"}, LetterRefused),
        (Params({"a": "1"}, 5), {"time_ms": "1"}, LetterRefused),
    ],
)
def test_what_an_edit_refuses(event: Event, fields: dict[str, str], error: type[Exception]) -> None:
    """As a logging call would, with a sentence."""
    with pytest.raises(error):
        changed(event, fields)


def test_an_event_of_several_keys_has_no_fields() -> None:
    """Delivery narrows a refusal down to one key; should another letter turn up, it can be sent again or dropped."""
    assert () == fields_of(Params({"a": "1", "b": "2"}, 5))


@pytest.mark.parametrize("operation", ["create", "write", "datasync"])
def test_a_disk_that_fails_keeps_the_letter(operation: Any, tmp_path: Path) -> None:
    """The event cannot be put on disk to stay, so the letter stays, and the message says why."""
    run_id = with_letters(tmp_path, Params({"lr": "0.1"}, 5))
    directory = OutboxDirectory.open(outbox_of(tmp_path))
    ledger = Ledger.open(directory.ledger)
    (letter,) = ledger.dead_letters()
    disk = FailingDisk()
    disk.fail(operation, error=errno.ENOSPC, times=None)
    with pytest.raises(LetterRefused, match="stays"):
        send_again(directory, ledger, Settings(), letter, disk=disk)
    assert [letter] == list(ledger.dead_letters())
    send_again(directory, ledger, Settings(), letter)
    assert [] == list(ledger.dead_letters())
    assert Params({"lr": "0.1"}, 5) == written(tmp_path, run_id)[-1]
    ledger.close()
