"""A real MLflow server that the demo can kill and start again, and the check of what has arrived there."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, final

from rich.box import SIMPLE_HEAD
from rich.table import Table

from mlflow_outbox.autopilot import HYPOTHESIS_CHARS

if TYPE_CHECKING:
    from demo_science import DataProfile, ExperimentResult

#: Seconds that a server may take to answer for the first time; it makes its database then.
_START_TIMEOUT = 120.0
#: Seconds between two looks whether it answers.
_LOOK_INTERVAL = 0.1


@final
class TrackingServer:
    """``mlflow server`` on a free port of this machine alone, with its data in one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.directory.mkdir(parents=True, exist_ok=True)
        self.database = directory / "mlflow.db"
        self.artifacts = directory / "artifacts"
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> TrackingServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def start(self) -> float:
        """Start the server and return the seconds until it answered.

        Raises:
            RuntimeError: it ended or did not answer in time; the message names its log.
        """
        log = self.directory / "server.log"
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.database}"]
        command += ["--artifacts-destination", str(self.artifacts)]
        started = time.monotonic()
        with log.open("ab") as output:
            # A session of its own, so that kill() reaches its worker processes and nothing else. The job runner, which
            # the demo has no use for, would be eight more processes to wait for.
            environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
            self._process = subprocess.Popen(
                command, stdout=output, stderr=output, env=environment, start_new_session=True
            )
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() - started > _START_TIMEOUT:
                self.kill()
                msg = f"the MLflow server did not start; see {log}"
                raise RuntimeError(msg)
            time.sleep(_LOOK_INTERVAL)
        return time.monotonic() - started

    def kill(self) -> None:
        """End the server and its workers with SIGKILL: no goodbye, as in a power cut."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:  # noqa: S310 - http on loopback
                return bool(answer.status == 200)  # noqa: PLR2004 - OK
        except (OSError, urllib.error.URLError):
            return False


def listing(title: str) -> Table:
    """Return an empty table in the demo's style, which needs little width."""
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
    )


class Expected(NamedTuple):
    """What one run must be in MLflow, computed from the session's own objects."""

    name: str
    status: str
    params: dict[str, str]
    metrics: dict[str, float]
    points: dict[str, int]
    tags: dict[str, str]
    artifacts: set[str]


def expected_profile(profile: DataProfile) -> Expected:
    """Return what the data profile's run must be."""
    params = {
        "n_rows": str(profile.n_rows),
        "n_columns": str(profile.n_columns),
        "n_numeric_features": str(len(profile.numeric_columns)),
        "n_categorical_features": str(len(profile.categorical_columns)),
        "target_column": profile.target_column,
        "target_type": profile.target_type,
    }
    metrics = {"total_missing_values": float(sum(profile.missing_values.values()))}
    return Expected("data_profile", "FINISHED", params, metrics, {}, {}, {"data_profile.json"})


def expected_experiment(result: ExperimentResult) -> Expected:
    """Return what an experiment's run must be."""
    params = {
        "model_type": result.model_type,
        "iteration": str(result.iteration),
        "preprocessing_missing": result.preprocessing.missing_values,
        "preprocessing_scaling": result.preprocessing.scaling,
        "preprocessing_encoding": result.preprocessing.encoding,
        **{f"model_{name}": str(value) for name, value in result.model_params.items()},
    }
    metrics = {**result.metrics, "execution_time": result.execution_time, "success": float(result.success)}
    tags = {"hypothesis": result.hypothesis[:HYPOTHESIS_CHARS], "success": str(result.success)}
    artifacts = {result.code_path.name, "reasoning.txt"} | (set() if result.success else {"error.txt"})
    status = "FINISHED" if result.success else "FAILED"
    return Expected(result.experiment_name, status, params, metrics, {}, tags, artifacts)


def check(url: str, experiment: str, expected: list[Expected]) -> tuple[Table, bool]:
    """Ask the server what it holds; return a table of found and expected numbers, and whether all is as it must be.

    Args:
        url: the server.
        experiment: name of the experiment.
        expected: every run that must be there.
    """
    from mlflow import MlflowClient  # seconds of import, which only this check needs

    client = MlflowClient(url)
    found = client.get_experiment_by_name(experiment)
    runs = client.search_runs([found.experiment_id], max_results=1000) if found else []
    table = listing(f"What the server holds: {len(runs)} runs ({len(expected)} were logged)")
    table.add_column("run", min_width=20)
    for heading in ("params", "metrics", "points", "tags", "files"):
        table.add_column(heading, justify="right")
    table.add_column("status")
    good = len(runs) == len(expected)
    for wanted in expected:
        twins = [run for run in runs if run.info.run_name == wanted.name]
        if len(twins) != 1:
            good = False
            table.add_row(wanted.name, *[""] * 5, f"[red]{len(twins)} runs[/]")
            continue
        cells, same = _compare(client, twins[0], wanted)
        good = good and same
        table.add_row(wanted.name, *cells)
    return table, good


def _compare(client: Any, run: Any, wanted: Expected) -> tuple[list[str], bool]:
    history = {key: client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
    points = {key: len({(point.step, point.timestamp, point.value) for point in held}) for key, held in history.items()}
    stored = sum(map(len, history.values()))
    tags = {key: value for key, value in run.data.tags.items() if not key.startswith("mlflow")}
    files = {entry.path for entry in client.list_artifacts(run.info.run_id)}
    wanted_points = {**dict.fromkeys(wanted.metrics, 1), **wanted.points}
    metrics = {key: value for key, value in run.data.metrics.items() if key not in wanted.points}
    pairs = [
        (len(run.data.params), len(wanted.params), wanted.params == run.data.params),
        (len(run.data.metrics), len(wanted_points), wanted.metrics == metrics),
        (stored, sum(wanted_points.values()), wanted_points == points and stored == sum(points.values())),
        (len(tags), len(wanted.tags), wanted.tags == tags),
        (len(files), len(wanted.artifacts), wanted.artifacts == files),
    ]
    cells = [f"{found} [green]✓[/]" if same else f"[red]{found} of {number} ✗[/]" for found, number, same in pairs]
    status = run.info.status
    cells.append(status if status == wanted.status else f"[red]{status}[/]")
    return cells, all(same for _, _, same in pairs) and status == wanted.status
