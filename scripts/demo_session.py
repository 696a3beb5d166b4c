"""A whole autopilot session, logged through the outbox: real data, real models, one real failure.

    scripts/demo             into an embedded store in ./demo-output/
    scripts/demo --outage    into a real MLflow server that is killed halfway and comes back at the end

The second one ends with a check, against the server, that everything arrived once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime as dt
import logging
import os
import secrets
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import demo_science as science
from demo_server import Expected, TrackingServer, check, expected_experiment, expected_profile, listing
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlflow_outbox import FlushResult, MLflowTracker, create_tracker

EPOCHS = 200
CURVE_RUN = "sgd_training_curve"
#: Seconds to wait for the first delivery before the server is killed all the same; importing MLflow takes a few.
PART_TIMEOUT = 30.0
#: Seconds that the last flush may take; it takes a few.
FLUSH_TIMEOUT = 120.0

console = Console(highlight=False)


class Stopwatch:
    """Makes logging calls and keeps how long each took."""

    def __init__(self) -> None:
        self.phase = "server there"
        self.seconds: dict[tuple[str, str], list[float]] = {}
        self._last = 0.0

    def __call__(self, method: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Call a method of the tracker or of a run."""
        started = time.perf_counter()
        try:
            return method(*args, **options)
        finally:
            self._last = time.perf_counter() - started
            self.seconds.setdefault((method.__name__, self.phase), []).append(self._last)

    @property
    def last(self) -> str:
        """How long the last call took."""
        return _milliseconds(self._last)

    def slowest(self, phase: str) -> tuple[str, float]:
        """Return the name and the seconds of a phase's slowest call."""
        return max(
            ((name, max(taken)) for (name, of), taken in self.seconds.items() if of == phase), key=lambda pair: pair[1]
        )

    def table(self) -> Table:
        """Return all calls by name and phase."""
        table = listing("What the logging calls cost")
        table.add_column("call", no_wrap=True)
        table.add_column("while", no_wrap=True)
        for heading in ("calls", "median", "slowest"):
            table.add_column(heading, justify="right")
        for (name, phase), taken in self.seconds.items():
            cells = (str(len(taken)), _milliseconds(statistics.median(taken)), _milliseconds(max(taken)))
            table.add_row(name, phase, *cells)
        return table


@dataclasses.dataclass
class Session:
    """One session: what it tracks with, and what it must find again."""

    tracker: MLflowTracker
    state: science.ExperimentState
    folder: Path
    log: Stopwatch = dataclasses.field(default_factory=Stopwatch)
    expected: list[Expected] = dataclasses.field(default_factory=list)

    def profile(self) -> None:
        """Profile the data."""
        profile = science.profile()
        self.log(self.tracker.log_data_profile, profile)
        self.expected.append(expected_profile(profile))
        _say(
            "✓",
            "green",
            "data_profile",
            f"{profile.n_rows} rows, {profile.n_columns} columns; logged in {self._last()}",
        )

    def experiments(self, specs: list[science.ExperimentSpec]) -> None:
        """Run experiments."""
        for spec in specs:
            result = science.run(spec, self.state.current_iteration + 1, self.folder)
            self.state.add(result)
            self.log(self.tracker.log_experiment, result)
            self.expected.append(expected_experiment(result))
            if result.success:
                outcome = (
                    f"rmse {result.metrics['rmse']:.2f}, r2 {_number(result.metrics, 'r2')}; logged in {self._last()}"
                )
                _say("✓", "green", result.experiment_name, outcome)
            else:
                kind, _, words = (result.error_message or "").strip().splitlines()[-1].partition(": ")
                reason = f"{kind.rpartition('.')[2]}: {words}"
                _say("✗", "red", result.experiment_name, f"{reason} Logged in {self._last()}")

    def training_curve(self, halfway: Callable[[], None]) -> None:
        """Train a model and log every epoch, with something happening in the middle of it."""
        run = self.log(self.tracker.start_run, CURVE_RUN)
        self.log(run.log_params, {"model_type": "SGDRegressor", **science.TRAINING_PARAMS})
        for epoch, errors in enumerate(science.training(EPOCHS)):
            if epoch == EPOCHS // 2:
                halfway()
            for name, value in errors.items():
                self.log(run.log_metric, name, value, step=epoch)
        self.log(run.end)
        params = {name: str(value) for name, value in science.TRAINING_PARAMS.items()}
        points = dict.fromkeys(("train_rmse", "valid_rmse"), EPOCHS)
        self.expected.append(
            Expected(CURVE_RUN, "FINISHED", {"model_type": "SGDRegressor", **params}, {}, points, {}, set())
        )
        _say("✓", "green", CURVE_RUN, f"{EPOCHS} epochs, {2 * EPOCHS} metric points; logged in {self._median()} each")

    def summary(self) -> None:
        """Draw the plots and end the session."""
        self.state.finish()
        plots = science.plot(self.state, self.folder)
        self.log(self.tracker.log_visualizations, plots)
        self.log(self.tracker.log_final_summary, self.state)
        assert self.state.best_metric is not None  # noqa: S101 - the baseline cannot fail
        metrics = {
            "total_iterations": float(len(self.state.experiments)),
            "successful_experiments": float(sum(result.success for result in self.state.experiments)),
            "total_time_seconds": self.state.get_elapsed_time(),
            "best_metric": self.state.best_metric,
        }
        tags = {
            "best_experiment": str(self.state.best_experiment),
            "termination_reason": str(self.state.termination_reason),
            "phase": self.state.phase.value,
        }
        files = {"final_state.json", *(path.name for path in plots)}
        self.expected.append(Expected("final_summary", "FINISHED", {}, metrics, {}, tags, files))
        _say("✓", "green", "final_summary", f"{len(plots)} plots and the whole state; logged in {self._last()}")

    def _last(self) -> str:
        return self.log.last

    def _median(self) -> str:
        taken = [took for (name, _), calls in self.log.seconds.items() if name == "log_metric" for took in calls]
        return _milliseconds(statistics.median(taken))


