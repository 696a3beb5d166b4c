"""Tables, and models by their names, while the server is away: the outbox answers for what began in it, and no more."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from contents import client
from mlflow_outbox.testing.proxy import FaultProxy
from plugin_world import NOWHERE, away, deliver, store, the_runs, tracking
from servers import MlflowServer, eventually
from test_plugin_processes import program


def test_processes_append_to_one_table_while_the_server_is_away(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """The second one lists, reads and writes again what the first one left; the server gets one table of both rows."""
    append = "mlflow.log_table({'n': [__import__('os').getpid()]}, 'deep/table.json')"
    with FaultProxy(mlflow_server.url) as proxy:
        uri = f"outbox+{proxy.url}"
        with tracking(uri, tmp_path / "outbox") as mlflow:
            mlflow.set_experiment(experiment_name)
            with mlflow.start_run() as run:
                made = mlflow.get_run(run.info.run_id).info.run_id
                deliver(uri)
                proxy.down()
                mlflow.log_table({"n": [0]}, "deep/table.json")
                for _ in range(2):
                    other = program(
                        tmp_path,
                        f"import mlflow\nwith mlflow.start_run(run_id={made!r}):\n    {append}",
                        MLFLOW_TRACKING_URI=uri,
                        MLFLOW_OUTBOX_DIR=str(tmp_path / "outbox"),
                        MLFLOW_OUTBOX_EXIT_TIMEOUT="0",
                    )
                    output, _ = other.communicate(timeout=200)
                    assert 0 == other.returncode, output
                assert 3 == len(mlflow.load_table("deep/table.json", run_ids=[made]))
            proxy.up()
            eventually(lambda: not store(uri).server.is_away(), message="the pause after the outage is over")
            deliver(uri)
    with tracking(mlflow_server.url, tmp_path / "unused") as mlflow:
        assert 3 == len(mlflow.load_table("deep/table.json", run_ids=[made]))


def test_of_a_run_that_began_elsewhere_no_table_is_said_to_be_missing(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """Its table may be at the server, and one that is written anew would take its place."""
    from mlflow.exceptions import MlflowException

    with client(mlflow_server.url) as api:
        number = api.create_experiment(experiment_name)
        theirs = api.create_run(number).info.run_id
        api.log_table(theirs, {"n": [1]}, "table.json")
    with FaultProxy(mlflow_server.url) as proxy, tracking(f"outbox+{proxy.url}", tmp_path) as mlflow:
        api = mlflow.MlflowClient()
        api.log_metric(theirs, "m", 1.0)
        proxy.down()
        for call in (api.list_artifacts, lambda run: api.log_table(run, {"n": [2]}, "table.json")):
            with pytest.raises(MlflowException, match="the list of artifacts needs the tracking server"):
                call(theirs)
        proxy.up()
    (held,) = the_runs(mlflow_server.url, experiment_name)
    assert theirs == held.info.run_id


def test_a_program_may_begin_with_an_active_model_while_the_server_is_away(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """The model of a name that nobody here knows is made, and is found from then on; the server gets it once."""
    with away(mlflow_server, tmp_path) as (mlflow, proxy, uri):
        for number in range(2):
            if number:
                mlflow.set_experiment(experiment_name)
            first = mlflow.set_active_model(name="agent")
            assert first.model_id == mlflow.set_active_model(name="agent").model_id
            assert first.model_id != mlflow.set_active_model(name="another").model_id
            mlflow.clear_active_model()
        proxy.up()
        eventually(lambda: not store(uri).server.is_away(), message="the pause after the outage is over")
        deliver(uri)
        assert "agent" == mlflow.get_logged_model(first.model_id).name
        assert first.model_id == mlflow.set_active_model(name="agent").model_id
        mlflow.clear_active_model()
    with client(mlflow_server.url) as api:
        found = api.search_logged_models([api.get_experiment_by_name(experiment_name).experiment_id])
        assert ["agent", "another"] == sorted(model.name for model in found)


def test_a_search_for_models_that_were_not_made_here_says_that_it_needs_the_server(tmp_path: Path) -> None:
    """What the server might find, by metrics for instance, nobody else can say; a deleted model is found no more."""
    from mlflow.exceptions import MlflowException

    with tracking(NOWHERE, tmp_path, exit_timeout=0) as mlflow:
        api = mlflow.MlflowClient()
        begin = time.monotonic()
        with pytest.raises(MlflowException, match="a search for models by their metrics needs"):
            api.search_logged_models(["0"], filter_string="metrics.accuracy > 0.5")
        with pytest.raises(MlflowException, match="a search for models that this outbox did not make needs"):
            api.search_logged_models(["0"], filter_string="params.depth = '5'")
        assert time.monotonic() - begin < 30.0, "MLflow's own client tries for four minutes"
        kept = mlflow.initialize_logged_model(name="kept", tags={"k": "v"})
        gone = mlflow.initialize_logged_model(name="gone")
        api.delete_logged_model(gone.model_id)
        assert ["kept"] == [model.name for model in api.search_logged_models(["0"])]
        assert [kept.model_id] == [m.model_id for m in api.search_logged_models(["0"], filter_string="tags.k = 'v'")]
        assert [] == list(api.search_logged_models(["1"], filter_string="name = 'kept'"))
