"""PostgreSQL as the tracking store: of the tracker (the sink's contract), and behind an ``outbox+`` URI."""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import dataclasses
import os
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import sqlalchemy.exc

import plugin_scenarios
from contents import QUICK, numbered, points, runs, the_run
from mlflow_outbox import MLflowTracker
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox_worker.ledger import Ledger
from mlflow_outbox_worker.mlflow_sink import open_sink
from mlflow_outbox_worker.outcome import classify
from mlflow_outbox_worker.sink import Sink, SinkError
from plugin_world import deliver, differences, picture, store, tracking
from postgresql import PostgreSQL, running
from servers import eventually
from sink_contract import SinkContract
from workers import delivering

pytestmark = pytest.mark.postgresql

#: Linux's option for a program that is asked of each packet to a socket whether to take it, and one that takes none.
_ATTACH_FILTER: Final = 26
_TAKES_NONE: Final = struct.pack("HBBI", 6, 0, 0, 0)


@pytest.fixture(scope="session")
def postgresql(postgresql_template: Path) -> Iterator[PostgreSQL]:
    """A server for all tests; one that takes it down brings it back."""
    with running(postgresql_template) as server:
        yield server


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def network(port: int) -> Iterator[tuple[int, Callable[[], None]]]:
    """Yield another port of a server, and what drops the connections to it.

    Nothing of theirs is acknowledged from then on, by nobody, and nobody is told; later connections get through.
    """
    near: list[socket.socket] = []
    far: list[socket.socket] = []

    def take(listener: socket.socket) -> None:
        while True:
            try:
                one = listener.accept()[0]
            except OSError:
                return
            other = socket.create_connection(("127.0.0.1", port))
            near.append(one)
            far.append(other)
            for source, target in ((one, other), (other, one)):
                threading.Thread(target=_pass_on, args=(source, target), daemon=True).start()

    def drop() -> None:
        program = ctypes.create_string_buffer(_TAKES_NONE, len(_TAKES_NONE))
        for end in near:
            end.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, struct.pack("HP", 1, ctypes.addressof(program)))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=take, args=(listener,))
        thread.start()
        try:
            yield int(listener.getsockname()[1]), drop
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for end in (*near, *far):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()


def within(seconds: float, call: Callable[[], Any]) -> concurrent.futures.Future[Any]:
    """Return what became of a call that must not take longer than that, and may else never end."""
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001 - for the test
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    future.exception(seconds)
    return future


class TestPostgreSQL(SinkContract):
    """The contract, on a database server."""

    @pytest.fixture
    def sink(self, postgresql: PostgreSQL) -> Iterator[Sink]:
        """The sink under test."""
        sink = open_sink(postgresql.uri)
        yield sink
        sink.close()

    def test_requests_for_several_runs_may_be_under_way_at_once(self, sink: Sink) -> None:
        """A database server is there for many."""
        assert sink.parallel


def test_a_forked_child_has_a_connection_of_its_own(postgresql: PostgreSQL) -> None:
    """Two processes at one connection read each other's answers, or wait for ever for one that the other has read."""
    with contextlib.closing(open_sink(postgresql.uri)) as sink:
        engine = sink._store.engine  # type: ignore[attr-defined]  # the only Sink that there is

        def backend() -> int:
            with engine.connect() as connection:
                return int(connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one())

        mine = backend()
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            os._exit(7 if backend() != mine else 1)
        assert 7 == os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert mine == backend()


