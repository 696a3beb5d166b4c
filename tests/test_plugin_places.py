"""Where the plugin is found and leads to: entry points, several tracking URIs, databases and directories."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from contents import client
from mlflow_outbox_worker.ledger import Ledger
from mlflow_outbox_worker.notes import destination_note
from plugin_world import NOWHERE, deliver, entry_points, environment_with_plugin, register, store, the_runs, tracking
from servers import MlflowServer, eventually


def test_several_uris_in_one_process_do_not_meet(
    mlflow_server: MlflowServer, sqlite_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """Two outboxes and a plain client side by side, in threads: each store holds its own."""
    first, second = f"outbox+{mlflow_server.url}", f"outbox+{sqlite_uri}"
    with tracking(first, tmp_path) as mlflow:

        def log(uri: str) -> None:
            api = mlflow.MlflowClient(tracking_uri=uri)
            number = api.create_experiment(f"{experiment_name}-{uri.partition(':')[0]}")
            run = api.create_run(number, run_name="r")
            api.log_metric(run.info.run_id, "m", 1.0)
            api.log_text(run.info.run_id, uri, "uri.txt")
            api.set_terminated(run.info.run_id)

        uris = [first, second, mlflow_server.url]
        threads = [threading.Thread(target=log, args=(uri,)) for uri in uris]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        deliver(first)
        deliver(second)
        store(second).outbox.close(0)
    for uri in uris:
        (run,) = the_runs(uri.removeprefix("outbox+"), f"{experiment_name}-{uri.partition(':')[0]}")
        assert {"m": 1.0} == run.data.metrics


@pytest.mark.compatibility
@pytest.mark.parametrize("kind", ["sqlite", "file"])
def test_embedded_stores_work_too(
    kind: str, sqlite_uri: str, file_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """outbox+sqlite and outbox+file: runs, points, files, and what was logged is read back."""
    plain = {"sqlite": sqlite_uri, "file": file_uri}[kind]
    uri = f"outbox+{plain}"
    with tracking(uri, tmp_path) as mlflow:
        mlflow.set_experiment(experiment_name)
        with mlflow.start_run(run_name="r") as run:
            mlflow.log_metric("m", 1.0)
            mlflow.log_params({"a": 1})
            mlflow.log_text("hello", "notes/a.txt")
            assert "hello" == mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/notes/a.txt")
        deliver(uri)
    with tracking(plain, tmp_path) as mlflow:
        (found,) = mlflow.search_runs(experiment_names=[experiment_name], output_format="list")
        assert ({"m": 1.0}, {"a": "1"}, "FINISHED") == (found.data.metrics, found.data.params, found.info.status)
        assert "hello" == mlflow.artifacts.load_text(f"runs:/{found.info.run_id}/notes/a.txt")


@pytest.mark.compatibility
def test_every_entry_point_leads_somewhere() -> None:
    """Five groups of MLflow's; the schemes are those that the documentation names."""
    found = entry_points()
    assert {
        "mlflow.tracking_store",
        "mlflow.model_registry_store",
        "mlflow.artifact_repository",
        "mlflow.scorer_store",
        "mlflow.labeling_store",
    } == set(found)
    assert {
        "outbox+http",
        "outbox+https",
        "outbox+sqlite",
        "outbox+sqlite+pysqlite",
        "outbox+postgresql",
        "outbox+file",
        "outbox+databricks",
    } <= set(found["mlflow.tracking_store"])
    register()


