"""Reading back says what MLflow lacks, and nothing else."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from commands import make_unreadable
from contents import QUICK, artifacts, client, runs, the_run
from mlflow_outbox import MLflowTracker
from mlflow_outbox.spool.events import Metric, encode
from mlflow_outbox_worker.ledger import Ledger
from mlflow_outbox_worker.records import DeadLetter
from replays import NOW_MS, command, contents_of, log_offline, the_outbox
from servers import MlflowServer

NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, list[dict[str, object]]]]:
    """Read back, and return the exit code and what was said of each run."""

    def verify(*arguments: object) -> tuple[int, list[dict[str, object]]]:
        capsys.readouterr()
        code = command("verify", "--json", "--outbox-dir", tmp_path / "outbox", *arguments)
        return code, json.loads(capsys.readouterr().out)

    return verify


def test_a_file_whose_name_a_server_decodes_more_than_once_is_found_there(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """It was called missing, the run sent once more, and a person told that others had changed it."""
    with MLflowTracker(experiment_name, mlflow_server.url, outbox_dir=tmp_path / "outbox", settings=QUICK) as tracker:
        with tracker.start_run() as run:
            run.log_text("text", "50%2525.txt")
        result = tracker.flush(60)
        assert (True, 0, 0) == (bool(result), result.parked, result.dead)
        found = {"verification_differences", "artifacts_altered"} & {k for k, v in tracker.counters.items() if v}
    assert ["50%.txt"] == artifacts(mlflow_server.url, the_run(mlflow_server.url, experiment_name).info.run_id)
    assert set() == found


@pytest.fixture
def delivered(sqlite_uri: str, experiment_name: str, tmp_path: Path) -> str:
    """A run that was delivered to a database, whose file a test can change behind MLflow's back."""
    run_id = log_offline(experiment_name, sqlite_uri, tmp_path / "outbox")
    assert 0 == command("flush", "--outbox-dir", tmp_path / "outbox", "--timeout", "60")
    return run_id


def change(uri: str, sql: str) -> None:
    """Change MLflow's database."""
    with sqlite3.connect(uri.removeprefix("sqlite:///")) as database:
        assert database.execute(sql).rowcount > 0
    database.close()


@pytest.mark.parametrize("store", ["server", "sqlite", "file"])
def test_a_delivered_run_is_held_in_full_to_the_last_point_and_byte(
    store: str,
    mlflow_server: MlflowServer,
    sqlite_uri: str,
    file_uri: str,
    experiment_name: str,
    tmp_path: Path,
    verified: Callable[..., tuple[int, list[dict[str, object]]]],
) -> None:
    """In every kind of store; reading back changes nothing on disk."""
    uri = {"server": mlflow_server.url, "sqlite": sqlite_uri, "file": file_uri}[store]
    log_offline(experiment_name, uri, tmp_path / "outbox")
    assert 0 == command("flush", "--outbox-dir", tmp_path / "outbox", "--timeout", "60")
    filed = the_outbox(tmp_path / "outbox") / "delivered"
    before = contents_of(filed)
    code, [said] = verified("--deep")
    assert (0, "same", []) == (code, said["state"], said["differences"])
    assert before == contents_of(filed)


@pytest.mark.parametrize("store", ["server", "sqlite", "file"])
def test_a_zero_with_a_sign_is_held_where_a_database_keeps_none(
    store: str,
    mlflow_server: MlflowServer,
    sqlite_uri: str,
    file_uri: str,
    experiment_name: str,
    tmp_path: Path,
    verified: Callable[..., tuple[int, list[dict[str, object]]]],
) -> None:
    """SQLite keeps none; the point was called missing, and with ``verify="full"`` its run waited for a person."""
    uri = {"server": mlflow_server.url, "sqlite": sqlite_uri, "file": file_uri}[store]
    tracker = MLflowTracker(experiment_name, uri, outbox_dir=tmp_path / "outbox", worker="none", settings=QUICK)
    with tracker, tracker.start_run() as run:
        for step, value in enumerate([0.5, -0.0, 0.25, -0.0]):
            assert run.log_metric("loss", value, step=step)
    assert 0 == command("flush", "--outbox-dir", tmp_path / "outbox", "--timeout", "60")
    code, [said] = verified("--deep")
    assert (0, "same", []) == (code, said["state"], said["differences"])


