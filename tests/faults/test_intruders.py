"""Directories that others could write to, paths that lead elsewhere, and secrets that must stay secret."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from faults import workload
from faults.children import Nest
from faults.oracle import held
from faults.table import Row
from mlflow_outbox import MLflowTracker
from mlflow_outbox.errors import InvalidEventType, OutboxUnusable
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox.spool.events import Artifact
from mlflow_outbox.testing import faults
from mlflow_outbox.testing.proxy import FaultProxy
from mlflow_outbox_worker.ledger import Ledger
from servers import MlflowServer, eventually


def log_into(outbox: Path, uri: str = "http://127.0.0.1:9") -> tuple[MLflowTracker, bool]:
    """Try to log one event; return the tracker and whether it was kept."""
    tracker = MLflowTracker("intruders", uri, outbox_dir=outbox, worker="none", settings=workload.settings())
    return tracker, tracker.start_run("run").log_metric("loss", 0.5, step=1)


def _world_writable(path: Path, elsewhere: Path) -> None:
    path.chmod(0o777)


def _linked(path: Path, elsewhere: Path) -> None:
    path.rename(elsewhere / "real")
    path.symlink_to(elsewhere / "real")


def _runs_linked(path: Path, elsewhere: Path) -> None:
    (path / "runs").rename(elsewhere / "runs")
    (path / "runs").symlink_to(elsewhere / "runs")


def _identity_linked(path: Path, elsewhere: Path) -> None:
    (path / "outbox.json").rename(elsewhere / "outbox.json")
    (path / "outbox.json").symlink_to(elsewhere / "outbox.json")


def _identity_pipe(path: Path, elsewhere: Path) -> None:
    (path / "outbox.json").unlink()
    os.mkfifo(path / "outbox.json")


@pytest.mark.fault("F90", "outbox world-writable, a link, its runs a link, its identity a link or a pipe")
@pytest.mark.parametrize("harm", [_world_writable, _linked, _runs_linked, _identity_linked, _identity_pipe])
def test_a_directory_that_others_may_have_made_is_refused(
    harm: Callable[[Path, Path], None], row: Row, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The tracker says why, keeps nothing, and raises nothing."""
    first, kept = log_into(tmp_path / "root")
    assert kept
    path = Path(str(first.outbox_path))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    harm(path, elsewhere)
    tracker, kept = log_into(tmp_path / "root")
    assert (True, False) == (tracker.disabled, kept)
    assert str(path) in caplog.text
    row.done()


def as_another_user(fd: int, path: str) -> None:
    """Become another user and try to open an outbox."""

    def work() -> dict[str, Any]:
        os.setgroups([])
        os.setresgid(4321, 4321, 4321)
        os.setresuid(4321, 4321, 4321)
        try:
            OutboxDirectory.open(Path(path))
        except OutboxUnusable as refused:
            return {"refused": str(refused)}
        return {"refused": ""}

    workload.reported(fd, work)


@pytest.mark.needs("root")
@pytest.mark.fault("F90", "outbox of another user, opened by root and by a third user")
def test_an_outbox_of_another_user_is_refused(nest: Nest, row: Row) -> None:
    """Whoever opens it is told whose it is, root too."""
    with tempfile.TemporaryDirectory() as root:
        os.chmod(root, 0o711)
        path = log_into(Path(root))[0].outbox_path
        assert path is not None
        os.chown(path, 1234, 1234)
        report = nest.start(as_another_user, str(path)).report()
        assert "belongs to user 1234, this process runs as user 4321" in report["refused"]
        assert log_into(Path(root))[0].disabled
    row.done(2)


PATHS = [
    "/etc/passwd", "../up.txt", "a/../../up.txt", "%2e%2e/up.txt", "%252e%252e/up.txt", "a\\..\\up.txt", "C:\\x.txt",
    "nul\0.txt", "a#b.txt", "a" * 5000 + ".txt", "..", "", "a//b.txt/..", "./../x", "%2e%2e%2fup.txt", "~/x\x1b[2J.txt",
]  # fmt: skip