@pytest.mark.parametrize(
    ("uri", "said"),
    [("outbox+databricks", 1), ("outbox+databricks:", 0), ("outbox+runs", 1), ("outbox+http://host", 0)],
)
def test_a_tracking_uri_that_mlflow_takes_for_a_path_is_named(uri: str, said: int, tmp_path: Path) -> None:
    """Before MLflow makes a directory of that name: it asks the plugin for what has a colon alone."""
    done = subprocess.run(
        [sys.executable, "-c", "import mlflow_outbox.plugin.entry"],
        env={**environment_with_plugin(tmp_path), "MLFLOW_TRACKING_URI": uri},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert 0 == done.returncode, done.stderr
    assert said == done.stderr.count("for the name of a directory")
    assert said == done.stderr.count("write outbox+databricks: for a workspace")


def test_the_tracking_uri_alone_makes_a_program_durable(sqlite_uri: str, tmp_path: Path) -> None:
    """MLflow finds the plugin by its entry points: no import, no registration, one variable of the environment."""
    code = "import mlflow; run = mlflow.start_run(run_name='r'); mlflow.log_metric('m', 1.0); mlflow.end_run()"
    environment = environment_with_plugin(tmp_path)
    environment["MLFLOW_TRACKING_URI"] = f"outbox+{sqlite_uri}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert 0 == done.returncode, done.stderr
    assert [] != list((tmp_path / ".mlflow-outbox").iterdir())
    (run,) = the_runs(sqlite_uri, "Default")
    assert ("r", {"m": 1.0}, "FINISHED") == (run.info.run_name, run.data.metrics, run.info.status)


def test_parties_that_meet_at_a_new_database_leave_it_whole(tmp_path: Path) -> None:
    """The tables are made with the store, before a worker is there: MLflow's own store beside it finds them."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    plain = f"sqlite:///{tmp_path / 'new.db'}"
    uri = f"outbox+{plain}"
    with tracking(uri, tmp_path / "outbox") as mlflow:
        mlflow.MlflowClient()
        assert ["0"] == [found.experiment_id for found in SqlAlchemyStore(plain, str(tmp_path)).search_experiments()]
        with mlflow.start_run() as run:
            mlflow.log_metric("m", 1.0)
        deliver(uri)
        assert {"m": 1.0} == SqlAlchemyStore(plain, str(tmp_path)).get_run(run.info.run_id).data.metrics


def flushed_in_vain(uri: str) -> bool:
    """Return whether the worker tried to deliver and counts the destination as away."""
    outbox = store(uri).outbox
    left = not outbox.flush(0.1)
    with contextlib.closing(Ledger.open(outbox.directory.ledger, read_only=True)) as ledger:
        return left and destination_note(ledger).state == "away"


def test_a_database_that_was_taken_away_is_not_made_anew(sqlite_uri: str, tmp_path: Path) -> None:
    """An empty one in its place would take what belongs into the other; events wait until the file is back."""
    uri = f"outbox+{sqlite_uri}"
    file = Path(sqlite_uri.removeprefix("sqlite:///"))
    with tracking(uri, tmp_path / "outbox", worker="none") as mlflow:
        with mlflow.start_run() as run:
            mlflow.log_metric("m", 1.0)
        aside = file.rename(file.with_suffix(".aside"))
        with tracking(uri, tmp_path / "outbox", worker="thread"):
            eventually(lambda: flushed_in_vain(uri), message="the worker has found no database")
            assert not file.exists()
            aside.rename(file)
            deliver(uri)
    with client(sqlite_uri) as api:
        assert {"m": 1.0} == api.get_run(run.info.run_id).data.metrics


@pytest.mark.compatibility
def test_nothing_of_mlflows_store_is_left_out(tmp_path: Path) -> None:
    """Every method of AbstractStore is the plugin's own or delegated; none is the base class's."""
    from mlflow.store.tracking.abstract_store import AbstractStore

    with tracking(NOWHERE, tmp_path, exit_timeout=0):
        kind = type(store(NOWHERE))
        bases = {part for part in AbstractStore.__mro__ if part is not object}
        left = [
            name
            for name in dir(AbstractStore)
            if not name.startswith("__")
            and callable(getattr(AbstractStore, name))
            and next(part for part in kind.__mro__ if name in part.__dict__) in bases
        ]
    assert [] == [name for name in left if not name.startswith("_abc")]


def test_a_database_whose_driver_is_named_is_the_same_one(
    sqlite_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """SQLAlchemy's own name for an SQLite file; the registry is found by it too."""
    uri = f"outbox+{sqlite_uri.replace('sqlite:', 'sqlite+pysqlite:')}"
    with tracking(uri, tmp_path / "outbox") as mlflow:
        mlflow.set_experiment(experiment_name)
        with mlflow.start_run():
            mlflow.log_metric("m", 1.0)
        assert experiment_name == mlflow.MlflowClient().create_registered_model(experiment_name).name
        assert store(f"outbox+{sqlite_uri}").outbox is store(uri).outbox
        deliver(uri)
    assert [{"m": 1.0}] == [run.data.metrics for run in the_runs(sqlite_uri, experiment_name)]


def test_the_registry_of_a_database_is_in_it_whatever_its_directory_is_called(
    experiment_name: str, tmp_path: Path
) -> None:
    """MLflow's own store of the registry is given the path as it reads it."""
    plain = f"sqlite:///{tmp_path}/store/lr=0.1 (1)/mlflow.db"
    with tracking(f"outbox+{plain}", tmp_path / "outbox") as mlflow:
        mlflow.MlflowClient().create_registered_model(experiment_name)
    with client(plain) as api:
        assert experiment_name == api.get_registered_model(experiment_name).name
    assert ["lr=0.1 (1)"] == [path.name for path in (tmp_path / "store").iterdir()]


@pytest.mark.parametrize(
    "database",
    ["postgresql+psycopg2", "postgresql+psycopg", "mysql+pymysql", "mysql+mysqldb", "mssql+pyodbc", "mssql+pymssql"],
)
def test_a_database_is_found_with_the_driver_that_its_uri_names(database: str) -> None:
    """MLflow looks for a plugin by all that stands before the colon, and its own stores by the database alone."""
    from mlflow.genai.scorers.registry import _scorer_store_registry
    from mlflow.tracking._model_registry.utils import _get_store_registry
    from mlflow.tracking._tracking_service.utils import _tracking_store_registry

    register()
    uri = f"outbox+{database}://user:word@host/mlflow"
    for registry in (_tracking_store_registry, _get_store_registry(), _scorer_store_registry):
        assert "mlflow_outbox.plugin.entry" == registry.get_store_builder(uri).__module__
