"""Fixtures for all tests: a clean environment, and real MLflow servers and stores."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import sys
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

import postgresql
from mlflow_outbox import stopwatch
from mlflow_outbox.spool.directory import OutboxDirectory
from mlflow_outbox.testing import FailingDisk
from servers import MlflowServer, NurseryClient, forget_mlflow_variables

if TYPE_CHECKING:
    from mlflow_outbox_worker.ledger import Ledger
    from spools import Kit

_NURSERY = pytest.StashKey[NurseryClient]()
_NOT_RUN = pytest.StashKey[str]()
_SERVER_FIXTURES = {"mlflow_server", "own_mlflow_server", "sqlite_uri", "empty_database"}

# Helpers that assert on behalf of tests show their values as tests do.
pytest.register_assert_rewrite("contents", "ledgers", "sink_contract")

# Tests change directory; what their child processes import must not depend on it.
if "PYTHONPATH" in os.environ:
    os.environ["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, os.environ["PYTHONPATH"].split(os.pathsep)))
forget_mlflow_variables()

# An example takes as long as other processes leave it the processors; one that hangs is ended with its test.
hypothesis.settings.register_profile("busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("busy")


def pytest_configure(config: pytest.Config) -> None:
    """Start the session's nursery, in the one process that outlives all others."""
    workerinput = getattr(config, "workerinput", None)
    if workerinput is None:
        client, end = NurseryClient.start()
        config.add_cleanup(end)
    else:
        client = NurseryClient(workerinput["nursery"])
    config.stash[_NURSERY] = client


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell each pytest-xdist worker where the nursery is."""
    node.workerinput["nursery"] = node.config.stash[_NURSERY].address


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the import of MLflow while the tests that need no server run, and leave what is there now to itself.

    What was imported stays to the end; to go through it again and again, as the tests do who look for what they have
    left behind, took a tenth of their time.
    """
    gc.collect()
    gc.freeze()
    if not session.config.option.collectonly and any(
        _SERVER_FIXTURES.intersection(getattr(item, "fixturenames", ())) for item in session.items
    ):
        session.config.stash[_NURSERY].warm()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs a program that is not installed, or rights that are not given."""
    lacking = {item: found for item in items if (found := _lacking(item))}
    if lacking:
        items[:] = [item for item in items if item not in lacking]
        counts = Counter(lacking.values())
        config.stash[_NOT_RUN] = "; ".join(f"{count} tests that need {what}" for what, count in counts.items())
        config.hook.pytest_deselected(items=list(lacking))


def _lacking(item: pytest.Item) -> str:
    """Return what a test needs and does not find, or ""."""
    if item.get_closest_marker("root") and os.geteuid() != 0:
        return "the rights of root"
    if item.get_closest_marker("postgresql") and postgresql.missing():
        return postgresql.missing()
    needed = [mark.args[0] for mark in item.iter_markers("program")]
    return next((f"the program {name}" for name in needed if shutil.which(name) is None), "")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tell the session's first process what this one left out."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["not_run"] = session.config.stash.get(_NOT_RUN, "")


def pytest_unconfigure() -> None:
    """Let this process end without a delivery of what its tests have left: each of their outboxes would be looked at.

    There are up to a thousand, many with a server that is gone: pytest-xdist waits ten seconds for that, and kills.
    """
    for name in ("mlflow_outbox.outboxes", "mlflow_outbox.plugin.entry"):
        if name in sys.modules:
            atexit.unregister(sys.modules[name]._at_exit)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take what a pytest-xdist worker left out."""
    left_out = getattr(node, "workeroutput", {}).get("not_run", "")
    if left_out:
        node.config.stash[_NOT_RUN] = left_out


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say what was not run."""
    if _NOT_RUN in config.stash:
        terminalreporter.write_line(f"not run: {config.stash[_NOT_RUN]}")


@pytest.fixture(autouse=True)
def _clean_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give each test a working directory of its own and no MLFLOW_* variable, and leave none behind."""
    monkeypatch.chdir(tmp_path)
    yield
    forget_mlflow_variables()


@pytest.fixture(scope="session")
def mlflow_server(request: pytest.FixtureRequest) -> MlflowServer:
    """The MLflow server that all tests share; use experiments of your own, and neither stop nor pause it."""
    return request.config.stash[_NURSERY].shared_server()


