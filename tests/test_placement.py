"""Files that a call puts in a directory itself: what programs make of them there stays, and what power cuts do not."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from contents import client
from mlflow_outbox.spool import placement
from mlflow_outbox_worker.mlflow_sink.artifacts import Artifacts
from plugin_world import deliver, store, tracking
from replays import command
from servers import eventually

Script = Callable[[Any, Path], None]


def test_a_directory_is_told_from_others_and_from_itself_after_a_reboot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made anew it is another one; where the kernel does not name its boot, or there is none, nothing is known."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "other").mkdir()
    here = placement.identity(folder)
    assert here == placement.identity(folder)
    assert here != placement.identity(tmp_path / "other")
    assert placement.is_recent(here)
    assert "" == placement.identity(tmp_path / "missing")
    assert not placement.is_recent("")
    for boot in ("another boot", ""):
        monkeypatch.setattr(placement, "boot_id", lambda boot=boot: boot)
        assert here != placement.identity(folder)
        assert not placement.is_recent(here)
    assert "" == placement.identity(folder)
    assert not placement.is_recent("")


@pytest.fixture
def offline(sqlite_uri: str, tmp_path: Path) -> Callable[[Script], None]:
    """Return what runs a script with a run's artifact directory, through an outbox that nobody delivers."""

    def log(script: Script) -> None:
        settings: dict[str, object] = {"worker": "none", "exit_timeout": 0}
        with tracking(f"outbox+{sqlite_uri}", tmp_path / "outbox", **settings) as mlflow, mlflow.start_run():
            script(mlflow, Path(mlflow.get_artifact_uri().removeprefix("file://")))

    return log


@pytest.fixture
def delivered(tmp_path: Path) -> Callable[[], int]:
    """Return what delivers the outbox and returns the exit code."""
    return lambda: command("flush", "-d", tmp_path / "outbox", "--timeout", 60)


@contextlib.contextmanager
def later_boot() -> Iterator[None]:
    """The machine was started again since the files were logged."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placement, "boot_id", lambda: "a later boot")
        yield


@pytest.mark.parametrize("rebooted", [False, True])
@pytest.mark.parametrize("owner", ["run", "model"])
def test_an_older_content_is_never_seen_again(
    owner: str,
    rebooted: bool,
    offline: Callable[[Script], None],
    delivered: Callable[[], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Although a thousand points between them have each of them delivered by itself."""
    places: list[Path] = []
    seen: list[tuple[str, str]] = []

    def script(mlflow: Any, place: Path) -> None:
        api, run_id = mlflow.MlflowClient(), mlflow.active_run().info.run_id
        if owner == "model":
            model = mlflow.initialize_logged_model(name="m")
            place = Path(model.artifact_location.removeprefix("file://"))
        places.append(place / "a.txt")
        for text in ("one", "two", "one", "three"):
            Path("a.txt").write_text(text)
            if owner == "model":
                api.log_model_artifact(model.model_id, "a.txt")
            else:
                mlflow.log_artifact("a.txt")
            assert text == places[0].read_text()
            api.log_batch(run_id, [mlflow.entities.Metric("m", 1.0, 1, step) for step in range(1000)])

    upload = Artifacts.upload

    def observed(self: Artifacts, uri: str, file: Path, path: str, *more: Any) -> None:
        upload(self, uri, file, path, *more)
        seen.append((path, places[0].read_text()))

    offline(script)
    monkeypatch.setattr(Artifacts, "upload", observed)
    with later_boot() if rebooted else contextlib.nullcontext():
        assert 0 == delivered()
    assert [("a.txt", "three")] * 4 == seen


def test_a_program_may_go_on_writing_to_what_it_has_logged(
    sqlite_uri: str, offline: Callable[[Script], None], delivered: Callable[[], int], tmp_path: Path
) -> None:
    """As it may without an outbox: it reads what it wrote, what it wrote stays, and is no difference in the end."""
    places: list[Path] = []

    def script(mlflow: Any, place: Path) -> None:
        run_id = mlflow.active_run().info.run_id
        for name in ("sub/added.txt", "sub/replaced.txt", "as logged.txt"):
            mlflow.log_text("one", name)
        with (place / "sub" / "added.txt").open("a") as file:
            file.write(" and more")
        (tmp_path / "new").write_text("another")
        (tmp_path / "new").rename(place / "sub" / "replaced.txt")
        assert "one and more" == mlflow.artifacts.load_text(f"runs:/{run_id}/sub/added.txt")
        assert [("sub/added.txt", 12), ("sub/replaced.txt", 7)] == [
            (info.path, info.file_size) for info in mlflow.MlflowClient().list_artifacts(run_id, "sub")
        ]
        places.append(place)

    offline(script)
    assert 0 == delivered()
    assert "one and more" == (places[0] / "sub" / "added.txt").read_text()
    assert "another" == (places[0] / "sub" / "replaced.txt").read_text()
    with client(sqlite_uri) as api:
        assert ["FINISHED"] == [run.info.status for run in api.search_runs(["0"])]


