"""The sink against real stores and servers, and its manners as a guest."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

from mlflow_outbox.destination import resolve
from mlflow_outbox.errors import DestinationError, TrackingUnavailable
from mlflow_outbox_worker.mlflow_sink import open_client, open_sink, stores
from mlflow_outbox_worker.outcome import classify
from mlflow_outbox_worker.sink import MetricPoint, Sink, SinkError
from servers import MlflowServer, unused_port
from sink_contract import NOW_MS, SECRET, SinkContract, closing, fails, new_run

pytestmark = pytest.mark.compatibility


def wait_for_no_lock(store: Any) -> None:
    """Let SQLite give up at once, where MLflow lets it wait for 20 s in each session."""
    from sqlalchemy import event

    def shorten(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> Any:
        return statement.replace("busy_timeout = 20000", "busy_timeout = 10"), parameters

    event.listen(store.engine, "before_cursor_execute", shorten, retval=True)


class TestTrackingServer(SinkContract):
    """The contract, through HTTP."""

    serves_artifacts = True

    @pytest.fixture
    def sink(self, mlflow_server: MlflowServer) -> Iterator[Sink]:
        """The sink under test."""
        with closing(open_sink(mlflow_server.url)) as sink:
            yield sink

    def test_requests_for_several_runs_may_be_under_way_at_once(self, sink: Sink) -> None:
        """A server is there for many."""
        assert sink.parallel

    def test_a_race_for_an_experiment_has_one_result(self, mlflow_server: MlflowServer, experiment_name: str) -> None:
        """Whoever comes second uses the experiment of who came first."""
        with closing(open_sink(mlflow_server.url)) as sink, ThreadPoolExecutor(4) as pool:
            assert 1 == len(set(pool.map(sink.experiment_id, [experiment_name] * 4)))

    def test_a_deleted_experiment_is_parked_with_advice(self, sink: Sink, experiment_name: str) -> None:
        """Its name is taken and it takes no runs, so a person has to decide."""
        experiment_id = sink.experiment_id(experiment_name)
        sink._store.delete_experiment(experiment_id)  # type: ignore[attr-defined]  # the only Sink that there is
        assert sink.find_experiment(experiment_name) is None
        error = fails(lambda: sink.experiment_id(experiment_name))
        assert "parked" == classify(error, "create_experiment").kind
        assert "restore it there, or rename it" in str(error)

    def test_an_mlflow_without_the_known_transport_is_served_all_the_same(
        self, mlflow_server: MlflowServer, experiment_name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where a future MLflow calls its transport otherwise, its own makes the one attempt."""
        from mlflow_outbox_worker.mlflow_sink import rebound

        monkeypatch.setattr(rebound, "_TRANSPORT_NAME", "a name of the future")
        with closing(open_sink(mlflow_server.url)) as sink:
            new_run(sink, sink.experiment_id(experiment_name))
        with closing(open_sink(f"http://127.0.0.1:{unused_port()}")) as sink:
            error = fails(lambda: sink.get_run("a" * 32))
        assert ("connection", False) == (error.kind, error.sent)