def embedded(directory: Path) -> int:
    """Log a session into an embedded SQLite store and return the exit code."""
    database = directory / "mlruns" / "mlflow.db"
    with _session(f"sqlite:///{quote(str(database))}", directory) as session:
        session.profile()
        session.experiments(science.SPECS[:4])
        session.training_curve(halfway=lambda: None)
        session.experiments(science.SPECS[4:])
        session.summary()
        name, slowest = session.log.slowest("server there")
        console.print(f"\nThe slowest logging call took [bold]{_milliseconds(slowest)}[/] ({name}).")
        delivered = _flush(session.tracker)
        _show_runs(session.tracker)
        _say_where(database, session.tracker)
    return 0 if delivered else 1


def outage(directory: Path) -> int:
    """Log a session into a server that dies in the middle of it, and return the exit code."""
    with TrackingServer(directory / "server") as server, contextlib.ExitStack() as stack:
        with console.status("Starting an MLflow server ..."):
            took = server.start()
        console.print(f"A real MLflow server answers at {server.url} [dim](started in {took:.1f} s)[/]")
        session = stack.enter_context(_session(server.url, directory))

        def kill() -> None:
            with console.status("Waiting until a part has been delivered ..."):
                arrived = _part_delivered(session.tracker)
            server.kill()
            session.log.phase = "server dead"
            console.print(
                f"[bold red] ⚡ kill -9 of the server[/], halfway through {CURVE_RUN}; it had {arrived} events"
            )

        session.profile()
        session.experiments(science.SPECS[:4])
        session.training_curve(halfway=kill)
        session.experiments(science.SPECS[4:])
        session.summary()
        name, slowest = session.log.slowest("server dead")
        console.print()
        console.print(session.log.table())
        console.print(
            f"With the server dead, the slowest logging call took [bold]{_milliseconds(slowest)}[/] ({name})."
        )
        waiting = session.tracker.flush(0)
        console.print(f"[yellow]{waiting.pending} events wait on disk[/], {waiting.delivered} had been delivered.\n")

        with console.status("Starting the server again ..."):
            took = server.start()
        console.print(f"The server is back [dim](started in {took:.1f} s)[/].")
        delivered = _flush(session.tracker)
        table, good = check(server.url, session.tracker.experiment_name, session.expected)
        console.print()
        console.print(table)
        verdict = "[bold green]Everything arrived, and once." if good else "[bold red]That is not what was logged."
        console.print(f"{verdict}[/]\n")
        _show_runs(session.tracker)
        _say_where(server.database, session.tracker, server.artifacts)
    return 0 if delivered and good else 1


@contextlib.contextmanager
def _session(tracking_uri: str, directory: Path) -> Any:
    """Make a session whose code and plots live in a temporary directory, as an autopilot's do."""
    started = dt.datetime.now(dt.timezone.utc)
    session_id = f"{started.astimezone():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    tracker = create_tracker(session_id, science.DATASET, tracking_uri, outbox_dir=directory / "outbox")
    console.print(f"Session [bold]{tracker.experiment_name}[/]\n")
    with tempfile.TemporaryDirectory(prefix="demo-session-") as folder:
        try:
            yield Session(tracker, science.ExperimentState(session_id, started), Path(folder))
        finally:
            tracker.close()