def test_a_point_in_the_middle_is_missed_by_a_deep_look_only(
    delivered: str, sqlite_uri: str, verified: Callable[..., tuple[int, list[dict[str, object]]]]
) -> None:
    """A first look compares the latest points; a deep one all."""
    change(sqlite_uri, "DELETE FROM metrics WHERE step = 50")
    assert 0 == verified()[0]
    code, [said] = verified("--deep", delivered[:12])
    assert (1, "different") == (code, said["state"])
    assert ["of the metric 'loss' 1 of 100 points are missing"] == said["differences"]


@pytest.mark.parametrize(
    ("refused", "deleted", "shallow", "deep"),
    [
        ([50], "step = 50", 0, 0),
        ([50], "step IN (50, 51)", 0, 1),
        ([99], "step = 99", 0, 0),
        ([99], "step >= 98", 1, 1),
        ([98, 99], "step >= 98", 0, 0),
        ([50], "step >= 0", 1, 1),
        (range(100), "step >= 0", 0, 0),
    ],
)
def test_a_dead_letter_of_a_point_excuses_that_point_only(
    refused: Iterable[int],
    deleted: str,
    shallow: int,
    deep: int,
    delivered: str,
    sqlite_uri: str,
    tmp_path: Path,
    verified: Callable[..., tuple[int, list[dict[str, object]]]],
) -> None:
    """MLflow refused some of a hundred points, and lacks more than these: a first look sees it at the latest."""
    points = [encode(Metric("loss", i / 2, NOW_MS + i, i)) for i in refused]
    letters = [DeadLetter(delivered, "", point, "no", "", 400, NOW_MS) for point in points]
    ledger = Ledger.open(the_outbox(tmp_path / "outbox") / "delivery")
    record = ledger.record(delivered)
    assert record is not None
    ledger.commit(record, dead=letters)
    ledger.close()
    change(sqlite_uri, f"DELETE FROM metrics WHERE {deleted}")
    change(sqlite_uri, "DELETE FROM latest_metrics")
    with sqlite3.connect(sqlite_uri.removeprefix("sqlite:///")) as database:
        latest = "SELECT key, value, timestamp, MAX(step), is_nan, run_uuid FROM metrics GROUP BY key"
        database.execute(f"INSERT INTO latest_metrics (key, value, timestamp, step, is_nan, run_uuid) {latest}")
    database.close()
    assert (shallow, deep) == (verified()[0], verified("--deep")[0])


def test_a_param_a_tag_and_a_status_that_differ_are_named(
    delivered: str, sqlite_uri: str, verified: Callable[..., tuple[int, list[dict[str, object]]]]
) -> None:
    """Each in a sentence of its own."""
    change(sqlite_uri, "UPDATE params SET value = '4' WHERE key = 'depth'")
    change(sqlite_uri, "DELETE FROM tags WHERE key = 'phase'")
    change(sqlite_uri, "UPDATE runs SET status = 'RUNNING'")
    code, [said] = verified()
    assert 1 == code
    text = "\n".join(map(str, said["differences"]))  # type: ignore[call-overload]  # it is a list
    assert all(
        part in text for part in ("the param 'depth' is '4', not '3'", "the tag 'phase'", "RUNNING, not FINISHED")
    )


def test_an_artifact_with_another_content_of_the_same_size_is_found_by_a_deep_look(
    delivered: str,
    sqlite_uri: str,
    experiment_name: str,
    tmp_path: Path,
    verified: Callable[..., tuple[int, list[dict[str, object]]]],
) -> None:
    """Another size, or no file at all, is seen at the first look."""
    folder = Path(the_run(sqlite_uri, experiment_name).info.artifact_uri.removeprefix("file://"))
    file = folder / "reports" / "report.txt"
    file.write_text(file.read_text().upper())
    assert 0 == verified()[0]
    code, [said] = verified("--deep")
    assert (1, ["the artifact 'reports/report.txt' has another content than was logged"]) == (code, said["differences"])
    file.write_text("short")
    assert 1 == verified()[0]
    file.unlink()
    code, [said] = verified()
    assert (1, ["the artifact 'reports/report.txt' is missing"]) == (code, said["differences"])