class TestSqlite(SinkContract):
    """The contract, on a database file."""

    @pytest.fixture
    def sink(self, sqlite_uri: str) -> Iterator[Sink]:
        """The sink under test."""
        with closing(open_sink(sqlite_uri)) as sink:
            yield sink

    def test_one_request_at_a_time(self, sink: Sink) -> None:
        """SQLite has one writer."""
        assert not sink.parallel

    def test_searches_and_histories_are_read_to_their_last_page(
        self, sink: Sink, experiment_name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Pages are the store's business."""
        from mlflow_outbox_worker.mlflow_sink import recorder

        monkeypatch.setattr(recorder, "RUNS_PER_PAGE", 2)
        monkeypatch.setattr(recorder, "POINTS_PER_PAGE", 2)
        experiment_id = sink.experiment_id(experiment_name)
        runs = [new_run(sink, experiment_id, "b" * 32, NOW_MS + later) for later in range(5)]
        assert runs == sink.find_runs(experiment_id, "b" * 32)
        assert runs[::-1] == [run.run_id for run in sink.search_runs(experiment_id)]
        points = [MetricPoint("m", 1.0, NOW_MS + step, step) for step in range(5)]
        sink.log_batch(runs[0], points, {}, {})
        assert points == sink.metric_history(runs[0], "m")

    def test_a_run_that_begins_between_two_pages_shows_no_other_one_twice(
        self, sink: Sink, experiment_name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Pages are counted from the newest run, and a session asks for its runs while others begin."""
        from mlflow_outbox_worker.mlflow_sink import recorder

        monkeypatch.setattr(recorder, "RUNS_PER_PAGE", 2)
        experiment_id = sink.experiment_id(experiment_name)
        runs = [new_run(sink, experiment_id, start_time_ms=NOW_MS + later) for later in range(4)]
        store: Any = sink._store  # type: ignore[attr-defined]  # the only Sink that there is
        search, later = store.search_runs, iter(range(10, 20))

        def searching(*given: Any) -> Any:
            page = search(*given)
            new_run(sink, experiment_id, start_time_ms=NOW_MS + next(later))
            return page

        monkeypatch.setattr(store, "search_runs", searching)
        assert runs[::-1] == [run.run_id for run in sink.search_runs(experiment_id)]

    def test_a_connection_that_is_in_use_when_the_store_is_closed_is_closed_after_that(self, sqlite_uri: str) -> None:
        """By the thread that uses it, not by the garbage collector some time later."""
        sink = open_sink(sqlite_uri)
        engine = sink._store.engine  # type: ignore[attr-defined]  # the only Sink that there is
        with engine.connect() as connection:
            held = connection.connection.dbapi_connection
            sink.close()
            assert 1 == connection.exec_driver_sql("SELECT 1").scalar()
        with pytest.raises(sqlite3.ProgrammingError, match="closed database"):
            held.execute("SELECT 1")
        with engine.connect() as connection:
            assert 1 == connection.exec_driver_sql("SELECT 1").scalar()
        sink.close()

    def test_a_forked_child_has_connections_of_its_own(self, sqlite_uri: str) -> None:
        """Those of its parent stay in use there."""
        with closing(open_sink(sqlite_uri)) as sink:
            sink.find_experiment("Default")
            engine = sink._store.engine  # type: ignore[attr-defined]  # the only Sink that there is
            pool = engine.pool
            assert pool.checkedin()
            child = os.fork()
            if child == 0:
                os._exit(7 if engine.pool is not pool and not engine.pool.checkedin() else 1)
            assert 7 == os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            assert engine.pool is pool

    def test_a_locked_database_is_retried(self, sqlite_uri: str, experiment_name: str) -> None:
        """Another writer goes away; nothing about the events is wrong."""
        with closing(open_sink(f"{sqlite_uri}?timeout=0.01")) as sink:
            run_id = new_run(sink, sink.experiment_id(experiment_name))
            with contextlib.closing(sqlite3.connect(sqlite_uri.removeprefix("sqlite:///"))) as other:
                other.execute("BEGIN EXCLUSIVE")
                wait_for_no_lock(sink._store)  # type: ignore[attr-defined]  # the only Sink that there is
                error = fails(lambda: sink.log_batch(run_id, [], {"p": "1"}, {}))
        assert "retry" == classify(error, "log_batch").kind
        assert "locked" in str(error)

    def test_a_file_that_was_opened_for_reading_only_is_opened_again(
        self, sqlite_uri: str, experiment_name: str
    ) -> None:
        """SQLite does that without a word where it cannot open the file for writing, be it once."""
        from sqlalchemy import event

        with closing(open_sink(sqlite_uri)) as sink:
            engine = sink._store.engine  # type: ignore[attr-defined]  # the only Sink that there is
            read_only = [f"file:{sqlite_uri.removeprefix('sqlite:///')}?mode=ro"]

            def connect(*_: Any) -> Any:
                return sqlite3.connect(read_only.pop(), uri=True) if read_only else None

            engine.dispose()
            event.listen(engine, "do_connect", connect)
            assert "retry" == classify(fails(lambda: sink.experiment_id(experiment_name)), "experiment_id").kind
            assert sink.experiment_id(experiment_name)
        assert [] == read_only

    def test_a_schema_of_another_version_is_parked(self, sqlite_uri: str) -> None:
        """Somebody has to upgrade the database or MLflow."""
        with contextlib.closing(sqlite3.connect(sqlite_uri.removeprefix("sqlite:///"))) as database:
            database.execute("UPDATE alembic_version SET version_num = 'cc1f77228345'")
            database.commit()
        assert "parked" == classify(fails(lambda: open_sink(sqlite_uri)), "open").kind

    def test_a_file_that_is_no_database_does_not_block_or_lose_anything(self, tmp_path: Path) -> None:
        """The error comes at once and is not about an event."""
        (tmp_path / "broken.db").write_bytes(b"this is not SQLite" * 100)
        error = fails(lambda: open_sink(f"sqlite:///{tmp_path}/broken.db"))
        assert classify(error, "open").kind in {"retry", "parked"}


class TestFileStore(SinkContract):
    """The contract, on a directory."""

    deduplicates = False

    @pytest.fixture
    def sink(self, file_uri: str) -> Iterator[Sink]:
        """The sink under test."""
        with closing(open_sink(file_uri)) as sink:
            yield sink

    def test_a_path_is_a_file_store(self, tmp_path: Path, experiment_name: str) -> None:
        """Plain paths, also relative ones, keep their meaning when the program changes its directory."""
        with closing(open_sink("some/where")) as sink:
            os.chdir("/")
            sink.experiment_id(experiment_name)
        assert [] != list((tmp_path / "some" / "where").glob("*/meta.yaml"))

    def test_a_full_disk_is_retried(self, sink: Sink, file_uri: str, experiment_name: str) -> None:
        """The file store hides every error as INTERNAL_ERROR; the cause decides."""
        experiment_id = sink.experiment_id(experiment_name)
        run_id = new_run(sink, experiment_id)
        metrics = Path(file_uri.removeprefix("file://"), experiment_id, run_id, "metrics")
        metrics.mkdir(exist_ok=True)
        (metrics / "m").symlink_to("/dev/full")
        error = fails(lambda: sink.log_batch(run_id, [MetricPoint("m", 1.0, NOW_MS, 0)], {}, {}))
        assert ("retry", 503) == (classify(error, "log_batch").kind, error.status)

    def test_an_artifact_can_be_read_by_who_may_read_other_new_files(
        self, sink: Sink, experiment_name: str, tmp_path: Path
    ) -> None:
        """The private mode of the outbox's copy does not travel with it."""
        run_id = new_run(sink, sink.experiment_id(experiment_name))
        (tmp_path / "copy").write_bytes(b"x")
        (tmp_path / "copy").chmod(0o600)
        (tmp_path / "any new file").touch()
        sink.upload(run_id, tmp_path / "copy", "folder/name.txt")
        stored = Path(sink.get_run(run_id).artifact_uri.removeprefix("file://"), "folder", "name.txt")
        modes = [stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "any new file", stored, tmp_path / "copy")]
        assert [modes[0], modes[0], 0o600] == modes

    def test_a_link_in_the_place_of_a_copy_is_not_followed_into_a_directory(
        self, sink: Sink, experiment_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It may come when the copy was looked at, or while it is being stored; others can read what is there."""
        run_id = new_run(sink, sink.experiment_id(experiment_name))
        secret, copy, name = tmp_path / "private", tmp_path / "copy", LocalArtifactRepository.log_artifact
        secret.write_text(SECRET)
        copy.symlink_to(secret)
        fails(lambda: sink.upload(run_id, copy, "early.txt"))

        def swapped(*args: Any) -> None:
            copy.unlink()
            copy.symlink_to(secret)
            name(*args)

        copy.unlink()
        copy.write_text("content")
        monkeypatch.setattr(LocalArtifactRepository, "log_artifact", swapped)
        sink.upload(run_id, copy, "late.txt")
        stored = Path(sink.get_run(run_id).artifact_uri.removeprefix("file://"))
        assert {"late.txt": "content"} == {path.name: path.read_text() for path in stored.iterdir()}

    def test_mlflow_itself_still_asks_before_it_opens_a_file_store(self, sink: Sink, file_uri: str) -> None:
        """What is allowed to the sink is not allowed to the rest of the program."""
        from mlflow.exceptions import MlflowException
        from mlflow.store.tracking import file_store

        if hasattr(file_store, "MLFLOW_ALLOW_FILE_STORE"):
            with pytest.raises(MlflowException, match="maintenance mode"):
                file_store.FileStore(file_uri, file_uri)
        assert "MLFLOW_ALLOW_FILE_STORE" not in os.environ


def test_the_directory_of_a_database_is_created(tmp_path: Path, empty_database: Callable[[Path], Path]) -> None:
    """A relative database is where the program was when it was opened, and so are its artifacts."""
    template = empty_database(tmp_path / "template.db")
    (tmp_path / "new").mkdir()
    template.rename(tmp_path / "new" / "runs.db")
    with closing(open_sink("sqlite:///new/runs.db")) as sink:
        os.chdir("/")
        run = sink.get_run(new_run(sink, sink.experiment_id("e")))
    assert run.artifact_uri.startswith(str(tmp_path / "mlruns"))
    with closing(open_sink(f"sqlite:///{tmp_path}/new/runs.db", artifact_root=str(tmp_path / "art"))) as sink:
        run = sink.get_run(new_run(sink, sink.experiment_id("other")))
    assert run.artifact_uri.startswith(str(tmp_path / "art"))


@pytest.mark.parametrize("uri", ["uc://x", "ftp://x/y", "nonsense://", "http://"])
def test_a_uri_of_no_known_form_is_refused_at_once(uri: str) -> None:
    """It is a mistake in the settings, not a failure to wait out."""
    with pytest.raises(DestinationError):
        open_sink(uri)


@pytest.mark.parametrize("uri", ["databricks", "databricks://profile"])
def test_databricks_is_opened_without_being_called(uri: str) -> None:
    """Nothing is asked before there is something to deliver."""
    with closing(open_sink(uri)) as sink:
        assert sink.parallel
        assert sink.deduplicates_metrics


def test_a_database_that_cannot_be_reached_fails_at_once_without_its_password() -> None:
    """One attempt; a missing driver waits for a person, a missing server is retried."""
    begun = time.monotonic()
    error = fails(lambda: open_sink(f"postgresql://ada:{SECRET}@127.0.0.1:{unused_port()}/mlflow"))
    assert classify(error, "open").kind in {"retry", "parked"}
    assert SECRET not in str(error)
    assert time.monotonic() - begun < 15


# --- manners of a guest ---------------------------------------------------------------------------------------------


def test_the_package_is_imported_without_mlflow() -> None:
    """The import of MLflow waits for the first sink."""
    code = (
        "import sys, mlflow_outbox_worker.mlflow_sink, mlflow_outbox_worker.outcome, mlflow_outbox_worker.retry;"
        "assert not {'mlflow', 'requests', 'sqlalchemy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_host_is_left_as_it_was(tmp_path: Path) -> None:
    """No new variable, tracking URI, log line or handler, also while a database is created or cannot be opened."""
    code = f"""
import logging, os, sys
import mlflow
before = dict(os.environ)
from mlflow_outbox_worker.mlflow_sink import open_client, open_sink
from mlflow_outbox_worker.sink import SinkError
def loggers():
    names = [None, "mlflow"]
    return [(l.level, list(l.handlers), list(l.filters), l.propagate) for l in map(logging.getLogger, names)]
held, uri = loggers(), mlflow.get_tracking_uri()
sink = open_sink("sqlite:///{tmp_path}/deep/er/new.db")
sink.create_run(sink.experiment_id("e"), run_name=None, start_time_ms=1, user="", tags={{}})
open_sink("file:{tmp_path}/files").close()
open_client("sqlite:///{tmp_path}/deep/er/new.db").search_experiments()
try:
    open_sink("sqlite:////proc/no/such.db")
except SinkError:
    pass
sink.close()
assert dict(os.environ) == before
assert loggers() == held
assert mlflow.get_tracking_uri() == uri
"""
    command = [sys.executable, "-W", "ignore:Versions of mlflow", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "" == done.stderr
    assert (0, "") == (done.returncode, done.stdout)


def test_the_clients_of_all_stores_work(mlflow_server: MlflowServer, sqlite_uri: str, file_uri: str) -> None:
    """What the tracker hands out is MLflow's own client, ready for use."""
    from mlflow import MlflowClient

    for uri in (mlflow_server.url, sqlite_uri, file_uri):
        client = open_client(uri)
        assert isinstance(client, MlflowClient)
        with closing(open_sink(uri)) as sink:
            run_id = new_run(sink, sink.experiment_id("read by a client"))
        assert run_id == client.get_run(run_id).info.run_id
    assert logging.getLogger("mlflow").level <= logging.INFO


@pytest.mark.parametrize("place", ["https://bucket.example", "url: "])
def test_the_right_to_write_to_a_storage_is_not_told_with_its_address(place: str) -> None:
    """F93: what a storage refuses is said with the address that a server has signed for the upload."""
    from requests import HTTPError

    from mlflow_outbox_worker.mlflow_sink.boundary import translate

    said = f"403 Client Error: Forbidden for {place}/a/b.bin?X-Amz-Signature={SECRET}&sig={SECRET} (a quarter past?)"
    error = translate(HTTPError(said))
    assert f"{place}/a/b.bin?*** (a quarter past?)" in str(error)
    assert SECRET not in str(error)


@pytest.mark.parametrize(
    ("number", "outcome"), [(1366, "dead_letter"), (1267, "dead_letter"), (1213, "retry"), (2013, "retry")]
)
def test_a_text_that_mysql_never_takes_is_refused_for_good_whatever_its_driver_calls_it(
    number: int, outcome: str
) -> None:
    """The driver mysqlclient calls it operational, as a deadlock or a lost connection."""
    from sqlalchemy.exc import OperationalError

    from mlflow_outbox_worker.mlflow_sink.boundary import translate

    error = translate(OperationalError("INSERT INTO params", {}, Exception(number, "what it says")))
    assert outcome == classify(error, "log_batch").kind


def test_a_client_for_a_server_that_is_away_fails_soon() -> None:
    """MLflow's own first call would take minutes to say so."""
    begun = time.monotonic()
    with pytest.raises(TrackingUnavailable):
        open_client(f"http://ada:{SECRET}@127.0.0.1:{unused_port()}", timeout=1.0)
    assert time.monotonic() - begun < 10


def test_a_name_that_a_server_refuses_is_a_dead_letter(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """A server takes no '#' in a name; the answer is final, and no file is stored under half of the name."""
    (tmp_path / "copy").write_bytes(b"x")
    with closing(open_sink(mlflow_server.url)) as sink:
        run_id = new_run(sink, sink.experiment_id(experiment_name))
        error = fails(lambda: sink.upload(run_id, tmp_path / "copy", "a#b.txt"))
        assert "dead_letter" == classify(error, "upload").kind
        assert {} == sink.list_artifacts(run_id, "")


def test_a_database_that_is_reached_by_a_socket_is_so_too_by_what_an_outbox_remembers(tmp_path: Path) -> None:
    """That names no host, and whoever delivers later may have nothing else."""
    error = fails(lambda: open_sink(resolve(f"postgresql+psycopg2:///mlflow?host={tmp_path}").uri))
    assert "retry" == classify(error, "open").kind
    assert str(tmp_path) in str(error)


def test_a_signal_handler_that_builds_a_store_while_its_thread_does_is_told_so(
    file_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One store of a process is built at a time; it would wait for itself."""
    directory, heard = stores.Directory, list[str]()

    def interrupted(*given: Any) -> Any:
        try:
            open_sink(file_uri).close()
        except SinkError as error:
            heard.append(str(error))
        return directory(*given)

    monkeypatch.setattr(stores, "Directory", interrupted)
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        open_sink(file_uri).close()
        os._exit(7 if heard == ["the call that was interrupted is still opening its store"] else 1)
    assert 7 == os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
