"""What is passed for good, because a look at the disk did not show it, was looked for twice."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from contents import QUICK
from mlflow_outbox.counters import Counters
from mlflow_outbox.destination import resolve
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox.spool.events import Artifact, RunEnded, RunStarted
from mlflow_outbox.spool.reader import RunReader
from mlflow_outbox.spool.window import Window
from mlflow_outbox_worker.intake import Intake
from mlflow_outbox_worker.records import RunRecord
from servers import eventually
from spools import RUN, make_journal, metric
from test_filing import steps
from workers import delivering

#: Metrics of the run.
COUNT = 60


class ForgetfulDirectory:
    """A directory whose listing leaves a segment out while a window is read, the first so many times."""

    def __init__(self, patch: pytest.MonkeyPatch, name: str, *, times: int) -> None:
        self._left = times
        self._hides = False
        listdir, read = os.listdir, RunReader.window

        def listed(*given: Any) -> list[str]:
            return [found for found in listdir(*given) if not (self._hides and found == name)]

        def window(reader: RunReader, *given: Any, **named: Any) -> Window:
            self._hides, self._left = self._left > 0, self._left - 1
            try:
                return read(reader, *given, **named)
            finally:
                self._hides = False

        patch.setattr(os, "listdir", listed)
        patch.setattr(RunReader, "window", window)


@pytest.fixture
def outbox(sqlite_uri: str, tmp_path: Path) -> OutboxDirectory:
    """An outbox with one ended run, in several segments."""
    made = OutboxDirectory.create(tmp_path / "outbox", resolve(sqlite_uri), now_ms=1)
    journal = make_journal(made, segment_bytes=1024)
    journal.append(RunStarted(1_700_000_000_000, "r", "me", {}, False))
    for step in range(COUNT):
        assert journal.append(metric(step))
    journal.append(RunEnded("FINISHED", 1_700_000_100_000))
    journal.close()
    journal.sync()
    return made


@pytest.mark.parametrize("which", [0, 1, -2], ids=["the first", "the second", "the last but one"])
def test_a_segment_that_a_listing_leaves_out_is_delivered_all_the_same(
    sqlite_uri: str, outbox: OutboxDirectory, monkeypatch: pytest.MonkeyPatch, which: int
) -> None:
    """The numbers tell that something lies between, or before, and the second look shows it."""
    segments = sorted(path.name for path in outbox.run(RUN).glob("*.log"))
    assert len(segments) > 3
    ForgetfulDirectory(monkeypatch, segments[which], times=1)
    with delivering(outbox, sqlite_uri, QUICK) as counters:
        eventually(lambda: not outbox.run(RUN).exists(), 60)
    assert list(range(COUNT)) == steps(sqlite_uri)
    assert (1, 0, COUNT + 2) == (counters["overlooked"], counters["missing"], counters["delivered"])


def test_a_segment_that_is_not_there_at_the_second_look_either_is_counted_as_missing(
    sqlite_uri: str, outbox: OutboxDirectory
) -> None:
    """Somebody has deleted it; the rest is delivered."""
    second = sorted(outbox.run(RUN).glob("*.log"))[1]
    second.unlink()
    with delivering(outbox, sqlite_uri, QUICK) as counters:
        eventually(lambda: not outbox.run(RUN).exists(), 60)
    held = steps(sqlite_uri)
    assert sorted(set(range(COUNT)) & set(held)) == held
    assert (0, COUNT - len(held)) == (counters["overlooked"], counters["missing"])
    assert 0 < len(held) < COUNT


@pytest.mark.parametrize(("files", "holds"), [(0, 20), (1_999, 20), (10_000, 100)])
def test_a_window_of_a_run_that_has_many_files_holds_more_of_them(
    files: int, holds: int, sqlite_uri: str, tmp_path: Path
) -> None:
    """All that the run has are written down with each window: of 100,000 files that is 14 MB every time."""
    made = OutboxDirectory.create(tmp_path / "outbox", resolve(sqlite_uri), now_ms=1)
    journal = make_journal(made)
    for number in range(150):
        assert journal.append(Artifact(f"images/{number}.png", "0" * 64, 1, number))
    journal.close()
    window = Intake(1000, Counters()).window(RunReader(made.run(RUN)), RunRecord(RUN), "", files=files)
    assert [f"images/{number}.png" for number in range(holds)] == [event.path for _, event in window.events]