def _part_delivered(tracker: MLflowTracker) -> int:
    """Wait until a part of the events has arrived, the rest being under way, and return how many."""
    deadline = time.monotonic() + PART_TIMEOUT
    while True:
        arrived = tracker.flush(0).delivered
        if arrived or time.monotonic() > deadline:
            return arrived
        time.sleep(0.02)


def _flush(tracker: MLflowTracker) -> FlushResult:
    started = time.monotonic()
    with console.status("Delivering ..."):
        result = tracker.flush(FLUSH_TIMEOUT)
    took = time.monotonic() - started
    left = f", [red]{result.pending + result.parked} left[/]" if not result else ""
    console.print(f"Delivered {result.delivered} events{left} [dim](flush took {took:.1f} s)[/].")
    return result


def _show_runs(tracker: MLflowTracker) -> None:
    """Read the runs back, and print them newest first, with the best one marked."""
    best = tracker.get_best_run(science.METRIC, ascending=True)
    table = listing("Runs, read back")
    table.add_column("run", min_width=20)
    table.add_column("status")
    for heading in (science.METRIC, "r2", "seconds"):
        table.add_column(heading, justify="right")
    table.add_column("source")
    for run in tracker.get_all_runs():
        is_best = best is not None and run["run_id"] == best["run_id"]
        colour = {"FINISHED": "green", "FAILED": "red"}.get(run["status"], "yellow")
        cells = [_number(run["metrics"], name) for name in (science.METRIC, "r2", "execution_time")]
        name = f"{run['run_name']} ★" if is_best else run["run_name"]
        table.add_row(name, Text(run["status"], colour), *cells, run["source"], style="bold" if is_best else "")
    console.print(table)
    if best is not None:
        words = f"{best['run_name']} ({best['params']['model_type']}), {science.METRIC} {best['metrics']['rmse']:.2f}"
        console.print(f"Best run: [bold]{words}[/]\n")


def _say_where(database: Path, tracker: MLflowTracker, artifacts: Path | None = None) -> None:
    """Say where everything lies and how to look at it; lines to copy are never wrapped."""
    store = f"sqlite:///{_short(database)}"
    command = [_short(Path(sys.executable).parent / "mlflow"), "ui", "--backend-store-uri", store]
    if artifacts is not None:  # where the server kept them
        command += ["--artifacts-destination", _short(artifacts)]
    lines = {
        "Stored in": store,
        "Outbox in": _short(tracker.outbox_path or Path()),
        "Look at it": shlex.join(command),
    }
    for heading, words in lines.items():
        console.print(f"{heading:<10}", Text(words, "cyan"), soft_wrap=True)


def _say(sign: str, colour: str, name: str, words: str) -> None:
    line = Table.grid(padding=(0, 1))
    line.add_column(no_wrap=True)
    line.add_column(no_wrap=True, width=20)
    line.add_column()
    line.add_row(Text(f" {sign}", colour), Text(name, "bold"), Text(words))
    console.print(line)


def _number(metrics: dict[str, float], name: str) -> str:
    return f"{round(metrics[name], 3) + 0.0:.3f}" if name in metrics else "[dim]-[/]"  # + 0.0 makes -0.0 positive


def _milliseconds(seconds: float) -> str:
    return f"{1e6 * seconds:.0f} µs" if seconds < 1e-3 else f"{1e3 * seconds:.1f} ms"  # noqa: PLR2004 - a millisecond


def _short(path: Path) -> str:
    """Return a path as it is called from the directory in which the demo was started."""
    short = os.path.relpath(path, START)
    return str(path) if short.startswith("../..") else short


START = Path.cwd()


def main() -> int:
    """Run the demo and return the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__.partition("\n")[0])
    parser.add_argument("--outage", action="store_true", help="kill a real MLflow server halfway, and bring it back")
    parser.add_argument(
        "--dir",
        type=Path,
        default=Path("demo-output"),
        metavar="DIR",
        help="where everything goes; default: demo-output",
    )
    options = parser.parse_args()
    directory = options.dir.absolute()
    directory.mkdir(parents=True, exist_ok=True)
    os.chdir(directory)  # an embedded store of MLflow puts its artifacts below the current directory
    for name in ("alembic", "mlflow.store.db.utils"):  # MLflow makes a new database step by step, and aloud
        logging.getLogger(name).setLevel(logging.WARNING)
    return outage(directory) if options.outage else embedded(directory)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
