"""Programs that are started again while the server is away: what other processes logged through the outbox is known."""

from __future__ import annotations

import contextlib
import os
import textwrap
from pathlib import Path
from typing import Any

import pytest

from mlflow_outbox.plugin.mentions import Mentions
from mlflow_outbox.spool import provisional
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox.testing.proxy import FaultProxy
from plugin_world import NOWHERE, WAYS, away, deliver, store, the_runs, tracking
from servers import MlflowServer, eventually
from test_plugin_processes import program


def first_program(directory: Path, uri: str, experiment: str, *, exit_timeout: int) -> list[str]:
    """Have another process log a run and make a model with the server there; return the ids of both."""
    text = textwrap.dedent(f"""
        mlflow.set_experiment({experiment!r})
        with mlflow.start_run(run_name="first") as run:
            mlflow.log_metric("m", 1.0, step=1)
        print("ids", run.info.run_id, mlflow.set_active_model(name="agent").model_id)
    """)
    child = program(
        directory,
        text,
        MLFLOW_TRACKING_URI=uri,
        MLFLOW_OUTBOX_EXIT_TIMEOUT=str(exit_timeout),
        MLFLOW_OUTBOX_CREATE_TIMEOUT="20",
    )
    output, _ = child.communicate(timeout=250)
    assert 0 == child.returncode, output
    return next(line for line in output.splitlines() if line.startswith("ids ")).split()[1:]