@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
def test_what_a_network_drops_without_a_word_is_waited_for_no_longer_than_a_request(
    driver: str, postgresql: PostgreSQL, experiment_name: str
) -> None:
    """TCP alone does so for a quarter of an hour if something was sent, and for two hours if not."""
    with network(postgresql.port) as (port, drop):
        uri = f"postgresql+{driver}://mlflow@127.0.0.1:{port}/postgres"
        with contextlib.closing(open_sink(uri, timeout=2)) as sink:
            engine = sink._store.engine  # type: ignore[attr-defined]  # the only Sink that there is
            number = sink.experiment_id(experiment_name)
            drop()
            assert number == within(60, lambda: sink.find_experiment(experiment_name)).result()
            at_work = threading.Event()

            def work() -> None:
                with engine.connect() as connection:
                    at_work.set()
                    connection.exec_driver_sql("SELECT pg_sleep(600)")

            def cut_off() -> None:
                assert at_work.wait(60)
                eventually(lambda: 1 == sleepers(postgresql), 60)
                drop()

            threading.Thread(target=cut_off, daemon=True).start()
            assert isinstance(within(60, work).exception(), sqlalchemy.exc.OperationalError)
            sleepers(postgresql, end=True)
            assert number == sink.find_experiment(experiment_name)


@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
def test_a_connection_to_what_only_reads_is_not_kept(driver: str, postgresql: PostgreSQL, experiment_name: str) -> None:
    """As after a failover, when the address leads to the other node again: the one that reads answers all the while."""
    uri = postgresql.uri.replace("postgresql:", f"postgresql+{driver}:")
    with contextlib.closing(open_sink(uri)):  # the default experiment is made
        pass
    with only_read(postgresql):
        sink = open_sink(uri)
        with pytest.raises(SinkError) as caught:
            sink.experiment_id(experiment_name)
        assert "retry" == classify(caught.value, "create_experiment").kind
    with contextlib.closing(sink):
        assert sink.experiment_id(experiment_name) == sink.find_experiment(experiment_name)


@contextlib.contextmanager
def only_read(postgresql: PostgreSQL) -> Iterator[None]:
    """Let connections that are made meanwhile only read, for as long as they last."""
    import psycopg2

    def tell(what: str) -> None:
        options = "-c default_transaction_read_only=off"
        with contextlib.closing(psycopg2.connect(postgresql.uri, options=options)) as connection:
            connection.autocommit = True
            connection.cursor().execute(f"ALTER DATABASE postgres {what}")

    tell("SET default_transaction_read_only = on")
    try:
        yield
    finally:
        tell("RESET default_transaction_read_only")


@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
def test_a_statement_that_takes_longer_than_a_request_may_is_waited_for(driver: str, postgresql: PostgreSQL) -> None:
    """The host of the database is there all the while."""
    uri = postgresql.uri.replace("postgresql:", f"postgresql+{driver}:")
    with contextlib.closing(open_sink(uri, timeout=1)) as sink:
        engine = sink._store.engine  # type: ignore[attr-defined]  # the only Sink that there is
        with engine.connect() as connection:
            assert 7 == connection.exec_driver_sql("SELECT 7 FROM pg_sleep(6)").scalar_one()


def sleepers(postgresql: PostgreSQL, *, end: bool = False) -> int:
    """Return how many connections sleep in a server, dropped ones too, of which it knows nothing; end them if asked."""
    import psycopg2

    query = "SELECT pid FROM pg_stat_activity WHERE state = 'active' AND query LIKE 'SELECT pg_sleep%'"
    with contextlib.closing(psycopg2.connect(postgresql.uri)) as connection, connection.cursor() as cursor:
        cursor.execute(query)
        found = [pid for (pid,) in cursor.fetchall()]
        for pid in found if end else ():
            cursor.execute("SELECT pg_terminate_backend(%s)", (pid,))
        return len(found)


