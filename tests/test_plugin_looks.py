"""What a call through an outbox costs while the server is away: it does not grow with the runs and points that wait."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlflow_outbox.errors import LedgerUnavailable
from mlflow_outbox.plugin import codec
from mlflow_outbox.spool.reader import RunReader
from mlflow_outbox_worker.database import Reader
from mlflow_outbox_worker.ondisk import LocalRun, OnDisk
from plugin_world import NOWHERE, deliver, store, tracking
from servers import MlflowServer, eventually


class Counted:
    """Counts what is done to the disk from now on.

    Attributes:
        looks: statements that were put to the ledger.
        read: the journals of which segments were opened for their events.
        events: how many events these gave.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.looks = self.events = 0
        self.read: list[str] = []
        query, window = Reader.query, RunReader.window

        def asked(reader: Reader, *arguments: Any) -> Any:
            self.looks += 1
            return query(reader, *arguments)

        def opened(reader: RunReader, *arguments: Any, **options: Any) -> Any:
            found = window(reader, *arguments, **options)
            self.read.append(reader.path.name)
            self.events += len(found.events)
            return found

        patch.setattr(Reader, "query", asked)
        patch.setattr(RunReader, "window", opened)


def test_what_many_runs_and_models_have_become_is_asked_in_few_looks(
    experiment_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every search that the disk answers wants to know it of each run that this process ever called by its id here."""
    with tracking(NOWHERE, tmp_path, worker="none") as mlflow:
        api = mlflow.MlflowClient()
        number = api.create_experiment(experiment_name)
        made = [api.create_run(number).info.run_id for _ in range(20)]
        models = [api.create_logged_model(number, name=f"m{index}").model_id for index in range(3)]
        ids = store(NOWHERE).ids
        counted = Counted(monkeypatch)
        assert {} == ids.names()
        assert 2 == counted.looks
        ids._remote.update({made[0]: "0" * 32, models[0]: "m-" + "0" * 32})
        assert {made[0]: "0" * 32, models[0]: "m-" + "0" * 32} == ids.become([made[0], models[0], made[1]])
        assert {made[0], models[0]} == {*ids.names().values()}


@pytest.mark.parametrize("most", [10_000, 5], ids=["room for all", "room for five"])
def test_a_search_for_a_models_name_opens_no_journal_that_has_not_grown(
    most: int, experiment_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow makes one whenever it lists a folder of a run, as for a table. What any run logs since is found."""
    with tracking(NOWHERE, tmp_path, worker="none") as mlflow:
        api = mlflow.MlflowClient()
        number = api.create_experiment(experiment_name)
        runs = [api.create_run(number).info.run_id for _ in range(40)]
        for run_id in runs:
            api.log_metric(run_id, "m", 1.0)
        first = api.create_logged_model(number, name="first", source_run_id=runs[0])

        def found(name: str) -> list[str]:
            return [model.model_id for model in api.search_logged_models([number], filter_string=f"name = '{name}'")]

        monkeypatch.setattr(store(NOWHERE).made_here._journals, "_most", most)
        assert [first.model_id] == found("first")
        counted = Counted(monkeypatch)
        assert [first.model_id] == found("first")
        assert max(0, len(runs) + 1 - most) == len(counted.read)  # the experiment's room is one too
        assert counted.looks < 12
        second = api.create_logged_model(number, name="second", source_run_id=runs[-1])
        assert [second.model_id] == found("second")
        api.set_logged_model_tags(first.model_id, {"k": "v"})
        counted.read.clear()
        (shown,) = api.search_logged_models([number], filter_string="name = 'first'")
        assert (first.model_id, {"k": "v"}) == (shown.model_id, shown.tags)
        assert runs[0] in counted.read
        assert len(counted.read) <= max(1, len(runs) + 1 - most + 1)


def test_what_waits_of_many_runs_is_not_in_memory_at_once(
    experiment_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who searches for a model reads all that waits of all runs, points too, of which an outage leaves millions."""
    with tracking(NOWHERE, tmp_path, worker="none") as mlflow:
        api = mlflow.MlflowClient()
        number = api.create_experiment(experiment_name)
        for _ in range(5):
            api.log_metric(api.create_run(number).info.run_id, "m", 1.0)
        read: list[LocalRun] = []
        held: list[int] = []
        theirs: Any = OnDisk._local_run

        def spy(reading: OnDisk, *arguments: Any) -> LocalRun:
            held.append(sum(len(run.pending) for run in read))
            run: LocalRun = theirs(reading, *arguments)
            read.append(run)
            return run

        monkeypatch.setattr(OnDisk, "_local_run", spy)
        assert [] == api.search_logged_models([number], filter_string="name = 'none'")
        assert [0] * 6 == held  # the experiment's room is one too


def test_of_the_points_of_a_run_that_wait_only_the_latest_are_in_memory(experiment_name: str, tmp_path: Path) -> None:
    """A day without the server leaves ten million of them, which took three gigabytes when the run was ended."""
    with tracking(NOWHERE, tmp_path, worker="none") as mlflow:
        api = mlflow.MlflowClient()
        mlflow.set_experiment(experiment_name)
        with mlflow.start_run() as run:
            run_id = run.info.run_id
            for step in range(200):
                mlflow.log_metric("m", step / 2, step=step)
                mlflow.log_metrics({"a": 1.0, "b": float(-step)}, step=step)
            mlflow.log_param("p", 1)
            held = store(NOWHERE).local_run(store(NOWHERE).canonical(run_id))
            assert held is not None
            assert len(held.pending) < 10
            assert {"m": 200, "a": 200, "b": 200} == {key: one.points for key, one in held.view.metrics.items()}
            shown = mlflow.get_run(run_id).data
            assert ({"m": 99.5, "a": 1.0, "b": -199.0}, {"p": "1"}) == (shown.metrics, shown.params)
            history = api.get_metric_history(run_id, "m")
            assert [(step, step / 2) for step in range(200)] == [(point.step, point.value) for point in history]


def test_journals_with_many_requests_take_the_room_of_several(
    experiment_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a model is active each point is a request: those of ten thousand runs would stay in memory for good."""
    with tracking(NOWHERE, tmp_path, worker="none") as mlflow:
        api = mlflow.MlflowClient()
        number = api.create_experiment(experiment_name)
        runs = sorted(api.create_run(number).info.run_id for _ in range(4))
        for run_id in runs:
            model_id = api.create_logged_model(number, name="m", source_run_id=run_id).model_id
            for step in range(60):
                api.log_metric(run_id, "loss", 1.0, step=step, model_id=model_id)
        remembered = store(NOWHERE).made_here._journals
        monkeypatch.setattr(remembered, "_most", 10)
        for _ in range(2):
            found = api.search_logged_models([number])
            assert [60] * 4 == [len(model.metrics) for model in found]
            assert runs[:2] == [home for home in remembered._held if home in runs]
        monkeypatch.setattr(remembered, "_most", 1)
        assert 4 == len(api.search_logged_models([number]))
        assert runs[:1] == [*remembered._held]


def test_what_is_filed_is_read_anew_if_the_ledger_could_not_be_read(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it seems to wait then: its files would hide for good what others have put in their place since."""
    uri = f"outbox+{mlflow_server.url}"
    with tracking(uri, tmp_path) as mlflow:
        mlflow.set_experiment(experiment_name)
        with mlflow.start_run() as run:
            mlflow.log_text("mine", "note.txt")
        deliver(uri)
        plugin, run_id = store(uri), run.info.run_id
        directory = plugin.outbox.directory
        eventually(
            lambda: run_id in directory.delivered_ids() and run_id not in directory.run_ids(), message="it is filed"
        )

        def refuse(*_: Any) -> Any:
            msg = "the ledger is locked"
            raise LedgerUnavailable(msg)

        with monkeypatch.context() as patch:
            patch.setattr(Reader, "query", refuse)
            assert [["note.txt"], ["note.txt"]] == [[*files] for files in plugin.files(run_id, "")]
        assert [["note.txt"], []] == [[*files] for files in plugin.files(run_id, "")]


def test_each_request_of_a_run_with_many_models_is_read_for_its_own_model_alone(
    experiment_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint at each epoch is one, and all are in the journal of the run. A deleted one is not found."""
    with tracking(NOWHERE, tmp_path, worker="none") as mlflow:
        api = mlflow.MlflowClient()
        number = api.create_experiment(experiment_name)
        run_id = api.create_run(number).info.run_id
        made = []
        for index in range(20):
            made.append(api.create_logged_model(number, name=f"m{index}", source_run_id=run_id).model_id)
            api.set_logged_model_tags(made[-1], {"at": str(index)})
            api.log_metric(run_id, "loss", float(index), step=index, model_id=made[-1])
        api.delete_logged_model(made[0])
        loads = codec.loads
        read: list[bytes | str] = []

        def counted(data: bytes | str) -> dict[str, Any]:
            read.append(data)
            return loads(data)

        monkeypatch.setattr(codec, "loads", counted)
        found = {model.model_id: model for model in api.search_logged_models([number], filter_string="name != 'x'")}
        assert {*made[1:]} == found.keys()
        assert len(read) < 5 * len(made)
        read.clear()
        last = found[made[-1]]
        assert ("19", [19.0]) == (last.tags["at"], [point.value for point in last.metrics])
        last.tags["at"] = "changed by who asked"
        again = {model.model_id: model for model in api.search_logged_models([number], filter_string="name != 'x'")}
        assert "19" == again[made[-1]].tags["at"]
        assert [] == read


def test_files_are_read_without_the_points_in_front_of_them(
    experiment_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model has many files, and each was looked for in all that waits of its run."""
    with tracking(NOWHERE, tmp_path / "outbox", worker="none") as mlflow:
        mlflow.set_experiment(experiment_name)
        with mlflow.start_run() as run:
            api, run_id = mlflow.MlflowClient(), run.info.run_id
            for step in range(200):
                mlflow.log_metric("m", float(step), step=step)
            for index in range(5):
                mlflow.log_text(str(index), f"many/{index}.txt")

            def listed() -> list[str]:
                return [info.path for info in api.list_artifacts(run_id, "many")]

            assert [f"many/{index}.txt" for index in range(5)] == listed()
            counted = Counted(monkeypatch)
            folder = Path(api.download_artifacts(run_id, "many", str(tmp_path)))
            assert ["0", "1", "2", "3", "4"] == [file.read_text() for file in sorted(folder.iterdir())]
            assert 0 == counted.events
            mlflow.log_text("new", "many/0.txt")
            mlflow.log_text("5", "many/5.txt")
            assert [f"many/{index}.txt" for index in range(6)] == listed()
            folder = Path(api.download_artifacts(run_id, "many", str(tmp_path)))
            assert ["new", "1", "2", "3", "4", "5"] == [file.read_text() for file in sorted(folder.iterdir())]
            assert counted.events < 20


def test_a_model_is_made_and_read_without_the_points_in_front_of_it(
    experiment_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each call that is about it the journal of its run is all that can answer."""
    with tracking(NOWHERE, tmp_path, worker="none") as mlflow:
        api = mlflow.MlflowClient()
        number = api.create_experiment(experiment_name)
        run_id = api.create_run(number).info.run_id
        for step in range(200):
            api.log_metric(run_id, "m", float(step), step=step)
        api.create_logged_model(number, name="first", source_run_id=run_id)
        counted = Counted(monkeypatch)
        model = api.create_logged_model(number, name="second", source_run_id=run_id, params={"p": "1"})
        assert "READY" == api.finalize_logged_model(model.model_id, "READY").status
        api.set_logged_model_tags(model.model_id, {"k": "v"})
        found = api.get_logged_model(model.model_id)
        assert ("second", {"p": "1"}, "v") == (found.name, found.params, found.tags["k"])
        assert counted.events < 20


def test_a_search_reads_no_run_of_another_experiment(
    experiment_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs share an outbox, in which all of their runs wait while the server is away: each asks for its own."""
    with tracking(NOWHERE, tmp_path, worker="none") as mlflow:
        api = mlflow.MlflowClient()
        mine, other = (api.create_experiment(f"{experiment_name} {which}") for which in ("mine", "other"))
        wanted = [api.create_run(mine).info.run_id for _ in range(3)]
        for _ in range(10):
            api.log_metric(api.create_run(other).info.run_id, "m", 1.0)
        counted = Counted(monkeypatch)
        assert {*wanted} == {run.info.run_id for run in api.search_runs([mine])}
        assert {*wanted} == {*counted.read}
        assert counted.looks < 12


def test_assessments_are_called_by_one_look_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation reads a thousand of them at once."""
    with tracking(NOWHERE, tmp_path, worker="none"):
        plugin = store(NOWHERE)
        asked: list[int] = []

        def names() -> dict[str, str]:
            asked.append(1)
            return {"theirs": "ours"}

        monkeypatch.setattr(plugin.ids, "names", names)
        traces = [
            SimpleNamespace(
                experiment_id="1",
                assessments=[
                    SimpleNamespace(metadata={"mlflow.assessment.sourceRunId": run_id}, run_id=run_id)
                    for run_id in ("theirs", "another's")
                ],
            )
            for _ in range(10)
        ]
        shown = plugin._all_called(traces)
        assert [["ours", "another's"]] * 10 == [[one.run_id for one in trace.assessments] for trace in shown]
        assert [1] == asked
