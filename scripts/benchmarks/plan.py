"""How much is measured, against what, and the stores to measure with."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path

from servers import MlflowServer, NurseryClient


class Stores:
    """A real MLflow server on loopback and embedded stores, all empty and all removed at the end."""

    def __init__(self) -> None:
        self._nursery, self._end = NurseryClient.start()
        self._directory = Path(tempfile.mkdtemp(prefix="mlflow-outbox-bench-stores-"))
        self.server = MlflowServer(self._nursery, self._directory / "server")
        self.server.start()
        self.uris = {"http": self.server.url, "sqlite": self.fresh("sqlite")}

    def fresh(self, kind: str) -> str:
        """Return the URI of an empty store; "http" is always the same server."""
        if kind == "http":
            return self.server.url
        path = self._directory / uuid.uuid4().hex
        if kind == "file":
            return path.as_uri()
        return f"sqlite:///{self._nursery.empty_database(path.with_suffix('.db'))}"

    def close(self) -> None:
        """End the server and remove everything."""
        self._end()
        shutil.rmtree(self._directory, ignore_errors=True)


@dataclasses.dataclass(frozen=True)
class Plan:
    """One run of the benchmark.

    Attributes:
        peers: directories with the installed peers, by name.
        rounds: repetitions of each comparison, all subjects one after the other in each.
        calls: logging calls of one loop, at most.
        call_seconds: seconds of one loop, at most.
        loop_seconds: seconds that the experiment's loop takes without tracking.
        points: metric points of a backlog.
        pending: events that wait in the largest outbox.
        waiting_runs: runs that wait in it.
        arrivals: seconds for which points are sent to see when they arrive.
    """

    stores: Stores
    peers: dict[str, Path]
    say: Callable[[str], None]
    quick: bool
    rounds: int
    calls: int
    call_seconds: float
    loop_seconds: float
    points: int
    pending: int
    waiting_runs: int
    arrivals: float