@pytest.mark.parametrize("name", ["fluent", "datasets", "model", "traces"])
def test_unchanged_code_leaves_the_same_behind_with_an_outbox(
    name: str, postgresql: PostgreSQL, experiment_name: str, tmp_path: Path
) -> None:
    """Field by field, as without an outbox; a killed server breaks the connections that worker and plugin hold."""
    plain = f"{experiment_name}-plain"
    with tracking(postgresql.uri, tmp_path / "unused") as mlflow:
        plugin_scenarios.ALL[name](mlflow, plain, plugin_scenarios.nothing)
        mlflow.flush_async_logging()
        mlflow.flush_trace_async_logging()
    expected = picture(postgresql.uri, plain)
    uri = f"outbox+{postgresql.uri}"
    for mode in ("up", "away from the start", "killed in the middle"):
        through = f"{experiment_name}-{mode}"
        with tracking(uri, tmp_path / mode, create_timeout=1) as mlflow:
            if mode == "away from the start":
                postgresql.kill()
            halfway = postgresql.kill if "killed" in mode else plugin_scenarios.nothing
            plugin_scenarios.ALL[name](mlflow, through, halfway)
            mlflow.flush_trace_async_logging()
            if mode != "up":
                postgresql.start()
            deliver(uri)
            server = store(uri).server
            eventually(lambda server=server: not server.is_away(), 60, "the pause after the outage is over")
        assert [] == differences(expected, picture(postgresql.uri, through)), mode


def test_batches_of_one_run_that_go_side_by_side_do_not_meet_in_the_database(
    postgresql: PostgreSQL, experiment_name: str, tmp_path: Path
) -> None:
    """None has to be sent again, and the latest value of each metric is the latest."""
    settings = dataclasses.replace(QUICK, batch_points=30)
    tracker = MLflowTracker(experiment_name, postgresql.uri, outbox_dir=tmp_path, worker="none", settings=settings)
    with tracker.start_run() as run:
        for step in range(1000):
            run.log_metrics({"loss": step / 2, "accuracy": -step, "rate": 1.0}, step=step)
    tracker.close(0)
    assert tracker.outbox_path is not None
    with delivering(OutboxDirectory.open(tracker.outbox_path), postgresql.uri, settings) as counters:
        eventually(lambda: 1002 == counters["delivered"], 60)
    assert 0 == counters["retried"]
    held = the_run(postgresql.uri, experiment_name)
    assert {"loss": 499.5, "accuracy": -999.0, "rate": 1.0} == held.data.metrics
    for key in held.data.metrics:
        assert 1000 == len(points(postgresql.uri, held.info.run_id, key))
    assert numbered(1000) == points(postgresql.uri, held.info.run_id, "loss")


def test_an_experiment_whose_name_is_too_long_for_a_column_is_named_with_the_remedy(
    postgresql: PostgreSQL, experiment_name: str, tmp_path: Path
) -> None:
    """MLflow takes 500 characters, the database 256: its words alone do not say of what."""
    tracker = MLflowTracker(f"{experiment_name} {'long ' * 60}", postgresql.uri, outbox_dir=tmp_path, settings=QUICK)
    tracker.start_run().end()
    assert 2 == tracker.close(60).parked
    assert tracker.outbox_path is not None
    with contextlib.closing(Ledger.open(tracker.outbox_path / "delivery", read_only=True)) as ledger:
        (record,) = ledger.records()
    assert f"the experiment '{experiment_name} long" in record.reason
    assert "mlflow-outbox replay DIR --experiment NAME" in record.reason


def test_a_name_that_is_too_long_for_a_column_costs_the_run_no_more_than_its_end(
    postgresql: PostgreSQL, experiment_name: str, tmp_path: Path
) -> None:
    """Nor does a NUL, which no column takes: the whole name and the tag are dead letters, all else arrives."""
    tracker = MLflowTracker(experiment_name, postgresql.uri, outbox_dir=tmp_path, settings=QUICK)
    for name, kept in (("long " * 60, ("long " * 60)[:250]), ("with\0nul", "withnul")):
        with tracker.start_run(name, tags={"odd": "a\0b", "good": "c", "mlflow.runName": "another"}) as run:
            run.log_metric("loss", 0.5, 1)
        result = tracker.flush(60)
        assert (0, 0) == (result.pending, result.parked)
        (held,) = (run for run in runs(postgresql.uri, experiment_name) if run.info.run_name == kept)
        assert ("c", {"loss": 0.5}, "FINISHED") == (held.data.tags["good"], held.data.metrics, held.info.status)
        assert "odd" not in held.data.tags
    assert 4 == tracker.counters["dead_letters"]
    tracker.close()