def test_what_a_program_has_added_is_no_difference_when_the_run_is_read_back(sqlite_uri: str, tmp_path: Path) -> None:
    """The run is verified at once, and nothing of it is sent again."""
    uri = f"outbox+{sqlite_uri}"
    with tracking(uri, tmp_path / "outbox") as mlflow:
        with mlflow.start_run() as run:
            mlflow.log_text("one", "a.txt")
            place = Path(run.info.artifact_uri.removeprefix("file://"), "a.txt")
            place.write_text("one and more")
        deliver(uri)
        counters = store(uri).outbox.counters
        eventually(lambda: counters["runs_verified"], message="the run is read back")
        assert 0 == counters["verification_differences"]
    assert "one and more" == place.read_text()


def test_what_a_power_cut_took_from_its_place_is_there_again(
    offline: Callable[[Script], None], delivered: Callable[[], int]
) -> None:
    """Missing, empty, older, or full of zeros: after a new start of the machine the journal decides."""
    places: list[Path] = []

    def script(mlflow: Any, place: Path) -> None:
        for name in ("missing", "empty", "zeros", "older"):
            mlflow.log_text("one", name)
            mlflow.log_text("two", name)
        places.append(place)

    offline(script)
    (place,) = places
    (place / "missing").unlink()
    (place / "empty").write_text("")
    (place / "zeros").write_bytes(bytes(3))
    (place / "older").write_text("one")
    with later_boot():
        assert 0 == delivered()
    assert ["two"] * 4 == [(place / name).read_text() for name in ("missing", "empty", "zeros", "older")]


def test_a_place_that_is_another_directory_is_not_taken_for_it(
    offline: Callable[[Script], None], delivered: Callable[[], int]
) -> None:
    """A worker in another container sees its own; and a directory may be removed and made again."""
    places: list[Path] = []

    def script(mlflow: Any, place: Path) -> None:
        mlflow.log_text("one", "sub/a.txt")
        places.append(place / "sub")

    offline(script)
    (place,) = places
    place.rename(place.with_name("elsewhere"))  # which keeps its inode from being used again
    place.mkdir()
    (place / "a.txt").write_text("of another container")
    assert 0 == delivered()
    assert "one" == (place / "a.txt").read_text()


def test_sending_everything_once_more_means_the_files_too(
    sqlite_uri: str, offline: Callable[[Script], None], delivered: Callable[[], int], tmp_path: Path
) -> None:
    """Whoever asks for that wants what was logged."""
    places: list[Path] = []

    def script(mlflow: Any, place: Path) -> None:
        mlflow.log_text("one", "a.txt")
        places.append(place / "a.txt")

    offline(script)
    assert 0 == delivered()
    places[0].write_text("two")
    (outbox,) = (tmp_path / "outbox").glob("*/outbox.json")
    assert 0 == command("replay", outbox.parent, "--again")
    with client(sqlite_uri) as api:
        (run,) = api.search_runs(["0"])
        file = Path(run.info.artifact_uri.removeprefix("file://"), "a.txt")
    assert "one" == file.read_text()


def test_what_cannot_be_put_in_its_place_by_the_call_is_by_the_worker(sqlite_uri: str, tmp_path: Path) -> None:
    """The call goes on, and counts it."""
    uri = f"outbox+{sqlite_uri}"
    with tracking(uri, tmp_path / "outbox") as mlflow:
        with mlflow.start_run() as run:
            place = Path(run.info.artifact_uri.removeprefix("file://"))
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(place, ignore_errors=True)
            place.write_text("in the way")
            mlflow.log_text("one", "a.txt")
            assert 1 == store(uri).outbox.counters["files_not_placed"]
            place.unlink()
        deliver(uri)
    assert "one" == (place / "a.txt").read_text()
