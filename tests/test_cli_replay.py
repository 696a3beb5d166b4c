"""``mlflow-outbox replay`` as a command: its progress bar, its jobs, its end by a signal."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from commands import NOBODY, Here, command, environment, offline, run, waited
from contents import QUICK, artifact_text, client, numbered, points, runs, the_run
from mlflow_outbox import MLflowTracker
from mlflow_outbox.spool import frame
from mlflow_outbox.spool.events import Params, encode
from mlflow_outbox.testing.faults import accept_hang
from mlflow_outbox.testing.proxy import Action, Exchange, FaultProxy
from mlflow_outbox_worker.cli.bar import Rate, ReplayBar
from mlflow_outbox_worker.ledger import Ledger
from mlflow_outbox_worker.records import DeadLetter
from mlflow_outbox_worker.replay import Progress
from replays import contents_of, log_offline
from servers import MlflowServer, eventually
from terminals import HIDE_CURSOR, SHOW_CURSOR, Terminal


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Here:
    """Run commands in this process."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return Here(capsys, monkeypatch)


class Meeting:
    """Holds requests back until so many are under way at once, and remembers how many there were at most."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._changed = threading.Condition()
        self._here = 0
        self.most = 0

    @property
    def action(self) -> Action:
        """What a proxy does to a request."""
        return Action("meet", self._hold)

    def _hold(self, exchange: Exchange) -> None:
        with self._changed:
            self._here += 1
            self.most = max(self.most, self._here)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self.most >= self._number, 20)
        exchange.wait(0.02)  # room for one too many to show
        exchange.forward()
        with self._changed:
            self._here -= 1


class TestJobs:
    @pytest.mark.parametrize("jobs", [1, 3])
    def test_so_many_runs_are_sent_side_by_side_and_no_more(
        self, jobs: int, here: Here, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
    ) -> None:
        """Requests of that many runs are under way at the server at once."""
        meeting = Meeting(jobs)
        with FaultProxy(mlflow_server.url) as proxy:
            proxy.on("runs/log-batch", meeting.action, times=None)
            offline(tmp_path / "box", proxy.url, experiment=experiment_name, runs=6)
            assert 0 == here("replay", tmp_path / "box", "--jobs", jobs).code
        assert jobs == meeting.most
        assert 6 == len(runs(mlflow_server.url, experiment_name))

    @pytest.mark.parametrize("jobs", ["0", "-1", "two", "1.5", ""])
    def test_other_numbers_are_bad_usage(self, jobs: str, here: Here, tmp_path: Path) -> None:
        """Code 2, with the option named, before anything is sent."""
        offline(tmp_path / "box")
        done = here("replay", tmp_path / "box", "--jobs", jobs)
        assert 2 == done.code
        assert "--jobs" in done.err


def test_a_run_that_was_deleted_where_it_is_sent_to_is_named_with_what_mlflow_says(
    here: Here, sqlite_uri: str, experiment_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its experiment has no journal among what is replayed, which was an error of ours; restored, it is sent."""
    offline(tmp_path / "box", experiment=experiment_name)
    words = ("replay", tmp_path / "box", "--to", sqlite_uri)
    assert 0 == here(*words).code
    (sent,) = runs(sqlite_uri, experiment_name)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another machine"))
    with client(sqlite_uri) as api:
        api.delete_run(sent.info.run_id)
        done = here(*words)
        assert 4 == done.code, done
        assert "must be in the 'active' state" in done.err
        assert "TypeError" not in done.err
        api.restore_run(sent.info.run_id)
    assert 0 == here(*words).code


def refused_in_part(experiment: str, uri: str, root: Path) -> str:
    """Log a run of which MLflow refuses one param; return its id."""
    tracker = MLflowTracker(experiment, uri, outbox_dir=root, worker="none", settings=QUICK)
    with tracker.start_run("refused in part") as one:
        for depth in (3, 4):
            one.log_param("depth", depth)
    tracker.close(0)
    return one.run_id