@pytest.fixture
def own_mlflow_server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., MlflowServer]]:
    """Start a server that a test may kill or pause: ``own_mlflow_server(port=0, start=True, users=False)``."""
    servers: list[MlflowServer] = []

    def make(port: int = 0, *, start: bool = True, users: bool = False) -> MlflowServer:
        directory = tmp_path_factory.mktemp("mlflow-server")
        server = MlflowServer(request.config.stash[_NURSERY], directory, port, users=users)
        servers.append(server)
        if start:
            server.start()
        return server

    yield make
    for server in servers:
        server.kill()


@pytest.fixture
def empty_database(request: pytest.FixtureRequest) -> Callable[[Path], Path]:
    """Create an SQLite database with MLflow's tables at a path of the test's choice."""
    return request.config.stash[_NURSERY].empty_database


@pytest.fixture(scope="session")
def postgresql_template(request: pytest.FixtureRequest) -> Path:
    """The directory of a PostgreSQL that was stopped, with MLflow's tables and nothing in them."""
    return request.config.stash[_NURSERY].postgresql()


@pytest.fixture
def sqlite_uri(empty_database: Callable[[Path], Path], tmp_path: Path) -> str:
    """The tracking URI of an SQLite database with MLflow's tables and nothing in them."""
    return f"sqlite:///{empty_database(tmp_path / 'mlflow.db')}"


@pytest.fixture
def file_uri(tmp_path: Path) -> str:
    """The tracking URI of an empty MLflow file store."""
    return (tmp_path / "mlruns").as_uri()


@pytest.fixture
def experiment_name() -> str:
    """The name of an experiment that no other test uses."""
    return f"experiment-{uuid.uuid4().hex}"


# -- journals


@pytest.fixture
def outbox(tmp_path: Path) -> OutboxDirectory:
    """An outbox of its own."""
    from spools import make_outbox

    return make_outbox(tmp_path / "outbox")


@pytest.fixture
def disk() -> FailingDisk:
    """A disk that counts, and fails when told."""
    return FailingDisk()


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let time pass for journals: ``later(seconds)``."""
    clock = [1000.0]
    monkeypatch.setattr(stopwatch, "seconds", lambda: clock[0])

    def pass_(seconds: float) -> None:
        clock[0] += seconds

    return pass_


@pytest.fixture
def kit(tmp_path: Path) -> Kit:
    """Outside of the current directory, so that this stays empty."""
    from spools import Kit

    (tmp_path / "work").mkdir()
    os.chdir(tmp_path / "work")
    return Kit(tmp_path / "outbox")


@pytest.fixture
def strict(tmp_path: Path) -> Kit:
    """A run that raises."""
    from spools import Kit

    return Kit(tmp_path / "outbox", strict=True)


# -- ledgers


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Where the ledger is; not made yet."""
    return tmp_path / "delivery"


@pytest.fixture
def ledger(directory: Path) -> Iterator[Ledger]:
    """A new ledger that must report nothing."""
    from mlflow_outbox_worker.ledger import Ledger

    opened = Ledger.open(directory, timeout=5, report=pytest.fail)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ledger of twenty runs that was closed: one file, no log."""
    from ledgers import letter, record, view
    from mlflow_outbox_worker.ledger import Ledger

    directory = tmp_path_factory.mktemp("clean") / "delivery"
    ledger = Ledger.open(directory)
    for index in range(20):
        ledger.commit(record(f"{index:02d}", index, f"r{index}"), view=view(), dead=[letter(f"{index:02d}")])
    ledger.close()
    return directory


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ledger whose writer died after commits 1 to 10 were checkpointed and 11 to 30 were not."""
    from ledgers import run

    directory = tmp_path_factory.mktemp("crashed") / "delivery"
    run(
        """
ledger = Ledger.open(directory)
for seq in range(1, 31):
    refused = DeadLetter("a", "", b"", str(seq), "", 400, 0)
    ledger.commit(RunRecord("a", cursors={"w": Cursor(0, 100 * seq, seq)}), dead=[refused])
    if seq == 10:
        ledger.checkpoint()
os._exit(0)
""",
        directory,
    )
    return directory