@pytest.mark.parametrize("exit_timeout", [0, 20])
def test_a_program_that_is_started_again_knows_its_experiment_by_name(
    exit_timeout: int, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Whether or not the first had delivered: it goes on with its run, finds it, and its model is not made again."""
    with FaultProxy(mlflow_server.url) as proxy:
        uri = f"outbox+{proxy.url}"
        run_id, model_id = first_program(tmp_path, uri, experiment_name, exit_timeout=exit_timeout)
        proxy.down()
        with tracking(uri, tmp_path) as mlflow:
            number = mlflow.set_experiment(experiment_name).experiment_id
            with mlflow.start_run(run_id=run_id):
                mlflow.log_metric("m", 2.0, step=2)
            assert number == mlflow.get_run(run_id).info.experiment_id
            assert ["first"] == [run.info.run_name for run in mlflow.search_runs(output_format="list")]
            assert [model_id] == [model.model_id for model in mlflow.search_logged_models(output_format="list")]
            assert model_id == mlflow.set_active_model(name="agent").model_id
            mlflow.clear_active_model()
            proxy.up()
            deliver(uri)
    (run,) = the_runs(mlflow_server.url, experiment_name)
    assert (number, {"m": 2.0}) == (run.info.experiment_id, run.data.metrics)


def test_an_experiment_that_was_met_by_its_runs_alone_is_known_too(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """As that of the server's, which nobody made through this outbox; a name that nothing on disk has is a new one."""
    from mlflow.exceptions import MlflowException

    with FaultProxy(mlflow_server.url) as proxy:
        uri = f"outbox+{proxy.url}"
        with tracking(mlflow_server.url, tmp_path) as mlflow:
            number = mlflow.create_experiment(experiment_name)
        with tracking(uri, tmp_path, create_timeout=20) as mlflow:
            mlflow.set_experiment(experiment_name)
            with mlflow.start_run():
                pass
        proxy.down()
        with tracking(uri, tmp_path, exit_timeout=0) as mlflow:
            assert number == mlflow.set_experiment(experiment_name).experiment_id
            with pytest.raises(MlflowException, match="already exists"):
                mlflow.create_experiment(experiment_name)
            assert number != mlflow.set_experiment(f"{experiment_name}-other").experiment_id


def test_the_name_that_an_experiment_had_before_its_rename_does_not_lead_a_later_program_to_it(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Renamed with the server there, through this outbox: a program that is started offline makes a new one."""
    with FaultProxy(mlflow_server.url) as proxy:
        uri = f"outbox+{proxy.url}"
        with tracking(uri, tmp_path, create_timeout=20) as mlflow:
            number = mlflow.set_experiment(experiment_name).experiment_id
            with mlflow.start_run(run_name="before"):
                pass
            deliver(uri)
            mlflow.MlflowClient().rename_experiment(number, f"{experiment_name}-old")
        proxy.down()
        with tracking(uri, tmp_path) as mlflow:
            assert number != mlflow.set_experiment(experiment_name).experiment_id
            with mlflow.start_run(run_name="after"):
                pass
            proxy.up()
            deliver(uri)
    for name, run in ((f"{experiment_name}-old", "before"), (experiment_name, "after")):
        assert [run] == [found.info.run_name for found in the_runs(mlflow_server.url, name)]


@pytest.mark.parametrize("is_started_again", [False, True])
def test_a_run_is_gone_on_with_while_the_server_is_away_whatever_its_experiment_was_called(
    is_started_again: bool, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """MLflow compares its id with that of the experiment which was set; this one began offline, and has two."""
    with FaultProxy(mlflow_server.url) as proxy:
        proxy.down()
        uri = f"outbox+{proxy.url}"
        with contextlib.ExitStack() as stack:
            mlflow = stack.enter_context(tracking(uri, tmp_path, create_timeout=20))
            number = mlflow.set_experiment(experiment_name).experiment_id
            with mlflow.start_run() as offline:
                pass
            proxy.up()
            deliver(uri)
            eventually(lambda: not store(uri).server.is_away(), message="the pause after the outage is over")
            if is_started_again:
                stack.close()
                mlflow = stack.enter_context(tracking(uri, tmp_path, create_timeout=20))
                number = mlflow.set_experiment(experiment_name).experiment_id
            assert provisional.is_provisional(number) is not is_started_again
            with mlflow.start_run() as online:
                pass
            assert [True, False] == [provisional.is_provisional(run.info.run_id) for run in (offline, online)]
            deliver(uri)
            proxy.down()
            for run in (offline, online):
                with mlflow.start_run(run_id=run.info.run_id):
                    mlflow.log_metric("m", 1.0)
                assert number == mlflow.get_run(run.info.run_id).info.experiment_id
            proxy.up()
            deliver(uri)
    assert [{"m": 1.0}] * 2 == [run.data.metrics for run in the_runs(mlflow_server.url, experiment_name)]


def test_a_search_in_an_experiment_that_the_server_may_know_says_that_it_is_away(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody else may have made one of the name: with no run here there is no answer, with one there is a warning."""
    from mlflow.exceptions import MlflowException

    with away(mlflow_server, tmp_path, exit_timeout=0) as (mlflow, _, _):
        number = mlflow.set_experiment(experiment_name).experiment_id
        with pytest.raises(MlflowException, match="a search for runs that this outbox did not make needs the tracking"):
            mlflow.search_runs([number])
        with mlflow.start_run():
            pass
        assert 1 == len(mlflow.search_runs([number]))
        assert "a search for runs found only those of this outbox" in caplog.text


def directory_of(tmp_path: Path, mlflow_server: MlflowServer, experiments: list[str]) -> Any:
    """Return the outbox of a store through which a run was made in each of some experiments."""
    uri = f"outbox+{mlflow_server.url}"
    with tracking(uri, tmp_path, create_timeout=20, worker="none") as mlflow:
        for name in experiments:
            mlflow.set_experiment(name)
            with mlflow.start_run():
                pass
        return store(uri).outbox


def test_journals_are_looked_through_once_from_the_newest(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No further than to the name that is asked for, and what was read for one name is not read for the next."""
    names = [f"{experiment_name}-{number}" for number in range(3)]
    outbox = directory_of(tmp_path, mlflow_server, names)
    mentions = Mentions(outbox)
    read: list[str] = []
    look = mentions._mention_in
    monkeypatch.setattr(mentions, "_mention_in", lambda folder: read.append(folder.name) or look(folder))
    everything = len(outbox.directory.run_ids())
    assert next(mentions.of(names[2])) != next(mentions.of(names[1]))
    assert len(read) < everything
    assert [] == list(mentions.of("no experiment"))
    assert everything == len(read)
    assert [] == list(mentions.of("none either"))
    assert 1 == len(list(mentions.of(names[0])))
    assert everything == len(read)


def test_a_journal_that_cannot_be_read_keeps_no_other_back(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """It is the worker that says so; here it is as if it was not there."""
    outbox = directory_of(tmp_path, mlflow_server, [experiment_name])
    folder = OutboxDirectory.open(outbox.directory.path).make_run("damaged")
    (folder / "a.log").write_bytes(b"no journal")
    (folder / "b.log").mkdir()
    assert 1 == len(list(Mentions(outbox).of(experiment_name)))


def test_a_subprocess_in_another_directory_goes_on_with_a_run_that_began_offline(
    experiment_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a setting the outbox is in the current directory; subprocesses are told which one that was."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with tracking(NOWHERE, tmp_path, dir="", exit_timeout=0) as mlflow:
        mlflow.set_experiment(experiment_name)
        with mlflow.start_run() as run:
            text = f"import os; os.chdir({str(elsewhere)!r}); _log({run.info.run_id!r}, 1)"
            child = program(Path(os.environ["MLFLOW_OUTBOX_DIR"]), text)
            output, _ = child.communicate(timeout=200)
            assert 0 == child.returncode, output
            assert {"child-1": 1.0} == mlflow.get_run(run.info.run_id).data.metrics
        monkeypatch.chdir(elsewhere)
        other = store("outbox+http://127.0.0.1:99").outbox
        assert tmp_path / ".mlflow-outbox" == other.directory.path.parent
        other.close(0)
    assert [] == list(elsewhere.iterdir())


@pytest.mark.parametrize("way", WAYS)
def test_who_ends_a_run_last_has_the_last_word_whenever_it_is_said_to_have_ended(
    way: str, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """A program puts the end of another one's run right: with the time when it failed, or after one in the future."""
    past, future = 1_600_000_000_000, 9_600_000_000_000
    with FaultProxy(mlflow_server.url) as proxy:
        uri = mlflow_server.url if way == "plain" else f"outbox+{proxy.url}"
        with tracking(uri, tmp_path) as mlflow:
            api = mlflow.MlflowClient()
            number = api.create_experiment(experiment_name)
            if way == "away":
                proxy.down()
            first, second = (api.create_run(number, run_name=name).info.run_id for name in ("first", "second"))
            api.set_terminated(first)
            api.set_terminated(second, end_time=future)
            if way == "up":
                deliver(uri)
        if way == "killed":
            proxy.down()
        with tracking(uri, tmp_path) as mlflow:
            api = mlflow.MlflowClient()
            api.set_terminated(first, "FAILED", end_time=past)
            api.set_terminated(second, "FAILED")
            for run_id, is_so in ((first, lambda end: past == end), (second, lambda end: past < end < future)):
                info = api.get_run(run_id).info
                assert "FAILED" == info.status
                assert is_so(info.end_time), info
            proxy.up()
            deliver(uri)
    found = {run.info.run_name: run.info for run in the_runs(mlflow_server.url, experiment_name)}
    assert {"FAILED"} == {info.status for info in found.values()}
    assert past == found["first"].end_time
    assert past < found["second"].end_time < future
