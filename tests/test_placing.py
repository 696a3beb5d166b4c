"""Files that a call puts in their place itself: the worker waits for it, and does not undo what came later."""

from __future__ import annotations

import concurrent.futures
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlflow_outbox import counters as counters_module
from mlflow_outbox.counters import Counters
from mlflow_outbox.spool.placing import is_placed, placing
from mlflow_outbox_worker import requests
from mlflow_outbox_worker.mlflow_sink.artifacts import Artifacts
from plugin_world import tracking
from replays import command
from spools import FORKS


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A file of an outbox."""
    path = tmp_path / "copy"
    path.write_text("content")
    return path


def test_a_file_is_waited_for_while_calls_put_it_in_its_place(copy: Path) -> None:
    """Two at once, in two places; afterwards it is there, as is one that no call ever locked or that is not there."""
    pauses: list[float] = []
    assert is_placed(copy, patience=0)
    with placing(copy):
        with placing(copy):
            assert not is_placed(copy, patience=0.05, sleep=pauses.append)
        assert not is_placed(copy, patience=0.05, sleep=pauses.append)
    assert [0.01] * 10 == pauses
    assert is_placed(copy, patience=0)
    with placing(copy.with_name("missing")):
        assert is_placed(copy.with_name("missing"), patience=0)


def test_a_call_does_not_wait_for_one_who_looks(copy: Path) -> None:
    """Somebody else holds the lock: the call goes on without it."""
    code = "import fcntl, sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code, copy], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with placing(copy):
            assert not is_placed(copy, patience=0)
        holder.communicate()
    assert is_placed(copy, patience=0)


@pytest.mark.parametrize("end", ["os._exit(0)", "os.fork() and os._exit(0); placed.__exit__(None, None, None)"])
def test_a_lock_ends_with_its_call_or_its_program(end: str, copy: Path) -> None:
    """F05: killed in the middle, or with a forked child that lives on and has the descriptor too."""
    code = f"""
import os, sys, time
sys.path[:0] = {sys.path!r}
from pathlib import Path
from mlflow_outbox.spool.placing import placing
placed = placing(Path({str(copy)!r}))
placed.__enter__()
child = os.fork() if "fork" in {end!r} else 1
if child == 0:
    sys.stdin.read()
    os._exit(0)
{end.replace("os.fork() and os._exit(0); ", "")}
print("ended", flush=True)
sys.stdin.read()
"""
    program = subprocess.Popen(
        [sys.executable, *FORKS, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with program:
        assert program.stdout is not None
        said = program.stdout.readline()
        assert said == ("ended\n" if "fork" in end else "")
        assert is_placed(copy, patience=0)
        assert program.stdin is not None
        program.stdin.close()


@pytest.fixture
def offline(sqlite_uri: str, tmp_path: Path) -> Any:
    """Return a call that logs through an outbox that nobody delivers; what is returned delivers it here."""

    def log(script: Callable[[Any, Path], None]) -> Callable[[], int]:
        settings: dict[str, object] = {"worker": "none", "exit_timeout": 0}
        with tracking(f"outbox+{sqlite_uri}", tmp_path / "outbox", **settings) as mlflow, mlflow.start_run():
            script(mlflow, Path(mlflow.get_artifact_uri().removeprefix("file://")))
        return lambda: command("flush", "-d", tmp_path / "outbox", "--timeout", 60)

    return log


def uploads(monkeypatch: pytest.MonkeyPatch, look: Callable[[str], None]) -> None:
    """Look at the path of each file after it was delivered."""
    upload = Artifacts.upload

    def observed(self: Artifacts, uri: str, file: Path, path: str, *more: Any) -> None:
        upload(self, uri, file, path, *more)
        look(path)

    monkeypatch.setattr(Artifacts, "upload", observed)


@pytest.mark.parametrize("owner", ["run", "model"])
def test_an_older_content_is_never_seen_again(
    owner: str, offline: Any, sqlite_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although a thousand points between them have it delivered by itself."""
    places, seen = [], []

    def script(mlflow: Any, place: Path) -> None:
        if owner == "model":
            model = mlflow.initialize_logged_model(name="m")
            place = Path(model.artifact_location.removeprefix("file://"))
        for text in ("one", "two", "one", "three"):
            Path("a.txt").write_text(text)
            if owner == "model":
                mlflow.MlflowClient().log_model_artifact(model.model_id, "a.txt")
            else:
                mlflow.log_artifact("a.txt")
            assert text == (place / "a.txt").read_text()
            mlflow.MlflowClient().log_batch(
                mlflow.active_run().info.run_id,
                [mlflow.entities.Metric("m", 1.0, 1, step) for step in range(1000)],
            )
        places.append(place / "a.txt")

    deliver = offline(script)
    uploads(monkeypatch, lambda path: seen.append((path, places[0].read_text())))
    assert 0 == deliver()
    assert [("a.txt", "three")] * 4 == seen


def test_what_a_call_could_not_put_in_its_place_the_worker_does(offline: Any) -> None:
    """The program died before it could, or somebody damaged the file: what the journal says last is there."""
    places = []

    def script(mlflow: Any, place: Path) -> None:
        for name in ("missing", "damaged"):
            mlflow.log_text("one", name)
            mlflow.log_text("two", name)
        (place / "missing").unlink()
        (place / "damaged").write_text("tw")
        places.append(place)

    deliver = offline(script)
    assert 0 == deliver()
    assert ["two", "two"] == [(places[0] / name).read_text() for name in ("missing", "damaged")]


@pytest.mark.parametrize("stopped", [False, True])
def test_the_worker_waits_for_a_call_and_not_for_ever(
    stopped: bool, offline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file whose call is under way comes when that has ended; a program that is stopped in it is passed, counted."""
    seen: list[str] = []
    waited = threading.Event()
    counters = Counters()

    def spy(copy: Path, *, patience: float) -> bool:
        waited.set()
        return is_placed(copy, patience=0.05 if stopped else patience)

    deliver = offline(lambda mlflow, _: mlflow.log_text("one", "a.txt"))
    (copy,) = tmp_path.glob("outbox/*/runs/*/files/*")
    monkeypatch.setattr(requests, "is_placed", spy)
    monkeypatch.setattr(counters_module, "Counters", lambda: counters)
    uploads(monkeypatch, seen.append)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        with placing(copy):
            done = pool.submit(deliver)
            assert waited.wait(60)
            if stopped:
                assert 0 == done.result(60)
            else:
                assert [] == seen
        assert 0 == done.result(60)
    assert ["a.txt"] == seen
    assert int(stopped) == counters["files_not_awaited"]
