"""A run of an outbox is found in a file store by its tag, without its points or the other runs being read."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from mlflow_outbox_worker.mlflow_sink import open_sink
from mlflow_outbox_worker.mlflow_sink.tagged import TaggedRuns
from mlflow_outbox_worker.sink import RUN_ID_TAG, MetricPoint, Sink

pytestmark = pytest.mark.compatibility


@pytest.fixture
def sink(file_uri: str) -> Iterator[Sink]:
    """Return an empty file store."""
    with closing(open_sink(file_uri)) as opened:
        yield opened


def make(sink: Sink, experiment: str, local: str) -> str:
    """Make a run with a point and a tag of the outbox."""
    tags = {RUN_ID_TAG: local} if local else {}
    run = sink.create_run(experiment, run_name=None, start_time_ms=1_700_000_000_000, user="me", tags=tags)
    sink.log_batch(run, [MetricPoint("loss", 0.5, 1_700_000_000_000, 0)], {}, {})
    return run


def test_a_search_for_a_run_reads_none(sink: Sink, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first search and each later one; twins and deleted runs are found, in another store of the place too."""
    from mlflow.store.tracking.file_store import FileStore

    experiment = sink.experiment_id("tagged")
    made = {local: make(sink, experiment, local) for local in ("a" * 32, "b" * 32, "c" * 32, "")}
    read: list[str] = []
    whole = FileStore._get_all_metrics

    def reads(self: FileStore, run_info: Any) -> Any:
        read.append(run_info.run_id)
        return whole(self, run_info)

    monkeypatch.setattr(FileStore, "_get_all_metrics", reads)
    assert [made["a" * 32]] == sink.find_runs(experiment, "a" * 32)
    assert [] == sink.find_runs(experiment, "d" * 32)
    twin = make(sink, experiment, "a" * 32)
    sink.delete_run(twin)
    read.clear()
    assert [made["a" * 32], twin] == sink.find_runs(experiment, "a" * 32)
    assert [] == read


def test_a_run_that_was_made_or_removed_meanwhile_is_seen_so(sink: Sink, tmp_path: Path, file_uri: str) -> None:
    """By another process, after the first search."""
    experiment = sink.experiment_id("tagged")
    assert [] == sink.find_runs(experiment, "a" * 32)
    with closing(open_sink(file_uri)) as other:
        run = make(other, experiment, "a" * 32)
    assert [run] == sink.find_runs(experiment, "a" * 32)
    (folder,) = tmp_path.glob(f"mlruns/*/{run}")
    shutil.rmtree(folder)
    assert [] == sink.find_runs(experiment, "a" * 32)


def test_a_run_without_the_tag_is_looked_at_again_until_it_is_old(tmp_path: Path) -> None:
    """Whoever makes it may be about to give it the tag; files and what is no run are never asked again."""
    now = time.time()
    runs = TaggedRuns(lambda: now)
    (young := tmp_path / "young").mkdir()
    (old := tmp_path / "old").mkdir()
    (tmp_path / "meta.yaml").write_text("{}")
    os.utime(old, (now - 7200, now - 7200))
    assert [] == runs.find(str(tmp_path), "a")
    for run in (young, old):
        stamp = run.stat().st_mtime
        (run / "tags").mkdir()
        (run / "tags" / RUN_ID_TAG).write_text("a")
        os.utime(run, (stamp, stamp))
    assert ["young"] == runs.find(str(tmp_path), "a")
