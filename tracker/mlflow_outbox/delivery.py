"""The one place where the experiment's half meets the delivering half, which is imported no sooner than needed."""

from __future__ import annotations

import importlib
import sys
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from mlflow_outbox.destination import Destination
    from mlflow_outbox.outbox import FlushResult, Outbox


class Worker(Protocol):
    """A running worker, as the process that started it sees it."""

    def is_alive(self) -> bool:
        """Return whether it is still there."""
        ...

    def wake(self) -> None:
        """Let it know that there is something new."""
        ...

    def look(self) -> None:
        """Do what is to be done now and then, in the background, while it is there."""
        ...

    def syncs(self, segments: tuple[str, ...]) -> bool:
        """Return whether another process syncs these segments for this one; have it do so from now on.

        Args:
            segments: ``<run>/<file name>`` of each, all that this process writes to in the outbox.
        """
        ...

    def stop(self, timeout: float) -> None:
        """End it, waiting at most timeout seconds; what it had not delivered stays on disk."""
        ...

    @property
    def end(self) -> str:
        """How it ended, of one that is not there any more, in words for a message."""
        ...


def _half(name: str) -> Any:
    return importlib.import_module(f"mlflow_outbox_worker.{name}")


def start(outbox: Outbox) -> Worker:
    """Start the worker that an outbox is set to: a thread of this process, or a process of its own.

    Raises:
        RuntimeError: no thread can be started any more.
        OSError: no process can be started.
    """
    return cast("Worker", _half(outbox.worker_kind).start(outbox))


def start_at_exit(outbox: Outbox) -> Worker:
    """Start a worker at the exit of the interpreter, where no thread can: a process, which ends with this one.

    Raises:
        RuntimeError: there is no process to start.
        OSError: it cannot be started.
    """
    return cast("Worker", _half("process").start(outbox, linger=0.0 if outbox.worker_kind == "thread" else None))


def prepare(outbox: Outbox) -> None:
    """Import now what threads of this process will use for an outbox, if MLflow is part of the program.

    Imports in a thread and MLflow's own import hooks can make each other wait for ever.
    """
    if "mlflow" in sys.modules:
        _half("thread").prepare(outbox)


def prepare_artifacts(scheme: str) -> None:
    """Do the same for places of artifacts whose URI has this scheme."""
    _half("mlflow_sink").prepare_artifacts(scheme)


def flush(outbox: Outbox, timeout: float | None, *, settled: bool = False) -> FlushResult:
    """Have an outbox delivered by whichever worker holds it; see ``Outbox.flush``."""
    return cast("FlushResult", _half("flush").flush(outbox, timeout, settled=settled))


def reading(outbox: Outbox) -> Any:
    """Return a ``mlflow_outbox_worker.reading.Reading``: runs as MLflow and an outbox's journals together have them."""
    return _half("reading").Reading(outbox)


def open_store(destination: Destination, timeout: float) -> Any:
    """Return the worker's ``OpenStore`` of a destination: requests are made once and take at most timeout seconds."""
    return _half("mlflow_sink.stores").open_store(
        destination.secret_uri or destination.uri,
        artifact_root=destination.artifact_root or None,
        timeout=timeout,
        username=None,
        password=None,
        reads=True,
    )


def database_url(destination: Destination) -> str:
    """Return the URL of a database as MLflow's own stores have to be given it, with credentials if there are any."""
    return str(_half("mlflow_sink.database").as_mlflow_reads(destination.secret_uri or destination.uri))


def using_store() -> AbstractContextManager[None]:
    """Hold back forks of other threads while the block uses a store that may be an SQLite file."""
    return cast("AbstractContextManager[None]", _half("forking").using_store())


def translate(error: BaseException) -> Any:
    """Return the worker's ``SinkError`` that says what an exception of MLflow, a database or a connection means."""
    return _half("mlflow_sink.boundary").translate(error)


def command_line() -> int:
    """Run the command line with this process's arguments and return its exit code."""
    return int(_half("cli").main())
