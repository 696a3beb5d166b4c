"""The metrics of a file store: a batch is written at once, and what a killed writer left torn is no point."""

from __future__ import annotations

import fcntl
import math
import multiprocessing
import resource
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from contents import QUICK, points, the_run
from mlflow_outbox import MLflowTracker
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox_worker.mlflow_sink import open_sink
from mlflow_outbox_worker.sink import MetricPoint, Sink, SinkError
from servers import eventually
from sink_contract import new_run
from workers import delivering


@pytest.fixture
def sink(file_uri: str) -> Iterator[Sink]:
    """Return an empty file store."""
    with closing(open_sink(file_uri)) as opened:
        yield opened


def _file(root: Path, key: str) -> Path:
    (found,) = root.glob(f"mlruns/*/*/metrics/{key}")
    return found


def test_a_batch_holds_what_mlflow_s_own_writing_holds_byte_by_byte(sink: Sink, file_uri: str, tmp_path: Path) -> None:
    """The same points through MLflow's method, one by one, make the same files."""
    from mlflow.entities import Metric
    from mlflow.store.tracking.file_store import FileStore

    values = (0.5, -0.0, 1e-300, 1e300, math.nan, math.inf, -math.inf, 3.0)
    points = [
        MetricPoint(key, value, 1_700_000_000_000 + step, step)
        for step, value in enumerate(values)
        for key in ("loss", "val/loss", "a b-c.d")
    ]
    by_batch, one_by_one = (new_run(sink, sink.experiment_id("metric files")) for _ in range(2))
    sink.log_batch(by_batch, points, {}, {})
    store = FileStore.__new__(FileStore)
    vars(store).update(vars(sink._store))  # type: ignore[attr-defined]  # the same directory, in MLflow's way
    for point in points:
        store.log_metric(one_by_one, Metric(point.key, point.value, point.time_ms, point.step))
    for key in ("loss", "val/loss", "a b-c.d"):
        theirs, ours = (next(tmp_path.glob(f"mlruns/*/{run}/metrics/{key}")) for run in (one_by_one, by_batch))
        assert theirs.read_bytes() == ours.read_bytes()


def test_a_torn_last_line_is_no_point_wherever_it_was_torn(sink: Sink, tmp_path: Path) -> None:
    """Half a line can look like another point; read or written to, the file goes on behind its last whole line."""
    run = new_run(sink, sink.experiment_id("metric files"))
    whole = [MetricPoint("loss", 0.25, 1_700_000_000_000, 10), MetricPoint("loss", 0.125, 1_700_000_000_001, 11)]
    after = MetricPoint("loss", 0.5, 1_700_000_000_002, 12)
    sink.log_batch(run, whole, {}, {})
    file = _file(tmp_path, "loss")
    data = file.read_bytes()
    last = data.rindex(b"\n", 0, -1) + 1
    for end in range(last + 1, len(data)):
        file.write_bytes(data[:end])
        assert whole[:1] == sink.metric_history(run, "loss"), data[last:end]
        file.write_bytes(data[:end])
        sink.log_batch(run, [after], {}, {})
        assert [whole[0], after] == sink.metric_history(run, "loss"), data[last:end]


def test_a_metric_of_one_torn_line_is_none(sink: Sink, tmp_path: Path) -> None:
    """The run can be read, and the point comes when it is sent again."""
    run, point = new_run(sink, sink.experiment_id("metric files")), MetricPoint("loss", 0.25, 1_700_000_000_000, 10)
    sink.log_batch(run, [point], {}, {})
    file = _file(tmp_path, "loss")
    file.write_bytes(file.read_bytes()[:-3])
    assert {} == sink.get_run(run).metrics
    sink.log_batch(run, [point], {}, {})
    assert [point] == sink.metric_history(run, "loss")


