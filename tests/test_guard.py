"""The disk budget: refusals come in time and go by themselves."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlflow_outbox.settings import Settings
from mlflow_outbox.spool import guard
from mlflow_outbox.spool.guard import DiskGuard, used_bytes
from spools import RUN, make_journal, make_outbox, metric


def test_an_outbox_at_its_cap_refuses_and_takes_again(tmp_path: Path) -> None:
    """The old is never dropped; what delivery frees is used at once."""
    outbox = make_outbox(tmp_path / "outbox")
    guard = DiskGuard(outbox, Settings(outbox_bytes=20_000))
    writer = make_journal(outbox, refuse=guard.reason)
    assert guard.reason() is None
    filler = outbox.runs / "filler"
    filler.write_bytes(b"x" * 20_000)
    guard.look()
    assert "outbox_bytes" in str(guard.reason())
    assert not writer.append(metric(0))
    filler.unlink()
    guard.look()
    assert guard.reason() is None
    assert writer.append(metric(1))


def test_a_disk_with_little_room_refuses(tmp_path: Path) -> None:
    """Others need room too."""
    guard = DiskGuard(make_outbox(tmp_path / "outbox"), Settings(free_bytes=10**17))
    guard.look()
    assert "free_bytes" in str(guard.reason())


def test_a_directory_that_is_gone_is_left_to_the_write_to_report(tmp_path: Path) -> None:
    """The guard refuses nothing that it cannot see."""
    import shutil

    outbox = make_outbox(tmp_path / "outbox")
    guard = DiskGuard(outbox, Settings())
    shutil.rmtree(outbox.path)
    guard.look()
    assert guard.reason() is None


def test_the_size_is_not_measured_at_each_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Walking an outbox costs something; free space is asked for every time."""
    calls = []
    monkeypatch.setattr(guard, "used_bytes", lambda directory: calls.append(1) or 0)
    looker = DiskGuard(make_outbox(tmp_path / "outbox"), Settings())
    for _ in range(5):
        looker.look()
    assert 1 == len(calls)


def test_the_used_bytes_are_those_of_all_files(tmp_path: Path) -> None:
    """Segments, copies and the rest."""
    outbox = make_outbox(tmp_path / "outbox")
    before = used_bytes(outbox)
    folder = outbox.make_run(RUN)
    (folder / "a.log").write_bytes(b"x" * 100)
    (folder / "files").mkdir()
    (folder / "files" / "b").write_bytes(b"x" * 50)
    (folder / "link").symlink_to("/nowhere")
    assert 150 <= used_bytes(outbox) - before < 200
