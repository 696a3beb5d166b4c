"""What every sink promises to delivery: one class of tests, run against each store.

A subclass provides the fixture ``sink``; ``experiment_name`` comes from conftest.
"""

from __future__ import annotations

import contextlib
import math
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mlflow.store.artifact import artifact_repo

from mlflow_outbox_worker.outcome import classify
from mlflow_outbox_worker.sink import RUN_ID_TAG, MetricPoint, Sink, SinkError
from servers import eventually

NOW_MS = 1_700_000_000_000
#: A password that must be shown nowhere.
SECRET = "s3cret-w0rd"
#: MLflow's server writes a file where it was told to; before, it copied one there, or into a folder of that name.
_STREAMS = hasattr(artifact_repo, "StreamUploadMixin")


@contextlib.contextmanager
def closing(sink: Sink) -> Iterator[Sink]:
    """Close a sink after use."""
    yield sink
    sink.close()


class SinkContract:
    """The contract.

    Attributes:
        deduplicates: what the store does with a point that it has.
        serves_artifacts: files go through a tracking server, which does not say why it cannot store one.
    """

    deduplicates = True
    serves_artifacts = False

    @pytest.fixture
    def run_id(self, sink: Sink, experiment_name: str) -> str:
        """A run to log to."""
        return new_run(sink, sink.experiment_id(experiment_name))

    def test_an_experiment_is_created_once_and_found_afterwards(self, sink: Sink, experiment_name: str) -> None:
        """Asking for an experiment creates it the first time only; looking for one never does."""
        assert sink.find_experiment(experiment_name) is None
        experiment_id = sink.experiment_id(experiment_name)
        assert experiment_id == sink.experiment_id(experiment_name) == sink.find_experiment(experiment_name)

    def test_a_run_has_what_it_was_created_with(self, sink: Sink, experiment_name: str) -> None:
        """Name, user, start, and tags arrive; the run is going on."""
        experiment_id = sink.experiment_id(experiment_name)
        run_id = sink.create_run(
            experiment_id, run_name="first", start_time_ms=NOW_MS, user="ada", tags={"phase": "train"}
        )
        run = sink.get_run(run_id)
        assert (run_id, experiment_id, "first", "RUNNING") == (run.run_id, run.experiment_id, run.run_name, run.status)
        assert (NOW_MS, None, "active") == (run.start_time_ms, run.end_time_ms, run.lifecycle)
        assert "ada" == run.tags["mlflow.user"]
        assert "train" == run.tags["phase"]

    def test_a_run_is_found_by_its_local_id_even_when_deleted(self, sink: Sink, experiment_name: str) -> None:
        """All runs of a local id are found, in the same order every time, and no others."""
        experiment_id = sink.experiment_id(experiment_name)
        local_id = uuid.uuid4().hex
        runs = [new_run(sink, experiment_id, local_id, start_time_ms=NOW_MS + later) for later in (0, 1)]
        new_run(sink, experiment_id)
        sink.delete_run(runs[1])
        assert runs == sink.find_runs(experiment_id, local_id)
        assert [] == sink.find_runs(experiment_id, uuid.uuid4().hex)

    def test_of_the_runs_of_a_local_id_a_deleted_or_an_empty_one_is_not_the_first(
        self, sink: Sink, experiment_name: str
    ) -> None:
        """Those are what a create without an answer leaves behind; whoever has lost the ledger takes the first."""
        experiment_id = sink.experiment_id(experiment_name)
        local_id = uuid.uuid4().hex
        for _ in range(3):
            new_run(sink, experiment_id, local_id)
        first, *others = sink.find_runs(experiment_id, local_id)
        sink.delete_run(first)
        assert [*others, first] == sink.find_runs(experiment_id, local_id)
        if self.deduplicates:  # a file store is embedded, and carries nothing out late: it is not asked what a run has
            sink.log_batch(others[1], [MetricPoint("m", 1.0, NOW_MS, 0)], {}, {})
            assert [*others[::-1], first] == sink.find_runs(experiment_id, local_id)

    def test_an_artifact_is_read_back_as_it_was_stored(self, sink: Sink, run_id: str, tmp_path: Path) -> None:
        """Also an empty one, and one in a folder; one that is not there is an error."""
        for content, path in ((b"\x00\xff" * 100_000, "models/weights.bin"), (b"", "empty.txt")):
            source, copy = tmp_path / "source", tmp_path / f"copy of {len(content)}"
            source.write_bytes(content)
            sink.upload(run_id, source, path)
            sink.download(run_id, path, copy, len(content))
            assert content == copy.read_bytes()
        with pytest.raises(SinkError):
            sink.download(run_id, "models/nothing.bin", tmp_path / "nothing", 1)

    def test_a_local_id_that_cannot_be_quoted_finds_nothing(self, sink: Sink, experiment_name: str) -> None:
        """An id with a quote cannot change the meaning of the search."""
        experiment_id = sink.experiment_id(experiment_name)
        new_run(sink, experiment_id)
        assert [] == sink.find_runs(experiment_id, "x' OR tags.a != 'y")

    def test_a_deleted_run_is_not_among_the_runs_of_the_experiment(self, sink: Sink, experiment_name: str) -> None:
        """Reading shows active runs, newest first."""
        experiment_id = sink.experiment_id(experiment_name)
        runs = [new_run(sink, experiment_id, start_time_ms=NOW_MS + later) for later in range(3)]
        sink.delete_run(runs[1])
        assert [runs[2], runs[0]] == [run.run_id for run in sink.search_runs(experiment_id)]

    def test_a_batch_arrives_as_sent(self, sink: Sink, run_id: str) -> None:
        """Points keep step and time, the latest one is that of the largest step."""
        points = [MetricPoint("loss", 0.5, NOW_MS, 2), MetricPoint("loss", 0.25, NOW_MS + 1, 1)]
        sink.log_batch(run_id, points, {"lr": "0.1"}, {"note": "ümläut"})
        run = sink.get_run(run_id)
        assert {"lr": "0.1"} == run.params
        assert "ümläut" == run.tags["note"]
        assert {"loss": points[0]} == run.metrics
        assert sorted(points) == sorted(sink.metric_history(run_id, "loss"))
        assert [] == sink.metric_history(run_id, "unheard of")

    def test_a_full_batch_is_one_request(self, sink: Sink, run_id: str) -> None:
        """MLflow's largest batch is taken, and read back whole."""
        points = [MetricPoint("m", float(step), NOW_MS + step, step) for step in range(800)]
        params = {f"p{number}": "x" for number in range(100)}
        sink.log_batch(run_id, points, params, {f"t{number}": "y" for number in range(100)})
        assert points == sorted(sink.metric_history(run_id, "m"), key=lambda point: point.step)
        assert params == sink.get_run(run_id).params

    def test_a_repeated_batch_changes_nothing_where_the_store_deduplicates(self, sink: Sink, run_id: str) -> None:
        """The attribute tells the truth about identical points; params and tags are the same either way."""
        for _ in range(2):
            sink.log_batch(run_id, [MetricPoint("m", 1.0, NOW_MS, 0)], {"p": "1"}, {"t": "1"})
        assert self.deduplicates == sink.deduplicates_metrics
        assert (1 if self.deduplicates else 2) == len(sink.metric_history(run_id, "m"))

    def test_not_a_number_and_infinity_survive_as_the_store_keeps_them(self, sink: Sink, run_id: str) -> None:
        """NaN stays NaN; infinity stays, or is the largest number that the database has."""
        sink.log_batch(run_id, [MetricPoint("m", math.nan, 1, 0), MetricPoint("m", -math.inf, 2, 1)], {}, {})
        first, second = sorted(sink.metric_history(run_id, "m"), key=lambda point: point.step)
        assert math.isnan(first.value)
        assert second.value in {-math.inf, -1.7976931348623157e308}

    def test_a_run_ends_and_goes_on(self, sink: Sink, run_id: str) -> None:
        """Status and end are set; a resumed run is running again and takes events."""
        sink.update_run(run_id, status="FAILED", end_time_ms=NOW_MS + 5)
        assert ("FAILED", NOW_MS + 5) == (sink.get_run(run_id).status, sink.get_run(run_id).end_time_ms)
        sink.update_run(run_id, status="RUNNING", end_time_ms=None)
        sink.log_batch(run_id, [], {"late": "1"}, {})
        assert "RUNNING" == sink.get_run(run_id).status

    @pytest.mark.parametrize("path", ["model.bin", "a/b/plot 1.png", "x+y&z=50%.txt", "ü/ñ.txt"])
    def test_a_file_arrives_under_the_name_it_was_logged_with(
        self, sink: Sink, run_id: str, path: str, tmp_path: Path
    ) -> None:
        """The name of the copy does not matter; a second upload replaces the first."""
        copy = tmp_path / "0123abcd"
        for content in (b"old and longer", b"new"):
            copy.write_bytes(content)
            copy.chmod(0o600)
            sink.upload(run_id, copy, path)
        assert {path: 3} == sink.list_artifacts(run_id, path.rpartition("/")[0])

    @pytest.mark.parametrize(("first", "second"), [("model", "model/weights.txt"), ("model/a/b", "model/a")])
    def test_a_path_that_is_file_and_folder_never_counts_as_stored(
        self, sink: Sink, run_id: str, tmp_path: Path, first: str, second: str
    ) -> None:
        """The second is refused, by an embedded store for good; the first stays and others are taken."""
        (tmp_path / "copy").write_bytes(b"content")
        sink.upload(run_id, tmp_path / "copy", first)
        if self.serves_artifacts and first.startswith(f"{second}/") and not _STREAMS:
            # The server puts it into the folder, under its own name, and says that all is well; reading back tells.
            sink.upload(run_id, tmp_path / "copy", second)
        else:
            refused = fails(lambda: sink.upload(run_id, tmp_path / "copy", second))
            assert ("retry" if self.serves_artifacts else "dead_letter") == classify(refused, "upload").kind
        eventually(lambda: self.takes(sink, run_id, tmp_path / "copy"))
        folder = first.rpartition("/")[0]
        assert {first: 7} == {path: size for path, size in sink.list_artifacts(run_id, folder).items() if path == first}
        assert second not in sink.list_artifacts(run_id, second.rpartition("/")[0])

    @staticmethod
    def takes(sink: Sink, run_id: str, file: Path) -> bool:
        """Tell whether another file is taken; a server that said no may drop the connection on which it did."""
        try:
            sink.upload(run_id, file, "other")
        except SinkError as error:
            if error.kind != "connection":
                raise
            return False
        return True

    def test_a_file_that_is_only_tried_leaves_nothing(self, sink: Sink, run_id: str, tmp_path: Path) -> None:
        """A server says whether it takes one beside a run's; what else is there stays."""
        (tmp_path / "copy").write_bytes(b"content")
        sink.upload(run_id, tmp_path / "copy", "kept")
        location = sink.artifact_location("run", run_id)
        asked = [("run", run_id, None), ("run", run_id, tmp_path / "copy"), ("uri", f"{location}/below", None)]
        assert [self.serves_artifacts] * 3 == [sink.takes(*one) for one in asked]
        assert {"kept": 7} == sink.list_artifacts(run_id, "")
        assert {} == sink.list_artifacts(run_id, "below")

    def test_an_empty_file_arrives(self, sink: Sink, run_id: str, tmp_path: Path) -> None:
        """A file of no bytes is a file."""
        (tmp_path / "copy").touch()
        sink.upload(run_id, tmp_path / "copy", "empty")
        assert {"empty": 0} == sink.list_artifacts(run_id, "")
        assert {} == sink.list_artifacts(run_id, "no such folder")

    @pytest.mark.parametrize("path", ["../x", "/x", "a//b", "a/./b", "a\\..\\b", "\\a", "c:/a", "", "a\0b", "%2e%2e/a"])
    def test_a_path_that_leaves_the_run_is_refused(self, sink: Sink, run_id: str, path: str, tmp_path: Path) -> None:
        """The event is a dead letter; nothing is written."""
        (tmp_path / "copy").touch()
        refused = fails(lambda: sink.upload(run_id, tmp_path / "copy", path))
        assert ("dead_letter", False) == (classify(refused, "upload").kind, refused.sent)

    def test_a_name_with_a_backslash_or_an_invisible_character_arrives(
        self, sink: Sink, run_id: str, tmp_path: Path
    ) -> None:
        """Which on this system are characters like others."""
        (tmp_path / "copy").touch()
        for path in ("a\\b", "x\u200dy", "ends. "):
            sink.upload(run_id, tmp_path / "copy", path)
        assert {"a\\b", "x\u200dy", "ends. "} == set(sink.list_artifacts(run_id, ""))

    def test_a_conflicting_param_is_a_dead_letter(self, sink: Sink, run_id: str) -> None:
        """Every store's answer to a second value is recognised as permanent."""
        sink.log_batch(run_id, [], {"p": "1"}, {})
        refused = fails(lambda: sink.log_batch(run_id, [], {"p": "2"}, {}))
        assert ("answer", 400) == (refused.kind, refused.status)
        assert "dead_letter" == classify(refused, "log_batch").kind
        assert "1" == sink.get_run(run_id).params["p"]

    def test_a_name_that_mlflow_cannot_hold_is_a_dead_letter(self, sink: Sink, run_id: str) -> None:
        """The answer is about the event, whatever the store."""
        refused = fails(lambda: sink.log_batch(run_id, [MetricPoint("a//b", 1.0, NOW_MS, 0)], {}, {}))
        assert "dead_letter" == classify(refused, "log_batch").kind

    def test_text_that_no_store_can_encode_is_a_dead_letter(self, sink: Sink, run_id: str) -> None:
        """Half a surrogate pair has no UTF-8 form."""
        refused = fails(lambda: sink.log_batch(run_id, [], {}, {"t": "\ud800"}))
        assert "dead_letter" == classify(refused, "log_batch").kind

    def test_an_unknown_run_is_parked(self, sink: Sink, tmp_path: Path) -> None:
        """Somebody deleted the run for good, or the server is another one: a person has to look."""
        (tmp_path / "copy").touch()
        unknown = uuid.uuid4().hex
        for operation, request in {
            "log_batch": lambda: sink.log_batch(unknown, [], {"p": "1"}, {}),
            "update_run": lambda: sink.update_run(unknown, status="FINISHED", end_time_ms=NOW_MS),
            "upload": lambda: sink.upload(unknown, tmp_path / "copy", "x"),
            "get_run": lambda: sink.get_run(unknown),
        }.items():
            error = fails(request)
            assert ("parked", 404) == (classify(error, operation).kind, error.status), operation

    def test_a_deleted_run_is_parked(self, sink: Sink, run_id: str) -> None:
        """A deleted run can be restored, so its events wait; deleting twice is no error."""
        sink.delete_run(run_id)
        sink.delete_run(run_id)
        assert "deleted" == sink.get_run(run_id).lifecycle
        for request in (
            lambda: sink.log_batch(run_id, [], {"p": "1"}, {}),
            lambda: sink.log_batch(run_id, [MetricPoint("m", 1.0, NOW_MS, 0)], {}, {}),
        ):
            assert "parked" == classify(fails(request), "log_batch").kind

    def test_an_unknown_experiment_is_parked(self, sink: Sink) -> None:
        """A run cannot be created where no experiment is."""
        error = fails(lambda: sink.create_run("987654321", run_name=None, start_time_ms=NOW_MS, user="", tags={}))
        assert "parked" == classify(error, "create_run").kind

    def test_a_status_that_mlflow_does_not_know_is_refused(self, sink: Sink, run_id: str) -> None:
        """The mistake is in the event."""
        error = fails(lambda: sink.update_run(run_id, status="DONE", end_time_ms=NOW_MS))
        assert "dead_letter" == classify(error, "update_run").kind

    def test_threads_can_share_the_sink(self, sink: Sink, experiment_name: str) -> None:
        """Runs that are delivered side by side do not disturb each other, embedded store or not."""
        experiment_id = sink.experiment_id(experiment_name)

        def deliver(number: int) -> int:
            run_id = new_run(sink, experiment_id)
            for step in range(5):
                sink.log_batch(run_id, [MetricPoint("m", float(number), NOW_MS + step, step)], {}, {"n": str(step)})
            return len(sink.metric_history(run_id, "m"))

        with ThreadPoolExecutor(4) as pool:
            assert [5] * 4 == list(pool.map(deliver, range(4)))


def new_run(sink: Sink, experiment_id: str, local_id: str = "", start_time_ms: int = NOW_MS) -> str:
    """Create a run with a local id."""
    tags = {RUN_ID_TAG: local_id or uuid.uuid4().hex}
    return sink.create_run(experiment_id, run_name=None, start_time_ms=start_time_ms, user="ada", tags=tags)


def fails(request: object) -> SinkError:
    """Return the SinkError that a request must raise."""
    assert callable(request)
    with pytest.raises(SinkError) as caught:
        request()
    return caught.value