def test_what_mlflow_refuses_of_a_replay_elsewhere_is_named_each_time(
    here: Here, sqlite_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """It is in no outbox, so that no other command shows it."""
    run_id = refused_in_part(experiment_name, NOBODY, tmp_path / "box")
    for _ in range(2):
        done = here("replay", tmp_path / "box", "--to", sqlite_uri)
        assert 5 == done.code, done
        assert f"run {run_id}: param depth = 4 was refused: Changing param values is not allowed" in done.err
        assert "dead list" not in done.err
    [told] = here("replay", tmp_path / "box", "--to", sqlite_uri, "--json").data
    assert [(run_id, {"depth": "4"})] == [(one["run_id"], one["event"]["values"]) for one in told["refused"]]


def test_a_bundle_s_run_that_the_server_has_lost_is_named_with_what_sends_it_anew(
    here: Here, own_mlflow_server: Callable[..., MlflowServer], experiment_name: str, tmp_path: Path
) -> None:
    """The bundle was unpacked for as long as it was sent: a path of that leads nowhere, nor would it say where to."""
    server, bundle = own_mlflow_server(), tmp_path / "runs.tar"
    tracker = MLflowTracker(experiment_name, NOBODY, outbox_dir=tmp_path / "box", worker="none", settings=QUICK)
    one = tracker.start_run("goes on")
    words = ("replay", bundle, "--to", server.url)
    for step in range(2):
        assert one.log_metric("loss", step / 2, step=step)
        assert 0 == here("export", "--all", "--force", "-o", bundle, "-d", tmp_path / "box").code
        if step == 0:
            assert 0 == here(*words).code
            server.wipe()
            server.start()
    done = here(*words)
    assert 4 == done.code, done
    assert f"run {one.run_id} was skipped" in done.err
    assert "send it anew from its beginning: the same command with --again" in done.err
    assert 0 == here(*words, "--again").code
    assert numbered(2) == points(server.url, the_run(server.url, experiment_name).info.run_id, "loss")
    tracker.close(0)


def test_a_file_that_a_copy_of_an_outbox_lacks_is_sent_once_it_is_there_by_what_is_said(
    here: Here, sqlite_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """Who copies an outbox in use may have an event of which the file came after the list of files was made."""
    run_id = log_offline(experiment_name, NOBODY, tmp_path / "box")
    [copy] = tmp_path.glob(f"box/*/runs/{run_id}/files/*")
    late = copy.rename(tmp_path / "late")
    words = ("replay", tmp_path / "box", "--to", sqlite_uri)
    for _ in range(2):
        done = here(*words)
        assert (5, True) == (done.code, "the same command with --again sends them too" in done.err), done
        assert "the copy of 'reports/report.txt' is not in the outbox" in done.err
    late.rename(copy)
    assert 0 == here(*words, "--again").code
    assert "report of offline" == artifact_text(
        sqlite_uri, the_run(sqlite_uri, experiment_name).info.run_id, "reports/report.txt"
    )


def test_what_mlflow_refuses_of_an_outbox_of_one_s_own_is_named_with_what_can_be_done(
    here: Here, sqlite_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """There they are dead letters like others."""
    refused_in_part(experiment_name, sqlite_uri, tmp_path / "box")
    done = here("replay", tmp_path / "box")
    assert (5, True) == (done.code, "mlflow-outbox dead list -d " in done.err), done
    [letter] = here("dead", "list", "-d", tmp_path / "box", "--json").data
    assert {"depth": "4"} == letter["event"]["values"]


class TestJson:
    def test_a_dry_run_is_told_to_programs(self, here: Here, tmp_path: Path) -> None:
        """Numbers are numbers, and of a bundle its own path is named, not where it is unpacked just now."""
        [run_id] = offline(tmp_path / "box")
        bundle = tmp_path / "runs.tar"
        assert 0 == here("export", "--all", "-d", tmp_path / "box", "-o", bundle).code
        done = here("replay", bundle, "--dry-run", "--json")
        assert 0 == done.code
        [job] = done.data
        assert [{"run_id": run_id, "in": str(bundle), "name": "run-0", "status": "FINISHED", "to_send": 13}] == job[
            "runs"
        ]
        assert str(tmp_path / "box") in here("replay", tmp_path / "box", "--dry-run", "--json").data[0]["runs"][0]["in"]

    def test_that_all_was_delivered_before_is_told_to_programs(
        self, here: Here, sqlite_uri: str, experiment_name: str, tmp_path: Path
    ) -> None:
        """As the same command says it to people."""
        offline(tmp_path / "box", sqlite_uri, experiment=experiment_name)
        assert 0 == here("flush", "-d", tmp_path / "box", "--timeout", "60").code
        assert "1 run delivered before" in here("replay", tmp_path / "box").out
        for more in ([], ["--dry-run"]):
            [told] = here("replay", tmp_path / "box", "--json", *more).data
            assert ("before", 1, []) == (told["cut_short"], told["delivered_before"], told["runs"])


class Fragment:
    """A delivered run of several segments, the first of which was reclaimed, beside one that is whole."""

    def __init__(self, uri: str, experiment: str, root: Path, here: Here) -> None:
        small = dataclasses.replace(QUICK, segment_bytes=4096)
        self.root = root
        self.run_id = log_offline(experiment, uri, root, points=600, settings=small)
        log_offline(experiment, uri, root, name="whole")
        assert 0 == here("flush", "-d", root, "--timeout", "60").code
        [folder] = root.glob(f"*/delivered/{self.run_id}")
        first, second, *_ = sorted(folder.glob("*.log"))
        self.lost = frame.unpack_header(second.read_bytes())[0].first_seq
        self.saved = shutil.copytree(folder, root.parent / "saved")
        first.unlink()


@pytest.fixture
def fragment(sqlite_uri: str, experiment_name: str, tmp_path: Path, here: Here) -> Fragment:
    """What is left of a run."""
    return Fragment(sqlite_uri, experiment_name, tmp_path / "box", here)


class TestARunWhoseFirstEventsWereReclaimed:
    """A copy of what is left would have neither its name nor its params, and look whole."""

    @pytest.mark.parametrize("how", ["to another store", "into another experiment", "again", "as a bundle", "dry"])
    def test_it_is_named_and_nothing_is_sent_forgotten_or_written(
        self, how: str, fragment: Fragment, here: Here, tmp_path: Path
    ) -> None:
        """With a code that is no success, and with what to do."""
        words = {
            "to another store": ["replay", fragment.root, "--to", (tmp_path / "other").as_uri()],
            "into another experiment": ["replay", fragment.root, "--experiment", "other"],
            "again": ["replay", fragment.root, "--again"],
            "as a bundle": ["export", "--all", "-d", fragment.root, "-o", tmp_path / "runs.tar"],
            "dry": ["replay", fragment.root, "--again", "--dry-run"],
        }
        before = contents_of(tmp_path)
        done = here(*words[how])
        assert 1 == done.code
        assert f"run {fragment.run_id} has lost its first {fragment.lost} events on disk" in done.err
        assert "1 run would arrive without the beginning" in done.err
        assert "--incomplete" in done.err
        assert before == contents_of(tmp_path)

    def test_what_is_left_of_it_is_sent_when_that_is_asked_for(
        self, fragment: Fragment, here: Here, experiment_name: str, tmp_path: Path
    ) -> None:
        """It is said how much is missing, before and after."""
        other = (tmp_path / "other").as_uri()
        done = here("replay", fragment.root, "--to", other, "--incomplete", "--json")
        assert 0 == done.code
        assert {fragment.run_id: fragment.lost} == {
            one["run_id"]: one["missing"] for one in done.data[0]["runs"] if one["missing"]
        }
        [copy] = [one for one in runs(other, experiment_name) if one.data.params.get("name") != "whole"]
        assert 602 - fragment.lost == len(points(other, copy.info.run_id, "loss"))

    def test_what_is_left_of_it_is_sent_again_when_that_is_asked_for(self, fragment: Fragment, here: Here) -> None:
        """To the store that has the rest of it still, or has it not."""
        done = here("replay", fragment.root, "--again", "--incomplete")
        assert 0 == done.code
        assert f"run {fragment.run_id} has lost its first {fragment.lost} events on disk" in done.err
        assert f"{fragment.lost} events missing or damaged on disk" in done.out

    def test_its_dead_letters_stay_when_what_is_left_of_it_is_sent_again(self, fragment: Fragment, here: Here) -> None:
        """Where the segment of such an event was reclaimed, the letter is all that there is of it."""
        [outbox] = fragment.root.glob("*/outbox.json")
        refused = encode(Params({"depth": "5"}, 5))
        letter = DeadLetter(fragment.run_id, "ab" * 16, refused, "it was refused", "BAD", 400, 1000)
        with contextlib.closing(Ledger.open(outbox.parent / "delivery")) as ledger:
            record = ledger.record(fragment.run_id)
            assert record is not None
            ledger.commit(record, dead=[letter])
        assert 0 == here("replay", fragment.root, "--again", "--incomplete").code
        [held] = here("dead", "list", "-d", fragment.root, "--json").data
        assert {"depth": "5"} == held["event"]["values"]

    def test_a_bundle_of_it_is_one_of_what_is_left(
        self, fragment: Fragment, here: Here, experiment_name: str, tmp_path: Path
    ) -> None:
        """Which is no success when it is replayed elsewhere either, unless that is asked for."""
        bundle, other = tmp_path / "runs.tar", (tmp_path / "other").as_uri()
        assert 0 == here("export", fragment.run_id, "-d", fragment.root, "-o", bundle, "--incomplete").code
        assert 1 == here("replay", bundle, "--to", other).code
        assert 0 == here("replay", bundle, "--to", other, "--incomplete").code
        copy = the_run(other, experiment_name)
        assert 602 - fragment.lost == len(points(other, copy.info.run_id, "loss"))

    def test_a_copy_that_still_has_its_beginning_makes_it_whole(
        self, fragment: Fragment, here: Here, experiment_name: str, tmp_path: Path
    ) -> None:
        """The two are read as one run."""
        other = (tmp_path / "other").as_uri()
        assert 0 == here("replay", fragment.saved, fragment.root, "--to", other).code
        [copy] = [one for one in runs(other, experiment_name) if one.data.params.get("name") != "whole"]
        assert numbered(600) == points(other, copy.info.run_id, "loss")


class Continued:
    """A run that a second job went on with; what the first one logged of it was delivered and reclaimed."""

    def __init__(self, uri: str, experiment: str, root: Path, here: Here) -> None:
        self.root = root
        self.run_id = log_offline(experiment, uri, root)
        assert 0 == here("flush", "-d", root, "--timeout", "60").code
        self.saved = shutil.copytree(root, root.parent / "saved")
        go_on(experiment, uri, root, self.run_id)
        assert 0 == here("gc", "--older-than", "0", "-d", root).code


def go_on(experiment: str, uri: str, root: Path, run_id: str) -> None:
    """Be a job that goes on with a run and logs ten points."""
    tracker = MLflowTracker(experiment, uri, outbox_dir=root, worker="none", settings=QUICK)
    with tracker.start_run(run_id=run_id) as run:
        for step in range(100, 110):
            run.log_metric("loss", step / 2, step=step)
    tracker.close(0)


@pytest.fixture
def continued(sqlite_uri: str, experiment_name: str, tmp_path: Path, here: Here) -> Continued:
    """What is left of a run."""
    return Continued(sqlite_uri, experiment_name, tmp_path / "box", here)


class TestARunOfWhichAWholeProgramWasReclaimed:
    """No segment that is there tells of those that are not."""

    @pytest.mark.parametrize("how", ["to another store", "again", "as a bundle", "by its id"])
    def test_it_is_named_and_nothing_is_sent_forgotten_or_written(
        self, how: str, continued: Continued, here: Here, tmp_path: Path
    ) -> None:
        """The ledger of its outbox knows how much is missing."""
        words = {
            "to another store": ["replay", continued.root, "--to", (tmp_path / "other").as_uri()],
            "again": ["replay", continued.root, "--again"],
            "as a bundle": ["export", "--all", "-d", continued.root, "-o", tmp_path / "runs.tar"],
            "by its id": ["export", continued.run_id, "-d", continued.root, "-o", tmp_path / "runs.tar"],
        }
        before = contents_of(tmp_path)
        done = here(*words[how])
        assert 1 == done.code
        assert f"run {continued.run_id} has lost its first 104 events on disk" in done.err
        assert before == contents_of(tmp_path)

    def test_it_is_named_where_there_is_no_ledger(self, continued: Continued, here: Here, tmp_path: Path) -> None:
        """The event with which it began is missing; how many others are, nobody knows any more."""
        [outbox] = continued.root.glob("*/outbox.json")
        for ledger in outbox.parent.glob("delivery/*"):
            ledger.unlink()
        done = here("replay", continued.root, "--to", (tmp_path / "other").as_uri())
        assert 1 == done.code
        assert f"run {continued.run_id} has lost its first events on disk" in done.err

    def test_one_that_was_reclaimed_before_it_went_on_is_named(
        self, sqlite_uri: str, experiment_name: str, here: Here, tmp_path: Path
    ) -> None:
        """All of it was gone by then, and nothing but its id told the second job that it began here."""
        root = tmp_path / "box"
        run_id = log_offline(experiment_name, sqlite_uri, root)
        assert 0 == here("flush", "-d", root, "--timeout", "60").code
        assert 0 == here("gc", "--older-than", "0", "-d", root).code
        go_on(experiment_name, sqlite_uri, root, run_id)
        done = here("replay", root, "--to", (tmp_path / "other").as_uri())
        assert 1 == done.code
        assert f"run {run_id} has lost its first events on disk" in done.err

    def test_what_was_logged_in_between_is_missed_too(
        self, continued: Continued, here: Here, experiment_name: str, sqlite_uri: str, tmp_path: Path
    ) -> None:
        """With the first job's segments the run has its beginning, and still not all of it."""
        assert 0 == here("flush", "-d", continued.root, "--timeout", "60").code
        go_on(experiment_name, sqlite_uri, continued.root, continued.run_id)
        assert 0 == here("gc", "--older-than", "0", "-d", continued.root).code
        other = (tmp_path / "other").as_uri()
        done = here("replay", continued.saved, continued.root, "--to", other)
        assert 1 == done.code
        assert f"run {continued.run_id} has lost its first 12 events on disk" in done.err

    def test_it_goes_on_where_its_beginning_is(
        self, continued: Continued, here: Here, experiment_name: str, sqlite_uri: str
    ) -> None:
        """Its own destination lacks nothing, and gets the rest."""
        assert 0 == here("replay", continued.root).code
        run = the_run(sqlite_uri, experiment_name)
        assert numbered(110) == points(sqlite_uri, run.info.run_id, "loss")

    def test_a_copy_that_still_has_it_makes_it_whole(
        self, continued: Continued, here: Here, experiment_name: str, tmp_path: Path
    ) -> None:
        """The two are read as one run."""
        other = (tmp_path / "other").as_uri()
        assert 0 == here("replay", continued.saved, continued.root, "--to", other).code
        run = the_run(other, experiment_name)
        assert numbered(110) == points(other, run.info.run_id, "loss")

    def test_a_run_that_began_in_mlflow_has_lost_nothing(
        self, sqlite_uri: str, experiment_name: str, here: Here, tmp_path: Path
    ) -> None:
        """How it began was never on this disk; what was logged here is copied as it always was."""
        with client(sqlite_uri) as mlflow:
            run_id = mlflow.create_run(mlflow.create_experiment(experiment_name)).info.run_id
        go_on(experiment_name, sqlite_uri, tmp_path / "box", run_id)
        for place in ("before it is delivered", "afterwards"):
            assert 0 == here("replay", tmp_path / "box", "--to", (tmp_path / place).as_uri()).code
            assert 0 == here("flush", "-d", tmp_path / "box", "--timeout", "60").code


class TestBar:
    @pytest.fixture
    def drawn(self) -> Callable[..., list[str]]:
        """Draw a bar after steps of one second each; return its lines."""
        from rich.console import Console

        def draw(columns: int, *steps: Progress, endless: bool = False) -> list[str]:
            seconds = iter(range(1000))
            bar = ReplayBar(endless=endless, clock=lambda: float(next(seconds)))
            console = Console(width=columns, force_terminal=True, color_system=None, record=True, file=io.StringIO())
            for step in steps:
                bar.update(step)
            console.print(bar)
            return console.export_text().splitlines()

        return draw

    def test_a_wide_terminal_sees_everything(self, drawn: Callable[..., list[str]]) -> None:
        """Runs, the bar, how much in per cent and in events, the rate, and how long it will take yet."""
        (line,) = drawn(120, Progress(0, 40_000, 0, 40), Progress(1000, 40_000, 1, 40))
        for words in (" 1 of 40 runs", "━", "  2%", "1,000 of 40,000 events", "1,000 events/s", "39 s left"):
            assert words in line
        assert len(line) <= 120

    @pytest.mark.parametrize("columns", [20, 32, 40, 50, 60, 80, 100])
    def test_a_narrow_one_sees_what_matters_most(self, columns: int, drawn: Callable[..., list[str]]) -> None:
        """Nothing wraps, whatever the width and however long the note is."""
        note = "the destination does not take events now: " + "connection refused " * 20
        lines = drawn(columns, Progress(0, 400_000, 0, 40), Progress(1000, 400_000, 1, 40, note))
        assert 2 == len(lines)
        assert all(len(line) <= columns - 3 for line in lines), "the terminal's echo of ctrl-C would begin a new line"
        assert lines[0].startswith(" 1")
        assert "0%" in lines[0] or columns < 40

    def test_it_keeps_its_width_while_it_counts(self, drawn: Callable[..., list[str]]) -> None:
        """The columns stand still from the first event to the last."""
        steps = [Progress(events, 40_000, events // 1000, 40) for events in range(0, 40_001, 100)]
        for columns in (50, 80, 120):
            lines = [drawn(columns, *steps[: n + 1])[0] for n in range(1, len(steps), 50)]
            assert 1 == len({(line.index("%"), line.index("/s") if "/s" in line else 0) for line in lines})

    def test_what_is_followed_has_no_end(self, drawn: Callable[..., list[str]]) -> None:
        """Neither per cent nor a time left: nobody knows what will be logged yet."""
        first, second = drawn(80, Progress(0, 0, 0, 1), Progress(500, 500, 0, 1, "writing"), endless=True)
        assert "following 1 run: 500 events, 500 a second" == first.strip()
        assert "writing" == second.strip()

    def test_reading_back_is_said(self, drawn: Callable[..., list[str]]) -> None:
        """All is sent and the command goes on: it says why."""
        assert "reading back" in drawn(80, Progress(10, 10, 1, 2))[1]
        assert 1 == len(drawn(80, Progress(10, 10, 2, 2)))

    def test_a_note_gives_no_orders(self, drawn: Callable[..., list[str]]) -> None:
        """Answers of servers are shown with their control characters escaped, and mark nothing up."""
        (_, note) = drawn(120, Progress(1, 2, 0, 1, "no\x1b[2J\n[red]x[/red]"))
        assert r"no\x1b[2J\n[red]x[/red]" == note.strip()

    def test_the_rate_is_that_of_the_last_seconds(self) -> None:
        """A server that stands still makes it fall to nothing, and a fast beginning is forgotten."""
        rate = Rate(10.0)
        assert 0 == rate.per_second()
        for second in range(6):
            rate.add(float(second), 1000 * second)
        assert 1000 == rate.per_second()
        for second in range(6, 30):
            rate.add(float(second), 5000)
        assert 0 == rate.per_second()
        rate.add(30.0, 5100)
        assert 10 == pytest.approx(rate.per_second(), abs=1)


class TestTerminal:
    def test_a_bar_at_a_terminal_and_nothing_of_it_at_the_end(
        self, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
    ) -> None:
        """It is drawn while runs are sent; then the cursor is there again and the last line says how it went."""
        offline(tmp_path / "box", mlflow_server.url, experiment=experiment_name, runs=3, points=300)
        with Terminal(80, "replay", tmp_path / "box", MLFLOW_OUTBOX_BATCH_POINTS="100") as terminal:
            code = terminal.end()
        assert 0 == code, terminal.written
        assert any("of 3 runs" in line and "%" in line for line in terminal.lines), terminal.written
        assert "3 runs sent" in terminal.lines[-2]
        assert terminal.written.rfind(HIDE_CURSOR) < terminal.written.rfind(SHOW_CURSOR)

    def test_plain_lines_in_a_pipe(self, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path) -> None:
        """No escape sequence, no bar, nothing drawn over."""
        offline(tmp_path / "box", mlflow_server.url, experiment=experiment_name)
        done = run("replay", tmp_path / "box", TERM="xterm-256color")
        assert 0 == done.code, done
        assert f"1 run sent to {mlflow_server.url}\n" == done.out
        first, *now_and_then = done.err.splitlines()
        assert f"mlflow-outbox: 1 run to {mlflow_server.url}" == first
        assert all(re.fullmatch(r"mlflow-outbox: [\d,]+ of 13 events, \d of 1 run", line) for line in now_and_then)

    def test_ctrl_c_gives_the_cursor_back_and_says_how_far_it_came(
        self, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
    ) -> None:
        """Also while a request hangs: 130 at once, what is sent and what is left; started again, it goes on."""
        with FaultProxy(mlflow_server.url) as proxy:
            proxy.on("runs/log-batch", accept_hang(), times=None)
            offline(tmp_path / "box", proxy.url, experiment=experiment_name)
            with Terminal(80, "replay", tmp_path / "box") as terminal:
                terminal.until("of 1 run")
                eventually(lambda: any("log-batch" in request.path for request in proxy.requests), 60)
                terminal.type("\x03")
                code, waits = terminal.end_waiting()
                assert 130 == code
                assert waits < 3
            proxy.clear()
            assert terminal.written.rfind(HIDE_CURSOR) < terminal.written.rfind(SHOW_CURSOR)
            said = "\n".join(terminal.lines)
            assert "1 run left" in said
            assert "the same command goes on where this one stopped" in said
            assert "Traceback" not in said
            assert 0 == run("replay", tmp_path / "box").code
        (held,) = runs(mlflow_server.url, experiment_name)
        assert numbered(10) == points(mlflow_server.url, held.info.run_id, "loss")

    def test_what_was_begun_again_goes_on_without_that_word(
        self, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
    ) -> None:
        """With it everything would be sent from the beginning once more."""
        with FaultProxy(mlflow_server.url) as proxy:
            offline(tmp_path / "box", proxy.url, experiment=experiment_name)
            assert 0 == run("replay", tmp_path / "box").code
            proxy.on("mlflow/", accept_hang(), times=None)
            done = run("replay", tmp_path / "box", "--again", "--timeout", "1")
            assert (3, True) == (done.code, "1 run left" in done.out), done  # its files were filed when it began
            assert "the same command without --again goes on where this one" in done.err
            done = run("replay", tmp_path / "box", "--timeout", "1")
            assert (3, True) == (done.code, "the same command goes on where this one stopped" in done.err), done
            proxy.clear()
            done = run("replay", tmp_path / "box")
            assert (0, True) == (done.code, "1 run sent" in done.out), done
        assert 1 == len(runs(mlflow_server.url, experiment_name))

    @pytest.mark.parametrize(("seconds", "boxes", "more"), [(0.0, 1, []), (0.5, 1, ["--follow"]), (0.5, 3, [])])
    def test_a_hung_server_holds_up_no_replay(
        self, seconds: float, boxes: int, more: list[str], tmp_path: Path
    ) -> None:
        """The time-out is kept to within a second, however many outboxes there are, and what is left is called so."""
        with FaultProxy("http://127.0.0.1:9") as proxy:
            proxy.on("mlflow", accept_hang(), times=None)
            for number in range(boxes):
                offline(tmp_path / "box", f"{proxy.url}/{number}")
            done, spent = waited("replay", tmp_path / "box", "--timeout", seconds, *more)
        assert 3 == done.code, done
        assert boxes == done.out.count("1 run left")
        assert spent < seconds + 1.0

    def test_sigterm_ends_it_in_order(self, tmp_path: Path) -> None:
        """What a scheduler sends to a job whose time is over: left over is code 3, and the summary says so."""
        with FaultProxy("http://127.0.0.1:9") as proxy:
            proxy.on("mlflow", accept_hang(), times=None)
            offline(tmp_path / "box", proxy.url)
            process = subprocess.Popen(
                command("replay", tmp_path / "box"),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment(),
            )
            eventually(lambda: len(proxy.requests) > 0, 60)
            process.send_signal(signal.SIGTERM)
            out, _ = process.communicate(timeout=120)
        assert 3 == process.returncode, out
        assert "1 run left" in out