def test_a_run_that_was_not_sent_is_pending_and_one_that_mlflow_never_had_is_absent(
    mlflow_server: MlflowServer,
    experiment_name: str,
    tmp_path: Path,
    verified: Callable[..., tuple[int, list[dict[str, object]]]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What waits is no difference, and has an exit code of its own."""
    log_offline(experiment_name, mlflow_server.url, tmp_path / "outbox")
    code, [said] = verified()
    assert (3, "absent", 104) == (code, said["state"], said["pending"]), said
    assert 3 == command("verify", "--outbox-dir", tmp_path / "outbox")
    words = capsys.readouterr().out
    assert "MLflow does not have this run yet: 104 of its events wait" in words
    assert "0 of 1 run held by MLflow in full; 1 run with events that wait: mlflow-outbox flush" in words


def test_a_run_that_was_deleted_in_mlflows_database_is_different(
    delivered: str, sqlite_uri: str, experiment_name: str, verified: Callable[..., tuple[int, list[dict[str, object]]]]
) -> None:
    """It was there once; that it is gone is said, and is no crash."""
    for table in ("metrics", "latest_metrics", "params", "tags", "runs"):
        change(sqlite_uri, f"DELETE FROM {table}")
    code, [said] = verified()
    assert (1, "absent") == (code, said["state"])
    assert [] == runs(sqlite_uri, experiment_name)


def test_what_was_replayed_elsewhere_is_read_back_from_there(
    mlflow_server: MlflowServer,
    experiment_name: str,
    tmp_path: Path,
    verified: Callable[..., tuple[int, list[dict[str, object]]]],
) -> None:
    """With --to, like the replay; another machine finds it by its tag."""
    log_offline(experiment_name, NOWHERE, tmp_path / "outbox")
    assert 0 == command("replay", tmp_path / "outbox", "--to", mlflow_server.url)
    assert 0 == verified("--to", mlflow_server.url, "--deep")[0]
    (tmp_path / "state").rename(tmp_path / "lost")
    assert 0 == verified("--to", mlflow_server.url)[0]


def test_what_was_replayed_into_another_experiment_is_read_back_too(
    mlflow_server: MlflowServer,
    experiment_name: str,
    tmp_path: Path,
    verified: Callable[..., tuple[int, list[dict[str, object]]]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each of the places is compared; what is not there yet is sent by a replay, not by a flush."""
    log_offline(experiment_name, NOWHERE, tmp_path / "outbox")
    assert 3 == command("verify", "--outbox-dir", tmp_path / "outbox", "--to", mlflow_server.url)
    said = capsys.readouterr().out
    assert f"with events that wait: mlflow-outbox replay {tmp_path / 'outbox'} --to {mlflow_server.url}" in said
    other = ["--experiment", f"{experiment_name}-imported"]
    assert 0 == command("replay", tmp_path / "outbox", "--to", mlflow_server.url, *other)
    code, said_of = verified("--to", mlflow_server.url, "--deep")
    assert (0, ["same"]) == (code, [one["state"] for one in said_of])
    assert 0 == command("replay", tmp_path / "outbox", "--to", mlflow_server.url)
    code, said_of = verified("--to", mlflow_server.url)
    assert (0, ["same", "same"]) == (code, [one["state"] for one in said_of])
    assert 2 == len({one["remote_id"] for one in said_of})


def test_what_another_machine_replayed_into_an_experiment_is_read_back_from_there(
    mlflow_server: MlflowServer,
    experiment_name: str,
    tmp_path: Path,
    verified: Callable[..., tuple[int, list[dict[str, object]]]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With --experiment, like the replay; what is not there yet is sent by that replay."""
    log_offline(experiment_name, mlflow_server.url, tmp_path / "outbox")
    there = ["--experiment", f"{experiment_name} imported"]
    assert 3 == command("verify", "--outbox-dir", tmp_path / "outbox", *there)
    assert f"replay {tmp_path / 'outbox'} --experiment '{experiment_name} imported'" in capsys.readouterr().out
    assert 0 == command("replay", tmp_path / "outbox", *there)
    assert 0 == verified(*there, "--deep")[0]
    (tmp_path / "state").rename(tmp_path / "lost")
    for to in ([], ["--to", mlflow_server.url]):
        code, [said] = verified(*there, *to)
        assert (0, "same") == (code, said["state"])
        assert (3, "absent") == (verified(*to)[0], verified(*to)[1][0]["state"]), "in its own experiment it is not"


def test_a_server_that_is_away_is_no_difference(
    experiment_name: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    verified: Callable[..., tuple[int, list[dict[str, object]]]],
) -> None:
    """Nothing is said about the runs, to programs neither; the code is that of doctor."""
    run_id = log_offline(experiment_name, NOWHERE, tmp_path / "outbox")
    assert 3 == command("verify", "--outbox-dir", tmp_path / "outbox")
    said = capsys.readouterr()
    assert "cannot be asked now" in said.err
    assert "" == said.out
    code, [one] = verified()
    assert (3, run_id, "unknown", []) == (code, one["run_id"], one["state"], one["differences"])
    assert 3 == command("doctor", "--outbox-dir", tmp_path / "outbox")


@pytest.mark.parametrize("to", ["", "sqlite:///new.db", "file:newstore", "./mlx", "foo"])
def test_a_store_that_does_not_exist_is_not_made(
    to: str,
    delivered: str,
    sqlite_uri: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    verified: Callable[..., tuple[int, list[dict[str, object]]]],
) -> None:
    """The outbox's own that was moved away, or one that was never there: it is named, and nothing was compared."""
    monkeypatch.chdir(tmp_path)
    database = Path(sqlite_uri.removeprefix("sqlite:///"))
    if not to:
        database.rename(tmp_path / "moved.db")
    there = sorted(tmp_path.iterdir())
    words = ["--to", to] if to else []
    assert 1 == command("verify", "--outbox-dir", tmp_path / "outbox", *words)
    said = capsys.readouterr()
    path = tmp_path / to.rpartition(":///")[2].removeprefix("file:") if to else database
    assert f"{path} does not exist; nothing was compared" in said.err
    assert "" == said.out
    code, [one] = verified(*words)
    assert (1, delivered, "unknown") == (code, one["run_id"], one["state"])
    assert there == sorted(tmp_path.iterdir())


def test_what_cannot_be_read_on_disk_is_not_called_held(
    delivered: str,
    sqlite_uri: str,
    experiment_name: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    verified: Callable[..., tuple[int, list[dict[str, object]]]],
) -> None:
    """Whether it is in MLflow nobody can tell: exit code 1 for all runs and for that one, 0 for the other."""
    damaged = log_offline(experiment_name, sqlite_uri, tmp_path / "outbox")
    (segment,) = (the_outbox(tmp_path / "outbox") / "runs" / damaged).glob("*.log")
    make_unreadable(segment)
    code, said = verified()
    assert (1, {delivered: "same", damaged: "unknown"}) == (code, {one["run_id"]: one["state"] for one in said})
    assert 1 == command("verify", "--outbox-dir", tmp_path / "outbox")
    words = capsys.readouterr()
    assert "1 of 2 runs held by MLflow in full" in words.out
    assert f"the run {damaged} was not compared: nothing of it can be read on disk" in words.err
    assert 1 == command("verify", "--outbox-dir", tmp_path / "outbox", damaged)
    words = capsys.readouterr()
    assert ("", True, True) == (words.out, str(segment) in words.err, "was not compared" in words.err)
    code, said = verified(damaged)
    assert (1, ["unknown"]) == (code, [one["state"] for one in said])
    assert 0 == verified(delivered)[0]


def test_one_outbox_whose_ledger_is_damaged_keeps_nobody_from_the_others(
    delivered: str,
    experiment_name: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    verified: Callable[..., tuple[int, list[dict[str, object]]]],
) -> None:
    """It is named, and its runs are unknown; its dead letters are, and those of others are listed."""
    other = log_offline(experiment_name, NOWHERE, tmp_path / "outbox")
    (bad,) = [
        path.parent for path in (tmp_path / "outbox").glob("*/outbox.json") if (path.parent / "runs" / other).is_dir()
    ]
    Ledger.open(bad / "delivery").close()
    (bad / "delivery" / "cache.db").write_bytes(bytes(range(256)) * 40)
    code, said = verified()
    assert (1, {delivered: "same", other: "unknown"}) == (code, {str(one["run_id"]): one["state"] for one in said})
    assert (1, True) == (command("dead", "list", "-d", tmp_path / "outbox"), "is damaged" in capsys.readouterr().err)


def test_what_others_added_to_the_run_is_no_difference(
    delivered: str, sqlite_uri: str, experiment_name: str, verified: Callable[..., tuple[int, list[dict[str, object]]]]
) -> None:
    """A note, a further metric, a model that was registered later."""
    with client(sqlite_uri) as mlflow:
        run_id = the_run(sqlite_uri, experiment_name).info.run_id
        mlflow.set_tag(run_id, "mlflow.note.content", "good")
        mlflow.log_metric(run_id, "later", 1.0)
        mlflow.set_tag(run_id, "phase", "archived")
    assert 0 == verified("--deep")[0]
