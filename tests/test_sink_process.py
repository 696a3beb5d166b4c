"""The worker thread's MLflow lives in a child process: it keeps every promise of a sink, and dies with its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest

from contents import numbered, points, the_run
from mlflow_outbox.counters import Counters
from mlflow_outbox.errors import DestinationError
from mlflow_outbox.testing.faults import accept_hang
from mlflow_outbox.testing.proxy import FaultProxy
from mlflow_outbox_worker.sink import Sink, SinkError
from mlflow_outbox_worker.sink_process.client import Child, NoChild, ProcessSink, SinkProcesses
from mlflow_outbox_worker.sink_process.messages import OPEN, Opening, encode
from servers import MlflowServer, eventually
from sink_contract import SinkContract, fails, new_run

_SERVER = [sys.executable, "-m", "mlflow_outbox_worker.sink_process"]


def is_running(pid: int) -> bool:
    """Return whether a process is there and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.fixture(scope="module")
def proxy(mlflow_server: MlflowServer) -> Iterator[FaultProxy]:
    """What stands between the child and the server."""
    with FaultProxy(mlflow_server.url) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def counters() -> Counters:
    """What is counted while the child is used."""
    return Counters()


@pytest.fixture(scope="module")
def child_sink(proxy: FaultProxy, counters: Counters) -> Iterator[ProcessSink]:
    """One sink in a child for all tests, because each child imports mlflow."""
    sink = ProcessSink(lambda: Child(_SERVER), Opening(proxy.url, None, 30.0, []), counters)
    yield sink
    sink.close()