@pytest.mark.fault("F91", "artifact paths that lead elsewhere, at the call, and in a journal that somebody wrote")
def test_no_artifact_path_leads_out_of_the_run(sqlite_uri: str, row: Row, tmp_path: Path) -> None:
    """Refused or put right at the call and again at delivery; the rest of the run arrives."""
    tracker = MLflowTracker("paths", sqlite_uri, outbox_dir=tmp_path / "outbox", settings=workload.settings())
    run = tracker.start_run("paths")
    before = {str(path) for path in tmp_path.rglob("*")}
    sha = "0" * 64
    for path in PATHS:
        run.log_text("content", path)
        run._keep(Artifact(path, sha, 7, 1))  # what a hand-made journal may hold
    acked = {n for n in range(60) if workload.log_event(run, n)}
    run.end()
    left = tracker.flush(30)
    assert (0, 0) == (left.pending, left.parked)
    assert left.dead >= len(PATHS), "each of the hand-made ones is a dead letter"
    tracker.close(1)
    held(sqlite_uri, "paths").check(acked)
    made = {str(path) for path in tmp_path.rglob("*")} - before
    assert not [path for path in made if path.endswith(("up.txt", "passwd", "x.txt")) and "/artifacts/" not in path]
    assert not (tmp_path.parent / "up.txt").exists()
    row.done(len(PATHS))


@pytest.mark.fault("F92", "the destination in outbox.json edited to another host")
def test_an_edited_destination_is_not_contacted(mlflow_server: MlflowServer, row: Row, tmp_path: Path) -> None:
    """The outbox no longer is the one of this tracker's server, and is refused."""
    with FaultProxy(mlflow_server.url) as other, FaultProxy(mlflow_server.url) as proxy:
        tracker, _ = log_into(tmp_path / "root", proxy.url)
        path = Path(str(tracker.outbox_path)) / "outbox.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "destination": other.url}))
        again = MLflowTracker("intruders", proxy.url, outbox_dir=tmp_path / "root", settings=workload.settings())
        assert again.disabled
        assert not again.start_run("run").log_metric("loss", 1.0, step=2)
        assert not again.flush(0.2).delivered
        assert [] == other.requests
    row.done()


CANARY = "canary-7f3a9c"


@pytest.mark.fault("F93", "credentials in the tracking URI and the environment; 401, 500, 400 and portal answers")
def test_no_secret_is_stored_logged_or_shown(
    mlflow_server: MlflowServer,
    experiment_name: str,
    row: Row,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither the outbox, nor anybody's log record, nor what is printed, nor a repr, traceback or dead letter holds it.

    The server's answers do: the address as it was given, the password and the token.
    """
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", f"{CANARY}-token")
    with FaultProxy(mlflow_server.url) as proxy:
        uri = proxy.url.replace("http://", f"http://user:{CANARY}-password@") + f"?token={CANARY}-query"
        tracker = MLflowTracker(
            experiment_name, uri, outbox_dir=tmp_path / "outbox", settings=workload.settings(strict=True)
        )
        echo = f"{uri.partition('?')[0]} was asked by user:{CANARY}-password, with {CANARY}-token"
        proxy.script(
            faults.status(500), faults.status(401, {}, echo), faults.html_page(echo.encode()), faults.garbage()
        )
        refusal = {"error_code": "INVALID_PARAMETER_VALUE", "message": echo}
        proxy.on("runs/log-batch", faults.status(400, {}, json.dumps(refusal)), times=None, body='"step":5}')
        run = tracker.start_run("secret")
        acked = {n for n in range(20) if workload.log_event(run, n)}
        with pytest.raises(InvalidEventType) as raised:
            tracker.start_run("strict").log_metric("loss", "no number", step=1)  # type: ignore[arg-type]  # bad input
        shown = [repr(thing) for thing in (tracker, run, tracker._outbox, tracker._destination, tracker._settings)]
        run.end()
        eventually(lambda: 0 == tracker.flush(5).pending + tracker.flush(0).parked, 30)
        with contextlib.closing(Ledger.open(Path(str(tracker.outbox_path)) / "delivery", read_only=True)) as ledger:
            (letter,) = ledger.dead_letters()
        assert any(name == "Authorization" for request in proxy.requests for name, _ in request.headers), "it was used"
        tracker.close(1)
    held(mlflow_server.database_uri, experiment_name).check(acked, dead={5})
    told = [f"{r.name}: {r.getMessage()} {r.exc_text or ''} {r.stack_info or ''}" for r in caplog.records]
    assert any(text.startswith("mlflow_outbox: ") for text in told)
    told += [*shown, tracker.tracking_uri, letter.reason, repr(letter), *capfd.readouterr()]
    ours = raised.tb.tb_next  # the test's own variables hold it
    told += traceback.TracebackException(raised.type, raised.value, ours, capture_locals=True).format()
    assert any("self = " in text for text in told)
    assert [] == [text for text in told if CANARY in text]
    files = [path for path in (tmp_path / "outbox").rglob("*") if path.is_file()]
    assert [] == [str(path) for path in files if f"{CANARY}".encode() in path.read_bytes()]
    assert {0o600} == {path.stat().st_mode & 0o777 for path in files}
    row.done(5)