def _write_beyond(uri: str, run: str, limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    with closing(open_sink(uri)) as sink:
        try:
            sink.log_batch(run, [MetricPoint("loss", 0.5, step, step) for step in range(1000)], {}, {})
        except SinkError:
            raise SystemExit(3) from None


def test_a_batch_for_which_there_is_no_room_leaves_nothing_behind(sink: Sink, file_uri: str, tmp_path: Path) -> None:
    """What was there stays, nothing is torn, and the batch is refused, so that it comes again."""
    run, point = new_run(sink, sink.experiment_id("metric files")), MetricPoint("loss", 0.25, 1, 1)
    sink.log_batch(run, [point], {}, {})
    before = _file(tmp_path, "loss").read_bytes()
    process = multiprocessing.get_context("fork").Process(target=_write_beyond, args=(file_uri, run, 5000))
    process.start()
    process.join()
    assert 3 == process.exitcode
    assert before == _file(tmp_path, "loss").read_bytes()


@pytest.mark.parametrize(
    "lines",
    [
        "",
        "5 0.5 1\n6 nan 3\n7 inf 3\n3 -0.0 3\n9 1e308 -2\n",
        "7 nan 3\n7 0.5 3\n7 -inf 3\n",
        "5 0.5\n6 0.25\n",
        "5 0.5 1\n6 0.25\n",
        "5 0.5 1 data 0123\n6 0.5 1 other 4567\n",
        "5 0.5 1\n6 0.5 1 data 0123\n",
        "5 0.5 99999999999999999999\n",
    ],
)
def test_points_are_those_that_mlflow_reads(sink: Sink, tmp_path: Path, lines: str) -> None:
    """Those of older versions and those that name a dataset too; and which of them is the last one."""
    from mlflow.store.tracking.file_store import FileStore

    run = new_run(sink, sink.experiment_id("metric files"))
    sink.log_batch(run, [MetricPoint("loss", 0.25, 10, 1)], {}, {})
    if lines:
        _file(tmp_path, "loss").write_text(lines)
    store = FileStore.__new__(FileStore)
    vars(store).update(vars(sink._store))  # type: ignore[attr-defined]  # the same directory, in MLflow's way
    theirs = [(one.value, one.timestamp, one.step) for one in store.get_metric_history(run, "loss")]
    ours, rest = sink.metric_page(run, "loss", None)
    assert (repr(theirs), None) == (repr([(one.value, one.time_ms, one.step) for one in ours]), rest)
    (last,) = store.get_run(run).data._metric_objs
    found = sink.get_run(run).metrics["loss"]
    assert repr((last.value, last.timestamp, last.step)) == repr((found.value, found.time_ms, found.step))
    assert ([], None) == sink.metric_page(run, "unheard of", None)


def test_a_write_that_is_on_its_way_is_cut_off_by_nobody_who_reads(sink: Sink, tmp_path: Path) -> None:
    """Its beginning ends in the middle of a line; whoever writes has the file's lock, another writer waits for it."""
    run = new_run(sink, sink.experiment_id("metric files"))
    sink.log_batch(run, [MetricPoint("loss", 0.25, 1_700_000_000_000, 1)], {}, {})
    file = _file(tmp_path, "loss")
    with file.open("ab", buffering=0) as writing:
        fcntl.flock(writing, fcntl.LOCK_EX)
        writing.write(b"1700000000001 0.5 2\n17000000")
        assert 2 == sink.get_run(run).metrics["loss"].step
        assert [1, 2] == [point.step for point in sink.metric_history(run, "loss")]
        other = threading.Thread(target=sink.log_batch, args=(run, [MetricPoint("loss", 1.0, 5, 4)], {}, {}))
        other.start()
        other.join(0.1)
        assert other.is_alive()
        writing.write(b"00002 0.75 3\n")
    other.join(60)
    assert [1, 2, 3, 4] == [point.step for point in sink.metric_history(run, "loss")]


@pytest.mark.parametrize("kind", ["metric", "param", "tag"])
def test_a_name_below_another_name_is_refused_alone(
    kind: str, file_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """A file store has no place for both; the healthy events of the window arrive, each point once."""
    tracker = MLflowTracker(experiment_name, file_uri, outbox_dir=tmp_path / "o", worker="none", settings=QUICK)
    with tracker.start_run() as run:
        for name in ("before", "val", "val/acc", "up/down", "up", "after"):
            if kind == "metric":
                run.log_metric(name, 0.5, step=1)
            elif kind == "param":
                run.log_param(name, "x")
            else:
                run.set_tag(name, "x")
    tracker.close(0)
    assert tracker.outbox_path is not None
    with delivering(OutboxDirectory.open(tracker.outbox_path), file_uri, QUICK) as counters:
        eventually(lambda: counters["runs_verified"])
    assert (2, 0) == (counters["dead_letters"], counters["retried"])
    held = the_run(file_uri, experiment_name)
    found = {"metric": held.data.metrics, "param": held.data.params, "tag": held.data.tags}[kind]
    assert {"before", "val", "up/down", "after"} == {name for name in found if "mlflow" not in name}
    assert [] == list((tmp_path / "mlruns").rglob(".param-*"))
    if kind == "metric":
        for name in found:
            assert 1 == len(points(file_uri, held.info.run_id, name))


def test_a_name_that_is_too_long_for_a_file_is_refused_before_a_point_of_its_batch_is_written(sink: Sink) -> None:
    """The batch is sent again without it: its other points would be there twice."""
    run = new_run(sink, sink.experiment_id("metric files"))
    whole, long = MetricPoint("loss", 0.25, 1, 1), MetricPoint("ü" * 128, 0.25, 1, 1)
    with pytest.raises(SinkError, match="no place") as refused:
        sink.log_batch(run, [whole, long], {}, {})
    assert 400 == refused.value.status
    assert [] == sink.metric_history(run, "loss")
    sink.log_batch(run, [whole, MetricPoint("ü" * 127, 0.25, 1, 1)], {}, {})
    assert [whole] == sink.metric_history(run, "loss")


def test_tags_of_a_new_run_that_need_one_place_are_refused_and_not_asked_for_again(sink: Sink) -> None:
    """Before they were taken for a failure of the store, for ever."""
    with pytest.raises(SinkError, match="no place") as refused:
        sink.create_run(
            sink.experiment_id("e"), run_name="r", start_time_ms=1, user="u", tags={"val": "1", "val/acc": "2"}
        )
    assert 400 == refused.value.status


@pytest.mark.parametrize("values", [(math.nan, 5.0), (5.0, math.nan), (math.nan, 5.0, 7.0)])
def test_no_number_beside_numbers_of_one_step_and_time_is_nothing_that_the_store_lacks(
    values: tuple[float, ...], file_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """Which of them is the latest depends on which came first there; the run was parked for it."""
    tracker = MLflowTracker(experiment_name, file_uri, outbox_dir=tmp_path / "outbox", settings=QUICK)
    with tracker.start_run() as run:
        for value in values:
            run.log_metric("loss", value, timestamp=1_700_000_000_000)
    result = tracker.flush(60)
    assert (len(values) + 2, 0, 0) == (result.delivered, result.pending, result.parked)
    assert tracker.outbox_path is not None
    outbox = OutboxDirectory.open(tracker.outbox_path)
    eventually(lambda: [run.run_id] == outbox.delivered_ids(), message="it was read back and filed")
    tracker.close(60)
    held = the_run(file_uri, experiment_name)
    assert len(values) == sum(points(file_uri, held.info.run_id, "loss").values())


def test_a_point_of_a_model_or_a_dataset_that_comes_again_is_there_once(
    sink: Sink, file_uri: str, tmp_path: Path
) -> None:
    """As after a lost ledger, and by another process; also where a killed one had written the model's point alone."""
    from mlflow.entities import Metric

    from mlflow_outbox.plugin import codec

    experiment = sink.experiment_id("metric files")
    run_id = new_run(sink, experiment)
    named = codec.dumps({"experiment_id": experiment, "name": "net"}).decode()
    model = sink.call("create_logged_model", named)
    linked = [
        Metric("loss", 0.5, 1000, 1, model),
        Metric("loss", 0.5, 1000, 2, model, "data", "digest"),
        Metric("loss", 0.5, 1000, 3, None, "data", "digest"),
    ]
    body = codec.dumps({"run_id": run_id, "metrics": linked, "params": [], "tags": []}).decode()
    sink.log_batch(run_id, [MetricPoint("loss", 0.5, 1000, 1)], {}, {})  # it had the first before, as one of no model
    of_run = "1000 0.5 1\n1000 0.5 1\n1000 0.5 2 data digest\n1000 0.5 3 data digest\n"
    of_model = f"1000 0.5 1 {run_id}\n1000 0.5 2 {run_id} data digest\n"
    (models,) = tmp_path.glob(f"mlruns/*/models/{model}")
    with closing(open_sink(file_uri)) as other:
        for writer in (sink, sink, other, sink):
            writer.call("log_batch", body)
            assert (of_run, of_model) == (_file(tmp_path, "loss").read_text(), (models / "metrics/loss").read_text())
        _file(tmp_path, "loss").write_text("1000 0.5 1\n")
        for writer in (sink, other):
            writer.call("log_batch", body)
            assert of_run.partition("\n")[2] == _file(tmp_path, "loss").read_text()
            assert of_model == (models / "metrics/loss").read_text()