class TestChildProcess(SinkContract):
    """The contract, through a child process."""

    @pytest.fixture
    def sink(self, child_sink: ProcessSink) -> Sink:
        """The sink under test."""
        return cast("Sink", child_sink)

    def test_a_file_whose_name_is_no_text_arrives(self, sink: Sink, experiment_name: str, tmp_path: Path) -> None:
        """File names are bytes; they travel as bytes."""
        run_id = new_run(sink, sink.experiment_id(experiment_name))
        odd = tmp_path / os.fsdecode(b"odd \xff name")
        odd.write_bytes(b"content")
        sink.upload(run_id, odd, "odd.bin")
        assert {"odd.bin": 7} == sink.list_artifacts(run_id, "")

    def test_a_new_token_in_the_environment_is_used(
        self, sink: Sink, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A long session renews its token in its own environment; the child must not go on with the old one."""
        before = len(proxy.requests)
        for token in ("first", "second"):
            monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", token)
            sink.find_experiment("none of this name")
        monkeypatch.delenv("MLFLOW_TRACKING_TOKEN")
        sink.find_experiment("none of this name")
        sent = [dict(request.headers).get("Authorization") for request in proxy.requests[before:]]
        assert ["Bearer first", "Bearer second", None] == sent

    def test_a_killed_child_is_replaced_and_its_request_has_an_unknown_fate(
        self, sink: Sink, child_sink: ProcessSink, proxy: FaultProxy, counters: Counters, experiment_name: str
    ) -> None:
        """As if the connection had broken after sending; the next request starts another child, which is counted."""
        experiment_id = sink.experiment_id(experiment_name)
        before, first = len(proxy.requests), child_sink.pid
        proxy.on("runs/create", accept_hang())
        errors: list[SinkError] = []
        lost = threading.Thread(target=lambda: errors.append(fails(lambda: new_run(sink, experiment_id))))
        lost.start()
        eventually(lambda: any("runs/create" in request.path for request in proxy.requests[before:]))
        os.kill(first, signal.SIGKILL)
        lost.join(10)
        assert [("connection", True)] == [(error.kind, error.sent) for error in errors]
        assert experiment_id == sink.experiment_id(experiment_name)
        assert first != child_sink.pid
        assert 1 == counters["sink_processes_lost"]


def test_a_store_that_cannot_be_opened_says_so_as_in_this_process(tmp_path: Path) -> None:
    """A URI of no known form is a mistake of the caller's, a broken database one of the store's."""
    (tmp_path / "broken.db").write_bytes(b"this is no database" * 100)
    child = Child(_SERVER)
    path = [os.fsencode(entry) for entry in sys.path]
    with pytest.raises(DestinationError, match="gopher"):
        child.ask(OPEN, encode(Opening("gopher://host", None, 1.0, path)))
    with pytest.raises(SinkError) as caught:
        child.ask(OPEN, encode(Opening(f"sqlite:///{tmp_path}/broken.db", None, 1.0, path)))
    assert "answer" == caught.value.kind
    child.end()
    assert not is_running(child.pid)


@pytest.mark.parametrize(
    "program", [["/no/such/python"], ["/bin/cat", "/dev/null"], [sys.executable, "-c", "print('something else')"]]
)
def test_what_is_not_the_server_is_no_child(program: list[str]) -> None:
    """A program that cannot be started, or does not answer as it should, is told from one that does."""
    with pytest.raises(NoChild):
        Child(program)


def test_where_no_child_can_be_started_mlflow_is_imported_here(sqlite_uri: str, experiment_name: str) -> None:
    """Delivery goes on in the old way; it is counted, and said once."""
    counters = Counters()
    sink = SinkProcesses(counters, ["/no/such/python"], is_imported=lambda: False)(sqlite_uri)
    assert sink.experiment_id(experiment_name)
    assert 1 == counters["sink_processes_not_started"]
    sink.close()


_SESSION = """
import glob, os, signal, sys
from mlflow_outbox import MLflowTracker, Settings

def children():
    return [int(pid) for file in glob.glob("/proc/self/task/*/children") for pid in open(file).read().split()]

quick = Settings(batch_points=50, poll_interval=0.02, retry_initial=0.02, retry_max=0.2)
tracker = MLflowTracker(sys.argv[1], sys.argv[2], outbox_dir=sys.argv[3], settings=quick)
run = tracker.start_run("held elsewhere")
"""


def session(body: str, *arguments: str) -> subprocess.Popen[bytes]:
    """Start a program that logs through a worker thread and has not imported mlflow."""
    command = [sys.executable, "-W", "ignore:.*fork:DeprecationWarning", "-c", _SESSION + textwrap.dedent(body)]
    return subprocess.Popen(
        [*command, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_delivery_by_a_thread_imports_nothing_of_mlflow_and_survives_the_death_of_its_child(
    file_uri: str, experiment_name: str, tmp_path: Path
) -> None:
    """Killed in the middle of batches, into a store that keeps points twice: each point is there once."""
    child = session(
        """
        killed = []
        for i in range(3000):
            run.log_metric("loss", i / 2, step=i)
        while not killed:
            if tracker.flush(0.05):
                break
            delivered = tracker.flush(0).delivered
            if delivered > 500:
                killed += children()
                for pid in children():
                    os.kill(pid, signal.SIGKILL)
        run.end()
        result = tracker.flush(60)
        print(bool(result), len(killed) > 0, sorted({"mlflow", "sqlalchemy", "requests", "numpy"} & set(sys.modules)))
        """,
        experiment_name,
        file_uri,
        str(tmp_path / "outbox"),
    )
    said, complained = child.communicate(timeout=100)
    assert "True True []" == said.decode().strip(), complained.decode()
    assert numbered(3000) == points(file_uri, the_run(file_uri, experiment_name).info.run_id, "loss")


@pytest.mark.parametrize("forked", [False, True], ids=["alone", "with a forked child that lives on"])
def test_the_child_ends_with_the_experiment_whatever_ends_it(
    forked: bool, own_mlflow_server: Callable[..., MlflowServer], experiment_name: str, tmp_path: Path
) -> None:
    """SIGKILL of the experiment leaves nobody behind who goes on delivering, forked children or not."""
    server = own_mlflow_server(start=False)
    child = session(
        """
        run.log_metric("loss", 1.0)
        never = __import__("threading").Event()
        while not children():
            never.wait(0.01)
        print(*children(), flush=True)
        if sys.argv[4] == "True" and os.fork() == 0:
            sys.stdin.read()
            os._exit(0)
        print("ready", flush=True)
        never.wait()
        """,
        experiment_name,
        server.url,
        str(tmp_path / "outbox"),
        str(forked),
    )
    assert child.stdout is not None
    pid = int(child.stdout.readline())
    assert b"ready\n" == child.stdout.readline()
    assert is_running(pid)
    child.kill()
    eventually(lambda: not is_running(pid), message="the process that holds MLflow ends")
    child.communicate(timeout=10)  # its standard input ends, and with it the forked child
