"""Tiers, seeds and the table of what was injected, for the tests of this folder.

* ``--tier commit`` (the default, in every run of the test suite), ``nightly`` and ``release`` run the same tests with
  more repetitions; ``scripts/faults --tier nightly`` is the way to start the longer ones.
* Every test that draws random numbers gets its ``rng`` from one seed, which is printed. The seed of a failure is added
  to ``tests/faults/seeds/<test>.txt`` with the tier, whose count it takes to meet it, and the test's parameters; every
  later run of that test in that tier or a larger one repeats it.
* A test marked ``fault("F01", "what is injected")`` is a row of the table at the end. A test marked
  ``needs("strace")`` is not collected where that is missing: the table then says "not run", and what would be needed.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from faults import abilities, leaks, manners
from faults.children import Nest
from faults.table import TIERS, Row, Table
from mlflow_outbox.testing.proxy import FaultProxy
from servers import MlflowServer

if TYPE_CHECKING:
    from faults.network import Connects, Session

SEEDS = Path(__file__).with_name("seeds")
#: Parts of a test that injects hundreds of times, for several processes, in the longer tiers.
PARTS = 6
#: Tests that need minutes in the longer tiers, the longest first: each process begins with some of them.
LONGEST = (
    "test_a_flapping_server_gets_everything_without_a_storm",
    "test_many_processes_share_one_outbox",
    "test_no_damage_of_the_ledger_loses_or_doubles_anything_in_mlflow",
    "test_a_power_cut_takes_no_more_than_the_ladder_says",
    "test_everything_at_once_loses_and_doubles_nothing",
    "test_a_worker_that_stands_still_keeps_its_lease_and_harms_nothing",
    "test_a_kill_during_the_recovery_from_a_kill_is_harmless",
    "test_a_killed_lease_holder_is_replaced_within_two_seconds",
    "test_of_many_workers_one_delivers",
    "test_kills_of_a_program_and_of_its_delivering_process_lose_and_double_nothing",
    "test_a_power_cut_at_any_boundary_loses_and_doubles_nothing",
    "test_a_fork_in_any_state_loses_and_doubles_nothing",
    "test_a_kill_at_any_system_call_loses_and_doubles_nothing",
    "test_statuses_that_pass_are_retried_and_never_dead_lettered",
    "test_every_form_of_retry_after_is_honoured_up_to_the_cap",
    "test_every_way_to_end_keeps_every_event",
    "test_only_the_kernel_s_lock_decides_who_delivers",
    "test_a_ledger_that_cannot_be_written_is_written_later",
    "test_an_input_output_error_at_any_call_of_a_worker_holds_up_nothing_for_long",
    "test_a_write_that_is_short_at_any_byte_leaves_no_torn_frame",
    "test_a_logging_call_waits_for_nobody",
    "test_a_second_recovery_changes_no_byte",
    "test_the_processes_of_a_data_loader_log_to_the_run",
    "test_the_end_of_the_interpreter_keeps_every_event",
    "test_no_thread_left_loses_nothing",
    "test_a_long_outage_takes_no_more_of_the_machine_than_a_short_one",
    "test_an_outage_of_hours_is_over_as_soon_as_the_server_is_back",
    "test_a_wiped_server_never_makes_a_run_vanish_in_silence",
    "test_kills_at_random_times_lose_and_double_nothing",
    "test_no_descriptor_left_loses_nothing",
    "test_a_batch_whose_recording_fails_is_there_once",
    "test_a_locked_ledger_stops_delivery_and_nothing_else",
    "test_what_a_call_accepts_arrives_as_it_was_and_all_else_is_a_counted_refusal",
    "test_a_tail_that_the_file_system_left_is_never_an_event",
    "test_a_flipped_bit_anywhere_in_the_log_gives_a_state_of_the_past",
    "test_a_full_disk_never_loses_what_a_call_said_it_kept",
    "test_a_power_cut_leaves_no_event_without_its_copied_file",
    "test_a_slow_disk_is_never_waited_for",
    "test_a_reset_at_any_byte_doubles_and_loses_nothing",
    "test_a_server_killed_in_the_middle_holds_everything_once",
    "test_an_input_output_error_at_any_call_loses_nothing_that_was_kept",
    "test_writes_that_reached_the_disk_in_any_order_are_never_taken_for_others",
    "test_an_answer_that_is_none_is_never_taken_for_success",
    "test_one_refused_event_of_a_batch_is_the_only_dead_letter",
)
_TABLE = pytest.StashKey[Table]()
_SEED = pytest.StashKey[str]()
_FAILED = pytest.StashKey[bool]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Offer the tier, the seed and the file for the table."""
    group = parser.getgroup("faults", "fault injection")
    group.addoption("--tier", choices=["commit", "nightly", "release"], default="commit", help="how often to inject")
    group.addoption("--fault-seed", default="", help="repeat the random numbers of an earlier run")
    group.addoption("--fault-scale", type=float, default=1.0, help="factor on the tier's counts")
    group.addoption("--fault-table", default="", help="file to which the table of rows is written, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    """Register the marks, and one seed for all processes of the session."""
    config.addinivalue_line("markers", "fault(row, injected): a row of the fault table")
    config.addinivalue_line("markers", "alone: measures the clock: runs in the longer tiers only, when no other does")
    config.addinivalue_line("markers", "needs(ability): not collected where the machine cannot inject this fault")
    given = config.getoption("--fault-seed", "")
    worker = getattr(config, "workerinput", {})
    config.stash[_SEED] = given or worker.get("fault_seed") or secrets.token_hex(4)
    table = config.stash[_TABLE] = Table(config.getoption("--tier", "commit"), config.stash[_SEED])
    if not worker:
        config.pluginmanager.register(_Reporter(config, table), "fault-table")


def pytest_report_header(config: pytest.Config) -> str:
    """Say the seed before anything is injected: a run that is broken off can be repeated too."""
    seed = config.stash[_SEED]
    return f"faults: tier {config.getoption('--tier')}, seed {seed} (repeat with --fault-seed {seed})"


def _kept_seeds(config: pytest.Config, name: str) -> list[tuple[str, str]]:
    """Return the seeds with which a test has failed in this tier or a smaller one, each with its other parameters."""
    path = SEEDS / f"{name}.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    enough = TIERS[: TIERS.index(config.getoption("--tier")) + 1]
    found = [line.split(" ", 2) for line in lines]
    return [(seed, "".join(rest)) for tier, seed, *rest in found if tier in enough]


def _parameters(item: pytest.Item) -> str:
    """Return the parameters of a test but its seed, for instance "file"."""
    names = getattr(item, "callspec", None)
    return "-".join(part for part in names._idlist if not part.startswith(("new", "kept-"))) if names else ""


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Give each pytest-xdist worker the session's seed."""
    if _SEED in node.config.stash:
        node.workerinput["fault_seed"] = node.config.stash[_SEED]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a random test with this session's seed, and with each seed that has failed before."""
    if "part" in metafunc.fixturenames:
        parts = 1 if metafunc.config.getoption("--tier") == "commit" else PARTS
        metafunc.parametrize("part", [slice(n, None, parts) for n in range(parts)], ids=map(str, range(parts)))
    if "rng" in metafunc.fixturenames:
        seeds = list(dict.fromkeys(seed for seed, _ in _kept_seeds(metafunc.config, metafunc.function.__name__)))
        metafunc.parametrize("fault_seed", [None, *seeds], ids=["new", *(f"kept-{seed}" for seed in seeds)])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what this machine cannot inject, and note it in the table."""
    kept, out = [], []
    for item in items:
        seed = getattr(item, "callspec", None) and item.callspec.params.get("fault_seed")  # type: ignore[attr-defined]  # a function's item
        if seed and (seed, _parameters(item)) not in _kept_seeds(config, item.function.__name__):  # type: ignore[attr-defined]  # a function's item
            continue  # this seed has failed with other parameters
        missing = [why for mark in item.iter_markers("needs") for name in mark.args if (why := abilities.missing(name))]
        if missing:
            out.append(item)
            for mark in item.iter_markers("fault"):
                config.stash[_TABLE].not_run(mark.args[0], mark.args[1], missing[0])
        else:
            kept.append(item)
    if config.getoption("--tier") == "commit":
        out += [item for item in kept if item.get_closest_marker("alone")]
        items[:] = [item for item in kept if not item.get_closest_marker("alone")]
    else:
        items[:] = _longest_first(kept)
    if out:
        config.hook.pytest_deselected(items=out)


def _longest_first(items: list[pytest.Item]) -> list[pytest.Item]:
    """Return tests so that each process of pytest-xdist, which gets a part of the list, begins with long ones."""
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    order = sorted(items, key=lambda item: ranks.get(item.name.partition("[")[0], len(ranks)))
    last = [item for item in order if item.get_closest_marker("alone")]
    order = [item for item in order if item not in last]
    count = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    return [item for first in range(count) for item in order[first::count]] + last


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tell the session's first process what this one left out."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["faults_not_run"] = session.config.stash[_TABLE].missing()


class _Reporter:
    """Collects the rows of all processes of a session and prints them at its end."""

    def __init__(self, config: pytest.Config, table: Table) -> None:
        self._config = config
        self._table = table
        self._failed: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take a test's row, which is complete when its fixtures are gone."""
        if report.failed:
            self._failed.add(report.nodeid)
        if report.when == "teardown":
            for name, value in report.user_properties:
                if name == "fault":
                    self._table.add(json.loads(value), failed=report.nodeid in self._failed)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        """Take what a pytest-xdist worker left out."""
        for row, injected, why in getattr(node, "workeroutput", {}).get("faults_not_run", []):
            self._table.not_run(row, injected, why)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Print the table."""
        if self._table:
            terminalreporter.section("faults")
            terminalreporter.write_line(self._table.text())
            path = self._config.getoption("--fault-table", "")
            if path:
                Path(path).write_text(self._table.json(), encoding="utf-8")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Judge the logging calls that a test and its children have made (I5), as a part of the test."""
    given: dict[str, Any] = getattr(item, "funcargs", {})
    item.stash[_FAILED] = True
    manners.own()
    try:
        yield
    finally:
        counted = manners.own()
        if "nest" in given:
            counted = counted.with_(given["nest"].taken())
    if "row" in given:
        given["row"].manners(counted)
    item.stash[_FAILED] = False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Keep the seed of a failure."""
    report = yield
    if call.when == "call" and call.excinfo is not None and "rng" in getattr(item, "fixturenames", ()):
        seed = item.funcargs.get("fault_seed") or item.config.stash[_SEED]  # type: ignore[attr-defined]  # a function's item
        path = SEEDS / f"{item.function.__name__}.txt"  # type: ignore[attr-defined]  # a function's item
        path.parent.mkdir(exist_ok=True)
        line = f"{item.config.getoption('--tier')} {seed} {_parameters(item)}".strip()
        known = path.read_text() if path.exists() else ""
        if line not in known.splitlines():
            path.write_text(f"{known}{line}\n")
    return report  # type: ignore[return-value]  # the hook's way


@pytest.fixture(autouse=True)
def _nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Check that no test leaves a descriptor, a thread, a process or a temporary directory behind (I8)."""
    with leaks.nothing_left(unless=lambda: request.node.stash.get(_FAILED, False)):
        yield


@pytest.fixture(autouse=True)
def _turn(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let a test that is marked "alone" wait until no other one of the session runs, and keep the others waiting."""
    if request.config.getoption("--tier") == "commit":
        yield
        return
    base = tmp_path_factory.getbasetemp()  # each process of pytest-xdist has one of its own in a common one
    path = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "turn"
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX if request.node.get_closest_marker("alone") else fcntl.LOCK_SH)
        yield


@pytest.fixture
def fault_seed() -> None:
    """Stand for the session's seed, unless a kept one is given."""
    return


@pytest.fixture
def rng(request: pytest.FixtureRequest, fault_seed: str | None) -> random.Random:
    """Random numbers from the printed seed, different for each test and each of its parts."""
    seed = fault_seed or request.config.stash[_SEED]
    print(f"seed: --fault-seed {seed}")  # noqa: T201 - pytest shows it with a failure
    part = request.getfixturevalue("part").start if "part" in request.fixturenames else 0
    return random.Random(f"{seed}/{request.function.__name__}" + (f"/{part}" if part else ""))


@pytest.fixture
def row(request: pytest.FixtureRequest) -> Iterator[Row]:
    """The row of the table that a test fills, and the tier that says how often it injects its fault."""
    rows = [mark.args for mark in request.node.iter_markers("fault")]
    found = Row(
        "+".join(sorted({r[0] for r in rows})),
        rows[0][1],
        request.node.name,
        request.config.stash[_TABLE].tier,
        request.config.getoption("--fault-scale", 1.0),
    )
    started = time.monotonic()
    yield found
    found.seconds = time.monotonic() - started
    request.node.user_properties.append(("fault", found.json()))


@pytest.fixture(scope="session")
def nest() -> Iterator[Nest]:
    """Starts child processes that have everything imported already, in hundredths of a second."""
    with Nest() as made:
        yield made


@pytest.fixture
def proxy(mlflow_server: MlflowServer) -> Iterator[FaultProxy]:
    """A proxy in front of the shared server."""
    with FaultProxy(mlflow_server.url) as made:
        yield made


@pytest.fixture
def session(mlflow_server: MlflowServer, proxy: FaultProxy, experiment_name: str, tmp_path: Path) -> Iterator[Session]:
    """A session through the proxy; its worker is stopped at the end, whatever happens."""
    from faults.network import Session  # imports all that delivery needs

    made = Session(mlflow_server, proxy.url, experiment_name, tmp_path / "outbox", asked=lambda: proxy.requests)
    yield made
    proxy.clear()
    proxy.up()
    made.tracker.close(5)


@pytest.fixture
def connects(monkeypatch: pytest.MonkeyPatch) -> Connects:
    """Who of this process tried to connect to what, from now on."""
    from faults.network import Connects

    return Connects(monkeypatch)
